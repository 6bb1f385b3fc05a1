"""Preserved work of all kinds is listed, shown, applied to a checkout or a branch, and dropped."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from orchestrator.errors import RefusedError
from orchestrator.repo.git.command import Git
from orchestrator.repo.git.reading import read_commits
from orchestrator.repo.intake.diffs import diff_commits, diff_session
from orchestrator.repo.landing import salvage
from orchestrator.repo.source.upstream import UpstreamRepository
from tests.conftest import Repository
from tests.integration.worktrees.test_collect import RULES, VALUE, SessionWorktree, session

__all__ = ["session"]

BINARY = bytes(range(256)) * 8


@pytest.fixture
def users(environ: dict[str, str]) -> Git:
    """Return git on the user's side."""
    return Git(None, as_user=True, environ=environ)


@pytest.fixture
async def work(session: SessionWorktree) -> str:
    """Return a commit that changes, adds, deletes, links and renames files with hostile names."""
    session.write("README.md", "# Project\nchanged\n")
    (
        session.write("-rf"),
        session.write("new\nline"),
        session.write(":(top)x"),
        session.write('qu"ote\t'),
        session.write("bin", BINARY),
    )
    session.write("run.sh", "#!/bin/sh\n").chmod(0o755)
    (session.worktree.tree / "sym").symlink_to("/etc/passwd")
    (session.worktree.tree / "src/app.py").rename(session.worktree.tree / "src/main.py")
    (session.worktree.tree / "link/x").unlink()
    (session.worktree.tree / "link").rmdir()
    (session.worktree.tree / "link").symlink_to("src")
    commit = (await session.collect()).commit
    assert commit is not None
    return commit


def state(top: Path) -> dict[str, object]:
    """Return the state of the files of a checkout."""
    return {
        str(path.relative_to(top)): (path.readlink() if path.is_symlink() else path.read_bytes(), path.lstat().st_mode)
        for path in top.rglob("*")
        if (path.is_symlink() or path.is_file()) and ".git" not in path.relative_to(top).parts
    }


async def test_preserved_work_is_listed_and_found(session: SessionWorktree, work: str) -> None:
    """Branches and salvaged refs have one short name each; an unknown name suggests the nearest."""
    for ref in ("refs/heads/council/run1/task/conflict", "refs/heads/council/run2/task/1",
                "refs/salvage/run1/task.1/stash",
                "refs/salvage/run1/a.b.2/1", "refs/heads/council/run1/a.b/2", "refs/council/run1/x"):  # fmt: skip
        await session.git("update-ref", ref, work)
    all_runs = await salvage.list_unmerged_work(session.git)
    assert [f"{one.run}/{one.name}" for one in all_runs] == [
        "run1/a.b/2", "run1/a.b/2/1", "run1/task/1", "run1/task/1/stash", "run1/task/conflict", "run2/task/1",
    ]  # fmt: skip
    run1 = await salvage.list_unmerged_work(session.git, "run1")
    assert len(run1) == 5
    found = salvage.find_unmerged_work(run1, "task/1/stash")
    assert (found.ref, found.commit) == ("refs/salvage/run1/task.1/stash", work)
    (made,) = (await read_commits(session.git, [work])).values()
    assert (made.subject, made.committed > 1_600_000_000) == ("work", True)
    assert salvage.find_unmerged_work(all_runs, "run2/task/1").run == "run2"
    with pytest.raises(RefusedError, match="exists in several runs"):
        salvage.find_unmerged_work(all_runs, "task/1")
    with pytest.raises(RefusedError, match="task/conflict"):
        salvage.find_unmerged_work(run1, "task/conflct")
    numbered = [salvage.UnmergedWork("", "run1", f"t{number:02}", "1", work) for number in range(12)]
    with pytest.raises(RefusedError, match="t09/1 and 2 more"):
        salvage.find_unmerged_work(numbered, "other")
    with pytest.raises(RefusedError, match="task/1, task/1/stash, task/conflict"):
        salvage.find_unmerged_work(run1, "task")


async def test_diff_is_shown(session: SessionWorktree, work: str) -> None:
    """As a patch or a summary, with colors on request, regardless of the file names."""
    shown = await diff_commits(session.git, session.base, work)
    assert b'"b/new\\nline"' in shown
    assert b"rename to src/main.py" in shown
    assert b"\x1b[" not in shown
    assert b"README.md" in await diff_commits(session.git, session.base, work, stat=True)
    assert b"+changed" not in await diff_commits(session.git, session.base, work, stat=True)


async def test_reading_ignores_git_variables_of_the_environment(
    session: SessionWorktree, work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They could redirect the repository, or start a diff program."""
    expected = await diff_commits(session.git, session.base, work), await salvage.list_unmerged_work(session.git)
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    variables = {
        "GIT_DIR": str(tmp_path), "GIT_WORK_TREE": str(tmp_path), "GIT_OBJECT_DIRECTORY": str(tmp_path),
        "GIT_EXTERNAL_DIFF": str(program), "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "diff.external",
        "GIT_CONFIG_VALUE_0": str(program), "GIT_PAGER": str(program), "GIT_TRACE": str(tmp_path / "started"),
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (
        await diff_commits(session.git, session.base, work),
        await salvage.list_unmerged_work(session.git),
    ) == expected
    assert (await read_commits(session.git, [work]))[work].subject == "work"
    assert not (tmp_path / "started").exists()


@pytest.mark.usefixtures("work")
async def test_listing_skips_a_concurrently_deleted_ref(session: SessionWorktree) -> None:
    (kept,) = await salvage.list_unmerged_work(session.git)
    file, has_ended = Path(str(session.git.git_dir)) / kept.ref, threading.Event()

    def delete_and_create() -> None:
        while not has_ended.is_set():
            file.unlink()
            file.write_text(f"{kept.commit}\n")

    other = threading.Thread(target=delete_and_create)
    other.start()
    try:
        found = [await salvage.list_unmerged_work(session.git) for _ in range(30)]
    finally:
        has_ended.set()
        other.join()
    assert all(one in ([], [kept]) for one in found)


async def test_live_session_is_read_without_a_trace(session: SessionWorktree) -> None:
    """No index changes and nothing is left; secrets and huge files are only named."""
    session.write("README.md", "# Project\nlive\n"), session.write("new.txt")
    session.write("a.py", f"v = '{VALUE}'\n"), session.write(".env", "A=1\n"), session.write("huge", b"h" * 200_000)
    session.agent("add", "new.txt")
    before = (session.worktree.index.read_bytes(), (session.worktree.git_dir / "index").read_bytes())
    there = set(session.worktree.index.parent.iterdir())
    shown = (await diff_session(session.git, session.worktree, session.base, rules=RULES)).decode()
    assert "+live" in shown
    assert "b/new.txt" in shown
    assert VALUE not in shown
    assert "hhh" not in shown
    assert [line.split("'")[1] for line in shown.splitlines() if line.startswith("# left out")] == [
        ".env",
        "a.py",
        "huge",
    ]
    assert before == (session.worktree.index.read_bytes(), (session.worktree.git_dir / "index").read_bytes())
    assert set(session.worktree.index.parent.iterdir()) == there
    assert not await session.has(b"# Project\nlive\n")
    os.mkfifo(session.worktree.tree / ".gitignore")
    with pytest.raises(RefusedError, match="gitignore"):
        await diff_session(session.git, session.worktree, session.base, rules=RULES)


async def test_work_is_applied_to_a_checkout(
    session: SessionWorktree, work: str, users: Git, repository: Repository
) -> None:
    """All kinds of changes become uncommitted changes, next to those of the user."""
    (repository.top / "notes.txt").write_text("mine\n")
    repository.git("config", "apply.whitespace", "error")
    index = (repository.top / ".git/index").read_bytes()
    paths = await salvage.apply_to_checkout(session.git, users, repository.top, session.base, work)
    assert {"-rf", "new\nline", "bin", "link", "link/x", "src/app.py", "src/main.py"} <= set(paths)
    assert (repository.top / "notes.txt").read_text() == "mine\n"
    (repository.top / "notes.txt").unlink()
    (session.worktree.tree / ".git").unlink()
    assert state(repository.top) == state(session.worktree.tree)
    assert index == (repository.top / ".git/index").read_bytes()
    assert not list(session.worktree.hub.indexes.glob("merge-*"))


async def test_work_is_merged_with_the_users_commits(
    session: SessionWorktree, work: str, users: Git, repository: Repository
) -> None:
    """A change follows a file that the user renamed. Work that is already merged changes nothing."""
    repository.git("mv", "README.md", "READ.md")
    repository.commit({"own.txt": "own\n"}, "own")
    session.write("README.md", "# Project\n")
    paths = await salvage.apply_to_checkout(session.git, users, repository.top, session.base, work)
    assert "READ.md" in paths
    assert (repository.top / "READ.md").read_text() == "# Project\nchanged\n"
    repository.git("add", "--all"), repository.git("commit", "--quiet", "--message", "took it")
    assert await salvage.apply_to_checkout(session.git, users, repository.top, session.base, work) == ()


@pytest.mark.extended_variants
@pytest.mark.parametrize("how", ["committed", "edited", "untracked", "link out"])
async def test_conflicting_work_changes_nothing(
    session: SessionWorktree, work: str, users: Git, repository: Repository, tmp_path: Path, how: str
) -> None:
    """A conflict with the user's commits or files rejects the whole change."""
    match how:
        case "committed":
            repository.commit({"README.md": "# Other\nmine\n"}, "mine")
        case "edited":
            (repository.top / "README.md").write_text("# Other\n")
        case "untracked":
            (repository.top / "run.sh").write_text("mine\n")
        case _:
            (tmp_path / "out").mkdir()
            (repository.top / "src").rename(tmp_path / "out/src")
            (repository.top / "src").symlink_to(tmp_path / "out/src")
    before = state(repository.top), repository.git("status", "--porcelain")
    with pytest.raises(RefusedError, match="add `--branch BRANCH` to create a branch instead"):
        await salvage.apply_to_checkout(session.git, users, repository.top, session.base, work)
    assert before == (state(repository.top), repository.git("status", "--porcelain"))
    if how == "link out":
        assert [path.name for path in (tmp_path / "out/src").iterdir()] == ["app.py"]


async def test_link_to_another_repository_is_not_applied(
    session: SessionWorktree, users: Git, repository: Repository
) -> None:
    """A nested repository has no files to apply."""
    session.agent("init", "--quiet", "nested")
    session.agent(
        "-C", "nested", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--allow-empty", "-m", "x"
    )
    left = await session.collect()
    assert left.commit is not None
    with pytest.raises(RefusedError, match="includes a nested repository"):
        await salvage.apply_to_checkout(session.git, users, repository.top, session.base, left.commit)


async def test_branch_is_created_once(session: SessionWorktree, work: str, repository: Repository) -> None:
    """Only if the name is free and valid in git."""
    source = UpstreamRepository.of(str(repository.top), is_local=True, git=session.git)
    await salvage.create_branch(source, work, "rescued/work")
    assert repository.git("rev-parse", "rescued/work") == work
    reasons = {
        "rescued/work": "already exists",
        "main": "already exists",
        "rescued": "can't create branch",
        **dict.fromkeys(("-x", "a..b", "x:y", ""), "is not a valid branch name"),
    }
    for taken, why in reasons.items():
        with pytest.raises(RefusedError, match=why):
            await salvage.create_branch(source, work, taken)


async def test_only_listed_work_is_dropped(session: SessionWorktree, work: str) -> None:
    await session.git("update-ref", "refs/salvage/run1/task.1/stash", work)
    listed = await salvage.list_unmerged_work(session.git, "run1")
    await session.git("update-ref", "refs/salvage/run1/task.1/stash", session.base)
    with pytest.raises(RefusedError, match="list it"):
        await salvage.delete_refs(session.git, listed)
    listed = await salvage.list_unmerged_work(session.git, "run1")
    assert len(listed) == 2
    await salvage.delete_refs(session.git, listed)
    assert await salvage.list_unmerged_work(session.git, "run1") == []
