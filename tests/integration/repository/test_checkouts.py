"""Finding the checkout of a user's branch, in every way git allows; without a checkout git is not started."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import RefusedError
from orchestrator.repo.git.command import Git
from orchestrator.repo.git.reading import read_ref
from orchestrator.repo.source.user_checkouts import LocalRepository, find_checkout
from tests.conftest import Repository
from tests.faults import SHELL_ADAPTER


async def found(repository: Repository, branch: str) -> Path | None:
    """Return the checkout of the branch."""
    local = LocalRepository(repository.top / ".git", repository.top, "sha1")
    return await find_checkout(local, branch, Git(None, as_user=True, environ=repository.environ))


async def test_branch_is_found_in_main_and_linked_checkouts(repository: Repository, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    repository.git("worktree", "add", "-b", "beside", str(linked))
    assert await found(repository, "main") == repository.top
    assert await found(repository, "beside") == linked
    assert await found(repository, "besides") is None
    repository.git("checkout", "--detach")
    assert await found(repository, "main") is None


@pytest.mark.extended
async def test_target_checked_out_twice_is_rejected(repository: Repository, tmp_path: Path) -> None:
    """Before a session starts, by `council doctor`, and at a landing; a deleted checkout does not count."""
    linked = tmp_path / "linked"
    repository.git("worktree", "add", "--force", str(linked), "main")
    path = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    fix = f"git -C {linked} switch --detach"
    for command in (["run", str(path)], ["doctor", str(path)]):
        ended = repository.council(*command)
        assert ended.code != 0
        assert fix in ended.stdout + ended.stderr, ended
    assert not repository.spawns.exists()
    ended = repository.council("run", str(path), "--allow-deferred", "--json")
    assert ended.states == {"one": "queued"}
    assert fix in ended.result["tasks"][0]["reason"]
    repository.git(*fix.split()[1:])
    assert repository.council("resume", "--json").states == {"one": "landed"}
    repository.git("-C", str(linked), "checkout", "--quiet", "--ignore-other-worktrees", "main")
    with pytest.raises(RefusedError, match="switch --detach"):
        await found(repository, "main")
    shutil.rmtree(linked)
    assert await found(repository, "main") == repository.top


@pytest.mark.parametrize("kind", ["symbolic branch", "link"])
async def test_branch_behind_a_symbolic_ref_is_found(repository: Repository, kind: str) -> None:
    """HEAD may name a branch that is symbolic itself, or be a link, as in old versions of git."""
    if kind == "link":
        head = repository.top / ".git" / "HEAD"
        head.unlink()
        head.symlink_to("refs/heads/main")
    else:
        repository.git("symbolic-ref", "refs/heads/alias", "refs/heads/main")
        repository.git("symbolic-ref", "HEAD", "refs/heads/alias")
    assert await found(repository, "main") == repository.top


async def test_ref_is_read_in_any_storage(repository: Repository, tmp_path: Path) -> None:
    """In a file of its own, packed, symbolic, in a bare repository, from a linked checkout; or absent."""
    commit = repository.git("rev-parse", "main")
    bare, linked = tmp_path / "bare.git", tmp_path / "linked"
    repository.git("clone", "--quiet", "--bare", str(repository.top), str(bare))
    repository.git("worktree", "add", "-b", "beside", str(linked))
    repository.git("symbolic-ref", "refs/heads/alias", "refs/heads/main")
    for place, ref in [(repository.top, "main"), (repository.top, "alias"), (bare, "main"), (linked, "main")]:
        assert await read_ref(place, f"refs/heads/{ref}") == commit
    # A file of this name in a checkout is not a ref.
    (repository.top / "refs" / "heads").mkdir(parents=True)
    (repository.top / "refs" / "heads" / "packed").write_text("1" * 40)
    repository.git("branch", "packed")
    repository.git("pack-refs", "--all")
    assert await read_ref(repository.top, "refs/heads/packed") == commit
    assert await read_ref(repository.top, "refs/heads/none") is None


def test_checkout_by_core_worktree_is_found(repository: Repository, tmp_path: Path) -> None:
    """A checkout around the git directory is normal; one elsewhere is rejected, since git finds no repository in it."""
    path = repository.configure([{"id": "one", "prompt": "write one.txt 1\nappend README.md More."}])
    repository.git("config", "core.worktree", "../src/..")
    assert repository.council("run", str(path), "--json").states == {"one": "landed"}
    assert repository.git("status", "--porcelain") == ""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    repository.git("config", "core.worktree", str(elsewhere))
    for command in ("run", "doctor"):
        ended = repository.council(command, str(path))
        assert ended.code in {1, 2}
        assert "core.worktree" in ended.stdout + ended.stderr, ended


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["submodule", "separate"])
def test_checkout_with_a_separate_git_dir_is_rejected(repository: Repository, tmp_path: Path, kind: str) -> None:
    """Git takes the git directory for the checkout and would write files there; landing on other branches works."""
    if kind == "submodule":
        above = tmp_path / "above"
        repository.git("init", "--quiet", str(above))
        add = ("submodule", "--quiet", "add", str(repository.top), "sub")
        repository.git("-C", str(above), "-c", "protocol.file.allow=always", *add)
        repository = replace(repository, top=above / "sub")
    else:
        repository.git("init", "--quiet", "--separate-git-dir", str(tmp_path / "separate.git"))
    tasks = [{"id": "one", "prompt": "write one.txt 1\nappend README.md More."}]
    path = repository.configure(tasks)
    for command in ("run", "doctor"):
        ended = repository.council(command, str(path))
        assert ended.code in {1, 2}
        assert "is outside the checkout" in ended.stdout + ended.stderr, ended
    assert not repository.spawns.exists()
    ended = repository.council("run", str(repository.configure(tasks, target="out")), "--json")
    assert ended.states == {"one": "landed"}, ended
    assert repository.git("status", "--porcelain") == ""
    repository.git("switch", "--quiet", "--detach", "out")
    assert repository.git("status", "--porcelain") == ""


@pytest.mark.extended_variants
@pytest.mark.parametrize("flag", ["assume-unchanged", "skip-worktree"])
@pytest.mark.parametrize("change", ["edit", "removal"])
def test_change_that_git_is_set_to_ignore_defers_a_landing(repository: Repository, flag: str, change: str) -> None:
    """Of a path that the landing changes; it lands after the remedy, and flags of other paths do not matter."""
    repository.commit({"a b": "1\n", "other": "1\n", "same": "1\n"}, "more")
    script = 'echo 2 >"a b"; echo 2 >same'
    config = repository.configure([{"id": "t", "prompt": script}], adapters={"sh": SHELL_ADAPTER})
    repository.git("update-index", f"--{flag}", "a b", "other", "same")
    mine = repository.top / "a b"
    (repository.top / "other").write_text("mine\n")
    if change == "edit":
        mine.write_text("mine\n")
    else:
        mine.unlink()
    before = repository.git("ls-files", "-v")
    ended = repository.council("run", str(config), "--allow-deferred", "--json")
    assert ended.states == {"t": "queued"}, ended
    reason = ended.result["tasks"][0]["reason"]
    assert "the target's checkout has changes that git is set to ignore (a b): " in reason
    assert f"`git update-index --no-{flag} PATH`" in reason
    assert (mine.read_text() if mine.exists() else None) == ("mine\n" if change == "edit" else None)
    assert repository.git("ls-files", "-v") == before
    repository.git("update-index", f"--no-{flag}", "a b")
    repository.git("checkout", "--quiet", "a b")
    assert repository.council("merge", "--json").states == {"t": "landed"}
    assert (mine.read_text(), (repository.top / "other").read_text()) == ("2\n", "mine\n")


@pytest.mark.extended_variants
@pytest.mark.parametrize("hook", ["update", "reference-transaction"])
def test_landing_keeps_a_sparse_checkout(repository: Repository, hook: str) -> None:
    """Without a file outside of its folders, also after the undo of a push that a hook rejects early or late."""
    repository.commit({"in/x": "1\n", "out/y": "1\n"}, "more")
    script = "echo 2 >in/x; echo 2 >out/y"
    config = repository.configure([{"id": "t", "prompt": script}], adapters={"sh": SHELL_ADAPTER})
    repository.git("sparse-checkout", "set", "--cone", "in")
    before = repository.git("ls-files", "-v")
    path = repository.top / ".git/hooks" / hook
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    assert repository.council("run", str(config), "--allow-deferred", "--json").states == {"t": "queued"}
    assert ((repository.top / "in/x").read_text(), (repository.top / "out").exists()) == ("1\n", False)
    assert (repository.git("ls-files", "-v"), repository.git("status", "--porcelain", "-uno")) == (before, "")
    path.unlink()
    assert repository.council("merge", "--json").states == {"t": "landed"}
    assert ((repository.top / "in/x").read_text(), (repository.top / "out").exists()) == ("2\n", False)
    assert (repository.git("show", "HEAD:out/y"), repository.git("status", "--porcelain", "-uno")) == ("2", "")
