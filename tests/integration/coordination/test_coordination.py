"""Parallel sessions on one repository: worktrees, locks, status updates, and all combined."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from orchestrator.domain.runs.model import PreparedMerge
from orchestrator.domain.sessions.contexts import SessionStatus, find_file_conflicts, summarize_task
from orchestrator.repo.landing.target_branch import Landed, Target
from orchestrator.repo.source.run_repository import find_run_repository
from orchestrator.repo.worktrees.hub import internal_ref_name
from tests.conftest import Repository
from tests.merge_leases import join_merge_queue
from tests.team import SessionTeam, open_team


async def target(team: SessionTeam) -> Target:
    """Return the branch that the sessions' work lands on."""
    site = await find_run_repository(str(team.yard.top), is_url=False, environ=team.environ)
    ref = internal_ref_name("run1", "target")
    source = site.source(team.yard.git)
    return Target(team.yard.hub, team.yard.git, source, branch="main", start=team.base, ref=ref)


async def test_create_session_worktree(repository: Repository, tmp_path: Path) -> None:
    """A session has the files of its base in a folder of its own, outside of the user's repository."""
    async with open_team(repository, tmp_path) as team:
        session = await team.join("auth")
        tree = team.tree(session)
        assert (tree / "README.md").read_text() == (team.yard.top / "README.md").read_text()
        assert not tree.is_relative_to(team.yard.top)
        assert (await team.context(session)).status is SessionStatus.WORKING
        await team.end(session)
        assert not team.yard.worktree("auth").root.exists()
        assert (await team.context(session)).status is SessionStatus.DONE


async def test_parallel_sessions_same_task(repository: Repository, tmp_path: Path) -> None:
    """Three attempts at one task do not see each other's files."""
    async with open_team(repository, tmp_path) as team:
        sessions = [await team.join("auth", attempt) for attempt in (1, 2, 3)]
        assert len({team.tree(one) for one in sessions}) == 3
        for one in sessions:
            team.write(one, "auth.py", f"attempt = {one.attempt}\n")
        for one in sessions:
            assert (team.tree(one) / "auth.py").read_text() == f"attempt = {one.attempt}\n"
        assert (summarize_task("auth", await team.contexts.all("run1"))).total == 3


async def test_commit_in_worktree(repository: Repository, tmp_path: Path) -> None:
    """A session's work is one commit of ours on top of its own commits, and is counted while it runs."""
    async with open_team(repository, tmp_path) as team:
        session = await team.join("auth")
        team.write(session, "auth.py", "one\ntwo\n")
        team.git(session, "add", "--all")
        team.git(session, "commit", "--quiet", "--message", "Add auth")
        team.write(session, "auth.py", "one\nthree\n")
        found = await team.ask(session, "ask", task="auth")
        assert found["stats"] == {"commits": 1, "files": 1, "added": 2, "removed": 0}
        collected = await team.collect(session)
        changes = await team.changes(collected)
        assert (changes.files, changes.added, changes.removed) == (1, 2, 0)
        history = await team.yard.git.line("rev-list", "--count", f"{team.base}..{collected.commit}")
        assert history == "2"


async def test_file_lock_acquisition(repository: Repository, tmp_path: Path) -> None:
    """The session holds a lock in both layers until it releases it."""
    async with open_team(repository, tmp_path) as team:
        session = await team.join("auth")
        assert await team.ask(session, "lock", paths=["src/api.py", "./src/../src/web.py"]) == {
            "locked": ["src/api.py", "src/web.py"]
        }
        assert [one.path for one in team.files.held(session)] == ["src/api.py", "src/web.py"]
        assert await team.owned() == {"auth.1": ("src/api.py", "src/web.py")}
        assert (await team.context(session)).files == ("src/api.py", "src/web.py")
        assert await team.ask(session, "unlock", paths=["src/api.py"]) == {"unlocked": ["src/api.py"]}
        assert await team.ask(session, "unlock", paths=["src/api.py"]) == {"unlocked": []}
        assert [one.path for one in team.files.held(session)] == ["src/web.py"]
        assert await team.owned() == {"auth.1": ("src/web.py",)}


async def test_lock_conflict_detection(repository: Repository, tmp_path: Path) -> None:
    """A second session gets the holder's name, and gets the lock when it is free."""
    async with open_team(repository, tmp_path) as team:
        first, second = await team.join("auth"), await team.join("web")
        await team.ask(first, "lock", paths=["src/api.py"])
        error = await team.refused(second, "lock", paths=["src/api.py"], wait=0)
        assert "task auth of run run1 owns src/api.py" in error
        assert await team.owned() == {"auth.1": ("src/api.py",)}
        got: list[object] = []

        async def wait() -> None:
            got.append(await team.ask(second, "lock", paths=["src/api.py"], wait=30))

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            while not (waiting := [one for one in await team.registry.holdings() if one.waiting is not None]):
                await anyio.sleep(0.01)
            assert [one.session for one in waiting] == [second]
            context = await team.context(second)
            assert (context.status, context.blocked_on) == (SessionStatus.WAITING, "src/api.py (held by auth)")
            await team.ask(first, "unlock", paths=["src/api.py"])
        assert got == [{"locked": ["src/api.py"]}]
        assert (await team.context(second)).status is SessionStatus.WORKING


async def test_merge_lock_coordination(repository: Repository, tmp_path: Path) -> None:
    """One session lands at a time; the second merges onto the first one's landing."""
    async with open_team(repository, tmp_path) as team:
        sessions = [await team.join(name) for name in ("auth", "web")]
        ready = []
        for one in sessions:
            team.write(one, f"{one.task}.py", "x\n")
            ready.append(str((await team.collect(one)).commit))
        branch, order = await target(team), list[str]()

        async def take_turn(name: str, commit: str) -> None:
            async with (await join_merge_queue(team.store, team.clock, str(team.yard.top), "main")).hold() as lease:
                order.append(f"{name} begins")
                merge = await branch.prepare(lease, f"run1/{name}", commit, team.base)
                assert isinstance(merge, PreparedMerge)
                assert isinstance(await branch.move(lease, [merge]), Landed)
                order.append(f"{name} ends")

        async with anyio.create_task_group() as group:
            for one, commit in zip(sessions, ready, strict=True):
                group.start_soon(take_turn, one.task, commit)
        assert [what.split()[1] for what in order] == ["begins", "ends"] * 2
        assert (team.yard.top / "auth.py").exists()
        assert (team.yard.top / "web.py").exists()


@pytest.mark.parametrize("progress", [50, "50", "50%"])
async def test_update_and_read_context(repository: Repository, tmp_path: Path, progress: int | str) -> None:
    """A session's status update is visible to the others, in any process."""
    async with open_team(repository, tmp_path) as team:
        first, second = await team.join("auth"), await team.join("web")
        await team.ask(
            first, "report", status="working", file="src/api.py", message="adds an endpoint", progress=progress
        )
        peers = (await team.ask(second, "peers"))["peers"]
        assert [(one["task"], one["is_me"]) for one in peers] == [("auth", False), ("web", True)]
        peer = {name: peers[0][name] for name in ("status", "file", "message", "progress", "adapter")}
        assert peer == {
            "status": "working",
            "file": "src/api.py",
            "message": "adds an endpoint",
            "progress": "50%",
            "adapter": "fixer",
        }


async def test_conflict_detection(repository: Repository, tmp_path: Path) -> None:
    """Two sessions that edit one file are in conflict, until one switches to another file."""
    async with open_team(repository, tmp_path) as team:
        first, second = await team.join("auth"), await team.join("web")
        await team.ask(first, "report", file="src/api.py")
        await team.ask(second, "report", file=str(team.tree(second) / "src/api.py"))
        found = find_file_conflicts(await team.contexts.all())
        assert {path: [one.task for one in sessions] for path, sessions in found.items()} == {
            "src/api.py": ["auth", "web"]
        }
        await team.ask(second, "report", file="src/web.py")
        assert find_file_conflicts(await team.contexts.all()) == {}


async def test_task_summary(repository: Repository, tmp_path: Path) -> None:
    async with open_team(repository, tmp_path) as team:
        sessions = [await team.join("auth", attempt) for attempt in (1, 2, 3)]
        await team.ask(sessions[0], "report", status="blocked", message="needs the schema", blocked_on="src/models.py")
        await team.end(sessions[1])
        await team.ask(sessions[2], "report", file="src/auth.py")
        found = summarize_task("auth", await team.contexts.all("run1"))
        assert found.by_status == {"working": 1, "blocked": 1, "waiting": 0, "done": 1}
        assert (found.total, found.files) == (3, ["src/auth.py"])


async def test_parallel_execution_workflow(repository: Repository, tmp_path: Path) -> None:
    """Several sessions lock, write, report and land concurrently; afterwards nothing is locked or lost."""
    async with open_team(repository, tmp_path) as team:
        branch = await target(team)

        async def work(number: int) -> None:
            session = await team.join(f"t{number}")
            own, shared = f"src/m{number}.py", "CHANGES"
            await team.ask(session, "lock", paths=[own, shared], wait=60)
            await team.ask(session, "report", file=own, message="writes it")
            team.write(session, own, f"n = {number}\n")
            await team.ask(session, "note", text=f"module {number} is there", paths=[own])
            await team.ask(session, "unlock", paths=[shared])
            commit = (await team.collect(session)).commit
            assert commit is not None
            async with (await join_merge_queue(team.store, team.clock, str(team.yard.top), "main")).hold() as lease:
                merge = await branch.prepare(lease, f"run1/t{number}", commit, team.base)
                assert isinstance(merge, PreparedMerge)
                assert isinstance(await branch.move(lease, [merge]), Landed)
            await team.end(session)

        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(work, number)
        assert sorted(path.name for path in (team.yard.top / "src").glob("m*.py")) == [f"m{one}.py" for one in range(4)]
        assert await team.owned() == {}
        assert team.files.held() == []
        assert {one.status for one in await team.contexts.all()} == {SessionStatus.DONE}
        assert len(await team.memory.find(paths=["src/**"])) == 4
