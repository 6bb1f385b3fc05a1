"""Repositories that sessions can't use safely are rejected with a specific error; the printed fixes work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RefusedError
from orchestrator.repo.git.command import Git
from orchestrator.repo.source.compatibility import (
    check_complete_clone,
    check_file_names,
    check_supported,
    is_case_insensitive,
)
from orchestrator.repo.source.user_checkouts import LocalRepository, find_repository
from tests.conftest import Repository


async def check(repository: Repository, top: Path | None = None) -> None:
    """Check HEAD of a repository, or of a clone; git runs in a bare clone, as in the trusted repository."""
    trusted = repository.top.parent / "trusted.git"
    if not trusted.exists():
        repository.git("clone", "--quiet", "--mirror", ".", str(trusted))
    else:
        repository.git("push", "--quiet", "--mirror", str(trusted))
    users = await find_repository(repository.top, Git(None, as_user=True, environ=repository.environ))
    if top is not None:
        users = LocalRepository(top / ".git", top, "sha1")
    commit = repository.git("rev-parse", "HEAD")
    if users is not None:
        await check_complete_clone(users, Git(None, as_user=True, environ=repository.environ))
    await check_supported(Git(trusted, environ=repository.environ), commit)


def clone(repository: Repository, *options: str) -> Repository:
    """Return a clone made by the network protocol."""
    repository.git("config", "uploadpack.allowFilter", "true")
    top = repository.top.parent / "clone"
    repository.git("clone", "--quiet", "--no-checkout", *options, f"file://{repository.top}", str(top))
    return Repository(top, repository.environ, repository.spawns)


def commands(remedy: str) -> list[list[str]]:
    """Return the git commands of a fix."""
    return [command.split() for command in re.findall(r"`git ([^`]+)`", remedy)]


async def test_plain_repository_is_accepted(repository: Repository) -> None:
    """So are attributes without LFS, comments that name it, and merely unusual names."""
    repository.commit(
        {".gitattributes": "# *.bin filter=lfs\n*.x filter=lfs2\n", "a/.gitignore": "", "git~2/.gitx": ""}
    )
    await check(repository)


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("options", "says"),
    [(["--filter=blob:none"], "partial clone"), (["--depth=1"], "shallow clone")],
    ids=["partial", "shallow"],
)
async def test_incomplete_clone_is_rejected_until_the_remedy(
    repository: Repository, options: list[str], says: str
) -> None:
    """The printed commands make it a complete clone, which is accepted."""
    for number in "123":
        repository.commit({"f": number})
    cloned = clone(repository, *options)
    with pytest.raises(RefusedError, match=says) as refused:
        await check(repository, cloned.top)
    for command in commands(refused.value.remedy):
        cloned.git(*command)
    await check(repository, cloned.top)
    assert len(cloned.git("cat-file", "--batch-all-objects", "--batch-check").splitlines()) == len(
        repository.git("cat-file", "--batch-all-objects", "--batch-check").splitlines()
    )


async def test_submodules_are_rejected_by_name(repository: Repository) -> None:
    """The first ones are named, the others counted."""
    commit = repository.git("rev-parse", "HEAD")
    for name in "abcd":
        repository.git("update-index", "--add", "--cacheinfo", f"160000,{commit},libs/{name}")
    repository.git("commit", "--quiet", "--message", "submodules")
    with pytest.raises(RefusedError, match="libs/a, libs/b, libs/c and 1 more"):
        await check(repository)


@pytest.mark.extended_variants
@pytest.mark.parametrize("place", [".gitattributes", "deep/er/.gitattributes"])
async def test_lfs_is_rejected_anywhere(repository: Repository, place: str) -> None:
    """The file is named; without the line in it the run is accepted."""
    repository.commit({place: "*.txt text\n  *.bin filter=lfs diff=lfs -text\r\n"})
    with pytest.raises(RefusedError, match=f": {re.escape(place)} has `filter=lfs`"):
        await check(repository)
    repository.commit({place: "*.txt text\n"})
    await check(repository)


@pytest.mark.parametrize(
    "path", ["a/.git/x", ".GIT/config", "x/.git /y", "GIT~1", "a/.git::$INDEX", "..", "n" * 256, "d/" * 1800 + "f"]
)
def test_uncheckoutable_names_are_rejected(path: str) -> None:
    """Git, or the file system, would not write them."""
    with pytest.raises(RefusedError, match="can't be checked out"):
        check_file_names([b"fine", path.encode()], folds_case=False)


@pytest.mark.parametrize(
    "paths", [["a/File", "a/file"], ["docs/x", "Docs/y"], ["é", "e\u0301"], ["docs", "Docs/y"], ["straße", "STRASSE"]]
)
def test_case_insensitive_duplicates_are_rejected(paths: list[str]) -> None:
    """Files and folders; a case-sensitive file system accepts them."""
    encoded = [path.encode() for path in paths]
    check_file_names(encoded, folds_case=False)
    with pytest.raises(RefusedError, match="differ only in case"):
        check_file_names(encoded, folds_case=True)
    check_file_names([b"a/x", b"a/y", b"b/x"], folds_case=True)


def test_non_utf_8_name_is_rejected_on_case_insensitive_systems() -> None:
    """Such file systems take Unicode only."""
    check_file_names([b"\xff"], folds_case=False)
    with pytest.raises(RefusedError, match="not UTF-8"):
        check_file_names([b"\xff"], folds_case=True)


def test_case_sensitivity_is_detected_without_writing(tmp_path: Path) -> None:
    """Another folder of that name is a different folder; here a link simulates a case-insensitive file system."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (tmp_path / "HUB").mkdir()
    assert not is_case_insensitive(folder)
    (tmp_path / "HUB").rmdir()
    (tmp_path / "HUB").symlink_to(folder)
    assert is_case_insensitive(folder)


@pytest.mark.extended_rest
@pytest.mark.parametrize("kind", ["submodules", "git LFS"])
def test_commit_made_unsupported_during_a_run_starts_no_task(repository: Repository, kind: str) -> None:
    """Otherwise a session's files in the submodule would be lost, and its LFS files would land as plain files."""
    add = "git update-index --add --cacheinfo 160000,$(git rev-parse HEAD),sub; mkdir -p sub"
    if kind == "git LFS":
        add = 'echo "*.bin filter=lfs" > .gitattributes; git add .gitattributes'
    hook = repository.top / ".git/hooks/post-receive"
    hook.write_text(f'#!/bin/sh\nunset GIT_DIR\ncd "{repository.top}" && {{ {add}; git commit -qm theirs; }}\n')
    hook.chmod(0o755)
    tasks: list[dict[str, Any]] = [
        {"id": "a", "prompt": "write a.txt x"},
        {"id": "b", "prompt": "write sub/b.txt x\nwrite b.bin x", "needs": ["a"]},
    ]
    ended = repository.council("run", str(repository.configure(tasks)), "--json")
    assert ended.states == {"a": "landed", "b": "failed"}, ended
    failed = ended.result["tasks"][1]
    assert failed["failure"] == "invalid"
    assert failed["reason"].startswith(f"{kind} {'are' if kind == 'submodules' else 'is'} not supported: ")
