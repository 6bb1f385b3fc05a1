"""Names of file locks compared with the file system: one lock per file, for any spelling."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import RefusedError
from orchestrator.locking.lock_names import canonical_path, folds_case, lock_name
from tests.hypothesis_settings import example_settings

# Pairs that naive names confuse: a/b and a_b, upper and lower case, and long names with equal prefixes.
LETTERS = st.sampled_from(["a", "b", "_", "A", "é", "ß", ".", " ", "-", "%", "\n", "x" * 60, "\udcff"])
names = st.lists(LETTERS, min_size=1, max_size=4).map("".join).filter(lambda name: name not in {".", ".."})
paths = st.lists(names, min_size=1, max_size=3).map("/".join)


@example_settings(300)
@given(st.lists(paths, min_size=2, max_size=8, unique=True))
def test_distinct_files_have_distinct_lock_names(files: list[str]) -> None:
    """Every name with its extension fits the file system."""
    locks = [lock_name(canonical_path(path)) for path in files]
    assert len(set(locks)) == len({unicodedata.normalize("NFC", os.path.normpath(path)) for path in files})
    for lock in locks:
        assert "/" not in lock
        assert not lock.startswith(".")
        assert len(os.fsencode(lock)) <= 200


SHORT = st.sampled_from(["a", "b", "link", "up", "a_b", "A"])
steps = st.lists(st.one_of(SHORT, st.just(".."), st.just("."), st.just("")), min_size=1, max_size=7)


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    """Draw a tree with links to folders, files, links, parents, and outside."""
    with TemporaryDirectory() as made:
        top = Path(made, "repo")
        for folder in ("a/b", "b/a", "a_b/a"):
            (top / folder).mkdir(parents=True)
        for file in ("a/a", "a/A", "b/b", "a_b/b", "A"):
            (top / file).write_text(file)
        (top / "link").symlink_to("a/b")
        (top / "up").symlink_to("b/link")
        (top / "b/link").symlink_to(top / "a")
        (top / "a/link").symlink_to("../b/b")
        (top / "a/b/up").symlink_to("..")
        (top / "b/up").symlink_to("../../outside")
        (top.parent / "outside").mkdir()
        yield top


@example_settings(800)
@given(st.data())
def test_spellings_of_a_file_have_one_lock_name(tree: Path, data: st.DataObject) -> None:
    """Two spellings share a lock exactly if the file system resolves them to one file."""
    first, second = (data.draw(steps.map("/".join).filter(bool)) for _ in range(2))
    found = []
    for spelled in (first, second):
        real = (tree / spelled.lstrip("/")).resolve()
        try:
            lock = lock_name(canonical_path(spelled.lstrip("/") or ".", tree))
        except RefusedError:
            assert not real.is_relative_to(tree.resolve()) or real == tree.resolve()
            return
        assert real.is_relative_to(tree.resolve())
        found.append((lock, real))
    assert (found[0][0] == found[1][0]) is (found[0][1] == found[1][1])
    if all(real.exists() for _, real in found):
        assert (found[0][0] == found[1][0]) is found[0][1].samefile(found[1][1])


@example_settings(300)
@given(paths)
def test_unicode_forms_of_a_file_have_one_lock_name(path: str) -> None:
    """Composed and decomposed names on any system; names that differ in case where the file system ignores it."""
    for form in ("NFC", "NFD"):
        assert canonical_path(unicodedata.normalize(form, path)) == canonical_path(path)
        spelled = unicodedata.normalize(form, path.upper())
        assert canonical_path(spelled, folds_case=True) == canonical_path(path.lower(), folds_case=True)
    if path.swapcase() != path and "ß" not in path:
        assert canonical_path(path.swapcase()) != canonical_path(path)


def test_case_sensitivity_follows_the_file_system(tmp_path: Path) -> None:
    """The probe leaves no file behind."""
    (tmp_path / "case").touch()
    alike = (tmp_path / "CASE").exists()
    (tmp_path / "case").unlink()
    assert folds_case(tmp_path) is alike
    assert list(tmp_path.iterdir()) == []


def test_long_path_has_a_valid_lock_name(tmp_path: Path) -> None:
    """Far more than 255 bytes, with a difference in the middle only."""
    names = [lock_name(canonical_path("/".join(["é" * 100] * 20 + [middle] + ["ü" * 100] * 20))) for middle in "ab"]
    for name in names:
        (tmp_path / f"{name}.lock").touch()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("path", ["", ".", "..", "a/..", "../x", "a/../../b", "/etc/passwd", "a\0"])
def test_path_outside_of_the_repository_is_rejected(path: str, tmp_path: Path) -> None:
    """With and without a tree to resolve it."""
    for top in (None, tmp_path):
        with pytest.raises(RefusedError):
            canonical_path(path, top)


def test_absolute_path_in_the_tree_is_accepted(tmp_path: Path) -> None:
    """Also where the tree is reached through a link."""
    (tmp_path / "repo").mkdir()
    (tmp_path / "alias").symlink_to("repo")
    assert canonical_path(str(tmp_path / "alias" / "a"), tmp_path / "repo") == "a"
    assert canonical_path(str(tmp_path / "repo" / "a"), tmp_path / "alias") == "a"
