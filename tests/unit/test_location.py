"""The repository named by a file is known before the rest is parsed."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.api.loading import named_repository


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("version: 1\nrepo: ../project\ntasks: []\n", "../project"),
        ('{"tasks": [{"repo": "no"}], "defaults": {"repo": "no"}, "repo": "yes"}', "yes"),
        ("repo: /abs/olute\n", "/abs/olute"),
        ("repo: first\nnonsense: [", "first"),
        ("repo: https://example.org/x.git\n", None),
        ("repo: me@host:x\n", None),
        ("version: 1\n", None),
        ("repo: [a, b]\n", None),
        ("- repo\n", None),
        ("nonsense: [\nrepo: x", None),
        ("repo: 'a\\0b'\n", "a\\0b"),
        ('repo: "a\\0b"\n', None),
        ("", None),
    ],
)
def test_repository_of_the_file_is_found(tmp_path: Path, text: str, expected: str | None) -> None:
    """Only the top-level key counts; URLs are not folders; invalid files raise nothing."""
    path = tmp_path / "council.yaml"
    path.write_text(text)
    assert named_repository(path) == (None if expected is None else (tmp_path / expected).resolve())


def test_unreadable_file_names_no_repository(tmp_path: Path) -> None:
    """Neither a missing file nor one that is not text."""
    assert named_repository(tmp_path / "none") is None
    assert named_repository(tmp_path) is None
    (tmp_path / "binary").write_bytes(b"repo: \xff\xfe")
    assert named_repository(tmp_path / "binary") is None
