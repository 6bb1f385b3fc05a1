"""The session API: requests of a running session are answered, and rejected ones change nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.client.commands import MAX_HANDOFF_BYTES
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.scheduling.path_ownership import MAX_OWNED_CHARS, MAX_OWNED_PATTERNS
from orchestrator.domain.sessions.contexts import SessionStatus
from orchestrator.engine.session_api.details import MAX_DIFF_LENGTH
from orchestrator.engine.session_api.service import OVERHEAD, WriteQuota
from orchestrator.errors import RefusedError
from orchestrator.locking.file_locks import FileLocks
from orchestrator.locking.ownership import claim_key
from orchestrator.protocols import Commit, Guard, Write
from orchestrator.state.documents.log_reader import read_range
from orchestrator.testing.clock import ManualClock
from tests.conftest import Repository
from tests.team import SECRET, open_team


async def test_second_lock_of_a_file_is_rejected(repository: Repository, tmp_path: Path) -> None:
    """The session keeps its earlier locks, and gets no other path of the rejected request."""
    async with open_team(repository, tmp_path) as team:
        session = await team.join("auth")
        await team.ask(session, "lock", paths=["a.py"])
        assert "has already locked a.py" in await team.refused(session, "lock", paths=["a.py", "b.py"])
        assert await team.owned() == {"auth.1": ("a.py",)}
        assert [one.path for one in team.files.held(session)] == ["a.py"]
        assert await team.ask(session, "unlock", paths=["a.py"]) == {"unlocked": ["a.py"]}
        assert await team.owned() == {}


async def test_lock_without_a_timeout_waits_as_configured(repository: Repository, tmp_path: Path) -> None:
    """Without a configured timeout it is rejected at once, and never listed as a waiter."""
    async with open_team(repository, tmp_path) as gathered:
        team = replace(gathered, lock_timeout=0.0)
        first, second = await team.join("auth"), await team.join("web")
        await team.ask(first, "lock", paths=["a.py"])
        position = await team.store.position()
        assert "owns a.py" in await team.refused(second, "lock", paths=["a.py"])
        records = [one async for one in read_range(team.store, position, await team.store.position())]
        assert [event.type for one in records for event in one.events] == []


async def test_paths_owned_from_the_start_stay_owned(repository: Repository, tmp_path: Path) -> None:
    """A lock and its release take no declared ownership away."""
    async with open_team(repository, tmp_path) as team:
        session = await team.join("auth", owns=["src/**", "a.py"])
        await team.ask(session, "lock", paths=["a.py", "src/api.py", "b.py"])
        await team.ask(session, "unlock", paths=["a.py", "src/api.py", "b.py"])
        assert await team.owned() == {"auth.1": ("src/**", "a.py")}


async def test_names_with_special_characters_are_literal(repository: Repository, tmp_path: Path) -> None:
    async with open_team(repository, tmp_path) as team:
        first, second = await team.join("auth"), await team.join("web")
        await team.ask(first, "lock", paths=["src/[id].tsx", "src/*.py"])
        assert await team.ask(second, "lock", paths=["src/i.tsx", "src/a.py"], wait=0)
        assert "owns src/[[]id].tsx" in await team.refused(second, "lock", paths=["src/[id].tsx"], wait=0)
        assert await team.ask(first, "lock", paths=["back\\slash"]) == {"locked": ["back\\slash"]}
        assert "owns back?slash" in await team.refused(second, "lock", paths=["back\\slash"], wait=0)


async def test_locks_of_a_session_are_limited(repository: Repository, tmp_path: Path) -> None:
    """Each lock rewrites the session record. Released locks make room; other sessions are not limited."""
    async with open_team(repository, tmp_path) as team:
        first, second = await team.join("auth"), await team.join("web")
        for number in range(0, MAX_OWNED_PATTERNS, 200):
            paths = [f"{number + one}" for one in range(200)]
            await team.ask(first, "lock", paths=paths)
        assert f"limits per session: {MAX_OWNED_PATTERNS} and {MAX_OWNED_CHARS}" in await team.refused(
            first, "lock", paths=["more"]
        )
        assert len(team.files.held(first)) == MAX_OWNED_PATTERNS
        assert await team.ask(first, "unlock", paths=["2"])
        assert await team.ask(first, "lock", paths=["3000"])
        assert await team.ask(second, "lock", paths=["more", "2"])
        assert "characters" in await team.refused(second, "lock", paths=[f"long{n}/{'x' * 3000}" for n in range(100)])


async def test_lock_rejected_by_the_second_layer_is_undone_in_the_first(repository: Repository, tmp_path: Path) -> None:
    """The file is locked by an owner unknown to the registry, such as a session on another target."""
    async with open_team(repository, tmp_path) as team:
        session, other = await team.join("auth"), FileLocks(team.folder / "locks", team.clock)
        stranger = session._replace(task="stranger")
        await other.acquire(stranger, ["b.py"])
        assert "b.py is locked by run1/stranger.1" in await team.refused(
            session, "lock", paths=["a.py", "b.py"], wait=0
        )
        assert await team.owned() == {}
        assert team.files.held() == []
        async with anyio.create_task_group() as group:
            group.start_soon(team.session_service.handle, session, "lock", {"paths": ["a.py", "b.py"], "wait": 30})
            while (await team.context(session)).status is not SessionStatus.WAITING:
                await anyio.sleep(0.01)
            holder = f"run1/stranger.1 (process {other.held()[0].pid})"
            assert (await team.context(session)).blocked_on == f"b.py (held by {holder})"
            await other.release_all(stranger)
        assert (await team.context(session)).files == ("a.py", "b.py")
        assert await team.owned() == {"auth.1": ("a.py", "b.py")}


async def test_interrupted_wait_leaves_nothing(repository: Repository, tmp_path: Path) -> None:
    """Neither a lock nor a waiter; the session record is unchanged."""
    async with open_team(repository, tmp_path) as team:
        first, second = await team.join("auth"), await team.join("web")
        await team.ask(first, "lock", paths=["a.py"])
        await team.ask(second, "report", status="blocked", blocked_on="the schema")
        async with anyio.create_task_group() as group:
            group.start_soon(team.session_service.handle, second, "lock", {"paths": ["a.py", "b.py"], "wait": 60})
            while not any(one.waiting for one in await team.registry.holdings()):
                await anyio.sleep(0.01)
            group.cancel_scope.cancel()
        assert [one.session for one in await team.registry.holdings()] == [first]
        found = await team.context(second)
        assert (found.status, found.blocked_on) == (SessionStatus.BLOCKED, "the schema")
        await team.ask(first, "unlock", paths=["a.py"])
        assert await team.ask(second, "lock", paths=["a.py"], wait=0) == {"locked": ["a.py"]}


async def test_locks_end_with_the_session(repository: Repository, tmp_path: Path) -> None:
    """Locks and waits, but not the ownership of its task; a second end is no error, and later requests are rejected."""
    async with open_team(repository, tmp_path) as team:
        first, second = await team.join("auth", owns=["src/**"]), await team.join("web")
        await team.ask(first, "lock", paths=["a.py"])
        await team.session_service.leave(first)
        await team.session_service.leave(first)
        assert await team.owned() == {"auth.1": ("src/**", "a.py")}
        assert team.files.held() == []
        found = await team.context(first)
        assert (found.status, found.files) == (SessionStatus.DONE, ())
        assert "session run1/auth.1 has ended" in await team.refused(first, "peers")
        assert [one["task"] for one in (await team.ask(second, "peers"))["peers"]] == ["web"]
        assert "auth" in await team.refused(second, "lock", paths=["src/api.py"], wait=0)


async def test_edit_of_a_file_owned_by_another_session_is_denied(repository: Repository, tmp_path: Path) -> None:
    """By any name of the file; unowned files and files outside of the repository may be edited."""
    async with open_team(repository, tmp_path) as team:
        first, second = await team.join("auth", owns=["src/**"]), await team.join("web")
        tree = team.tree(second)
        (tree / "link").symlink_to("src")
        for path in ("src/api.py", str(tree / "src/api.py"), "link/api.py", "docs/../src/new.py"):
            reported = await team.ask(second, "check_edit", path=path)
            assert (reported["allowed"], reported["owner"]) == (False, str(first)), path
            assert "task auth of run run1 owns src/**" in reported["reason"]
            assert reported["since"] <= team.clock.now()
        for session, path in ((second, "docs/a.md"), (second, "/etc/hosts"), (second, "../x"), (first, "src/api.py")):
            reported = await team.ask(session, "check_edit", path=path)
            expected = {"allowed": True, "owner": None, "since": None, "reason": None, "warning": None}
            assert reported == expected, path
        again = await team.join("auth", 2)
        assert (await team.ask(again, "check_edit", path="src/api.py"))["allowed"], "attempts of one task share"


async def test_predicted_conflict_is_reported_once_at_the_next_edit(repository: Repository, tmp_path: Path) -> None:
    """And as long as it exists in the record of the session."""
    async with open_team(repository, tmp_path) as team:
        session = await team.join("auth")
        await team.session_service.record_conflicts(session, {"web": ["a.py"]}, "conflict ahead")
        warnings = [(await team.ask(session, "check_edit", path="b.py"))["warning"] for _ in range(2)]
        assert warnings == ["conflict ahead", None]
        [context] = await team.contexts.all()
        assert context.conflicts == {"web": ("a.py",)}
        await team.session_service.record_conflicts(session, {"web": ["a.py"]}, "again")
        await team.session_service.record_conflicts(session, {}, None)
        assert (await team.ask(session, "check_edit", path="b.py"))["warning"] is None, "resolved before the edit"
        [context] = await team.contexts.all()
        assert context.conflicts == {}


async def test_details_are_available_while_a_session_runs(repository: Repository, tmp_path: Path) -> None:
    """The plan, the current diff, the last output and metrics, without secrets; the session is not disturbed."""
    async with open_team(repository, tmp_path) as team:
        session, asker = await team.join("auth"), await team.join("web")
        team.write(session, "src/auth.py", f"one\ntwo\nkey = '{SECRET}'\n")
        team.write(session, "README.md", "shorter\n")
        team.says(session, {"type": "text", "text": "1. write the model\n2. write the API"})
        edit = {"file_path": str(team.tree(session) / "src/auth.py"), "content": SECRET}
        team.says(session, {"type": "tool_use", "name": "Write", "input": edit})
        team.says(session, {"type": "text", "text": f"Done with {SECRET}."})
        found = await team.ask(asker, "ask", task="auth")
        assert set(found) == {"task", "attempt", "status", "plan", "diff", "log", "handoffs", "stats"}
        assert (found["task"], found["attempt"], found["status"], found["handoffs"]) == ("auth", 1, "working", [])
        assert found["plan"] == "1. write the model\n2. write the API"
        assert "+shorter" in found["diff"]
        assert "# left out: 'src/auth.py'" in found["diff"]
        assert found["log"].endswith("src/auth.py\nDone with [redacted].\n")
        assert SECRET not in str(found)
        assert (found["stats"]["files"], found["stats"]["added"], found["stats"]["commits"]) == (1, 1, 0)
        team.write(session, "src/large.py", "x\n" * 40_000)
        found = await team.ask(asker, "ask", task="auth")
        assert len(found["diff"]) <= MAX_DIFF_LENGTH + 100
        assert found["diff"].endswith("more characters omitted\n")
        assert "has no running session" in await team.refused(asker, "ask", task="docs")


async def test_program_output_updates_the_activity(repository: Repository, tmp_path: Path) -> None:
    """Without a request of the session: its last action, and the changed file."""
    async with open_team(repository, tmp_path) as team:
        session = await team.join("auth")
        tree = team.tree(session)

        def used(name: str, **given: str) -> dict[str, Any]:
            return {"type": "tool_use", "name": name, "input": given}

        async with team.session_service.serve_session(session, "fixer", team.workplace(session)):
            team.says(session, used("Read", file_path=str(tree / "README.md")))
            team.says(session, used("Edit", file_path=str(tree / "src/api.py")), used("Bash", command=f"echo {SECRET}"))
            with anyio.fail_after(20):
                while (found := await team.context(session)).seen is None:
                    await anyio.sleep(0.01)
            assert (found.file, found.seen, found.words) == (
                "src/api.py",
                "Bash echo [redacted]",
                "Bash echo [redacted]",
            )
            await team.ask(session, "report", message="tries it out")
            assert (await team.context(session)).words == "tries it out"
        assert (await team.context(session)).status is SessionStatus.DONE


async def test_notes_are_added_and_found(repository: Repository, tmp_path: Path) -> None:
    """By any session of the same target; filtered by task, topic and paths."""
    async with open_team(repository, tmp_path) as team:
        first, second = await team.join("auth"), await team.join("web")
        left = await team.ask(first, "note", text="the port is 8080", topic="set-up", paths=["src/api/**"])
        [note] = (await team.ask(second, "notes", paths=["src/**"]))["notes"]
        assert set(note) == {"id", "task", "topic", "paths", "text", "time"}
        assert (note["id"], note["task"], note["text"]) == (left["id"], "auth", "the port is 8080")
        assert (await team.ask(second, "notes", task="web"))["notes"] == []
        assert (await team.ask(second, "notes", topic="Set-Up"))["notes"] == [note]
        assert (await team.ask(second, "notes"))["notes"] == [note]  # whichever session left it
        assert "the note is empty" in await team.refused(first, "note", text=" ")


async def test_slow_requests_are_answered_one_at_a_time(repository: Repository, tmp_path: Path) -> None:
    """A session with many requests delays only itself."""
    async with open_team(repository, tmp_path) as team:
        session = await team.join("auth")
        for number in range(5):
            await team.ask(session, "note", text="x", paths=["*a" * 200 + str(number)])
        done: list[float] = []
        others = 0

        async def look() -> None:
            await team.ask(session, "notes", paths=["*a" * 200 + "?"])
            done.append(anyio.current_time())

        begin = anyio.current_time()
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(look)
            while len(done) < 3:
                await anyio.sleep(0)
                others += 1
        assert done[0] - begin < (done[-1] - begin) * 0.75  # one third, or all three at the end
        assert others > 500


async def test_session_of_a_taken_over_task_is_asked_to_end(repository: Repository, tmp_path: Path) -> None:
    async with open_team(repository, tmp_path) as team:
        session = await team.join("auth")
        key = claim_key(session)
        await team.store.commit(Commit([Write(key, 1, {"epoch": 2, "released": None})]))
        for command, arguments in (
            ("lock", {"paths": ["a.py"]}),
            ("report", {"message": "x"}),
            ("note", {"text": "x"}),
        ):
            reported = await team.refused(session, command, **arguments)
            assert reported.startswith("task auth was taken over by another process: stop working"), command
        assert team.files.held() == []
        assert await team.memory.all() == []
        await team.session_service.leave(session)
        assert (await team.context(session)).message is None


async def test_session_of_a_taken_over_task_is_rejected_later_too(repository: Repository, tmp_path: Path) -> None:
    """The log shows the claim of another process, or a new claim of its own: neither is the session's."""
    async with open_team(repository, tmp_path) as team:
        session = await team.join("auth")
        await team.ask(session, "lock", paths=["a.py"])
        await team.store.commit(Commit([Write(claim_key(session), 1, {"epoch": 2, "released": None})]))
        for now in (None, Guard(claim_key(session), 2)):
            team.claims.pop(session)
            if now is not None:
                team.claims[session] = now
            for command, arguments in (
                ("lock", {"paths": ["b.py"]}),
                ("report", {"message": "x"}),
                ("note", {"text": "x"}),
            ):
                reported = await team.refused(session, command, **arguments)
                assert reported.startswith("task auth was taken over by another process: stop working"), (command, now)
            team.claims[session] = Guard(claim_key(session), 2)
        assert await team.memory.all() == []
        assert (await team.context(session)).message is None
        await team.session_service.leave(session)
        assert team.files.held() == []
        assert await team.owned() == {}


@pytest.mark.parametrize(
    ("command", "arguments", "why"),
    [
        ("fly", {}, "unknown command 'fly'"),
        ("lock", {}, "paths: field required"),
        ("lock", {"paths": []}, "paths"),
        ("lock", {"paths": ["a"], "wait": 1e9}, "wait"),
        ("lock", {"paths": ["a"], "wait": float("nan")}, "wait"),
        ("lock", {"paths": ["../a"]}, "outside"),
        ("lock", {"paths": ["."]}, "outside"),
        ("report", {"status": "asleep"}, "status"),
        ("report", {"file": "/etc/passwd"}, "outside the repository"),
        ("peers", {"run": "x"}, "run"),
        ("ask", {"task": 5}, "task"),
    ],
)
async def test_invalid_request_is_rejected(
    repository: Repository, tmp_path: Path, command: str, arguments: dict[str, Any], why: str
) -> None:
    async with open_team(repository, tmp_path) as team:
        session = await team.join("auth")
        with pytest.raises(RefusedError, match=why):
            await team.session_service.handle(session, command, arguments)
        assert team.files.held() == []


async def test_sessions_share_values(repository: Repository, tmp_path: Path) -> None:
    """From any session; a waiting reader is listed, and its timeout reported."""
    async with open_team(repository, tmp_path) as team:
        first, second = await team.join("auth"), await team.join("web")
        assert "no shared value api/port" in await team.refused(second, "share_get", key="api/port")
        assert "within 0 s" in await team.refused(second, "share_wait", key="api/port", timeout=0)
        got: list[Any] = []

        async def wait() -> None:
            got.append(await team.ask(second, "share_wait", key="api/port", timeout=60))

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            while (await team.context(second)).status is not SessionStatus.WAITING:
                await anyio.sleep(0.01)
            assert (await team.context(second)).blocked_on == "the shared value api/port"
            assert await team.ask(first, "share_put", key="api/port", value=SECRET) == {"key": "api/port", "version": 1}
        assert (await team.context(second)).status is SessionStatus.WORKING
        (reported,) = got
        assert (reported["value"], reported["version"], reported["writer"]) == ("[redacted]", 1, str(first))
        assert await team.ask(second, "share_get", key="api/port") == reported
        assert "at version 1, not at version 4" in await team.refused(
            second, "share_put", key="api/port", value=1, if_version=4
        )
        listed = (await team.ask(second, "share_list", prefix="api"))["shared"]
        assert [(one["key"], one["version"], one["writer"]) for one in listed] == [("api/port", 1, str(first))]
        assert await team.ask(second, "share_list", prefix="web") == {"shared": []}


async def test_session_of_a_taken_over_task_shares_nothing(repository: Repository, tmp_path: Path) -> None:
    async with open_team(repository, tmp_path) as team:
        session = await team.join("auth")
        key = claim_key(session)
        await team.store.commit(Commit([Write(key, 1, {"epoch": 9, "released": None})]))
        assert "taken over" in await team.refused(session, "share_put", key="k", value=1)
        assert await team.ask(session, "share_list") == {"shared": []}


async def test_handoff_is_validated_immediately(repository: Repository, tmp_path: Path) -> None:
    """Mistakes are reported so that the session can fix them; the last valid one counts, without secrets."""
    validated: list[Any] = []

    async def takes(data: dict[str, Any]) -> list[str]:
        validated.append(data)
        return [] if "summary" in data else ["summary: there is none", "tasks: there are none"]

    async with open_team(repository, tmp_path) as team:
        session = await team.join("auth")
        assert "no result to submit" in await team.refused(session, "submit_handoff", data={"summary": "x"})
        await team.session_service.enter(session, "fixer", team.workplace(session), validate_handoff=takes)
        assert team.session_service.submitted_handoff(session) is None
        said = await team.refused(session, "submit_handoff", data={})
        assert said.endswith(":\n- summary: there is none\n- tasks: there are none")
        assert "not valid: fix these errors" in said
        assert team.session_service.submitted_handoff(session) is None
        assert (await team.ask(session, "submit_handoff", data={"summary": "a"}))["size"] == len('{"summary":"a"}')
        await team.ask(session, "submit_handoff", data={"summary": f"key {SECRET}"})
        assert team.session_service.submitted_handoff(session) == validated[-1] == {"summary": "key [redacted]"}
        await team.refused(session, "submit_handoff", data={"worse": 1})
        large = {"summary": "x" * (MAX_HANDOFF_BYTES - len('{"summary":""}'))}
        assert f"{MAX_HANDOFF_BYTES + 1} bytes" in await team.refused(
            session, "submit_handoff", data={"summary": large["summary"] + "x"}
        )
        assert team.session_service.submitted_handoff(session) == {"summary": "key [redacted]"}
        await team.ask(session, "submit_handoff", data=large)
        assert team.session_service.submitted_handoff(session) == large
        await team.session_service.leave(session)
        assert team.session_service.submitted_handoff(session) is None


# Secrets


async def test_recorded_text_of_a_session_has_no_secret(repository: Repository, tmp_path: Path) -> None:
    """Neither in a note's subject or topic, nor in a key waited for; a path with a secret can't be locked."""
    async with open_team(repository, tmp_path) as team:
        session = await team.join("auth")
        await team.ask(session, "note", text=f"is {SECRET}", topic=SECRET, paths=[f"src/{SECRET}/**", f"{SECRET}.py"])
        await team.ask(session, "report", message=SECRET, progress=SECRET, blocked_on=f"on {SECRET}")
        (team.tree(session) / "link").symlink_to(SECRET)
        for path in (f"{SECRET}.py", f"src/{SECRET}/a.py", "link"):
            assert "contains a secret" in await team.refused(session, "lock", paths=["a.py", path])
            assert "contains a secret" in await team.refused(session, "report", file=path)
            await team.refused(session, "unlock", paths=[path])
        await team.refused(session, "share_put", key=f"api/{SECRET}", value=1)
        await team.refused(session, "share_wait", key=SECRET, timeout=0)
        await team.ask(session, "share_put", key="a", value={SECRET: [SECRET]})
        await team.refused(session, "ask", task=SECRET)
        await team.ask(session, "check_edit", path=f"{SECRET}.py")
        assert await team.owned() == {}
    state = b"".join(path.read_bytes() for path in (tmp_path / "team" / "state").rglob("*") if path.is_file())
    assert b"[redacted]" in state
    assert SECRET.encode() not in state
    locks = [path.name for path in (tmp_path / "team").rglob("*")]
    assert not any(SECRET in name for name in locks)


# Limits of writes per session


async def test_endless_sharing_is_rejected(repository: Repository, tmp_path: Path) -> None:
    """Its log grows by a few megabytes at most; other sessions continue, and it may share again after a while."""
    async with open_team(repository, tmp_path) as gathered:
        clock = ManualClock()
        team = replace(gathered, clock=clock)
        first, second = await team.join("auth"), await team.join("web")
        value = "x" * 200_000
        for _ in range(20):
            await team.ask(first, "share_put", key="a", value=value)
        assert "64 KiB of state per second" in await team.refused(first, "share_put", key="a", value=value)
        assert await team.ask(second, "share_put", key="b", value=1)
        clock.advance(10)
        assert await team.ask(first, "share_put", key="a", value=value)


@pytest.mark.parametrize("command", ["note", "report", "unlock"])
async def test_many_small_requests_are_rejected(repository: Repository, tmp_path: Path, command: str) -> None:
    async with open_team(repository, tmp_path) as gathered:
        team = replace(gathered, clock=ManualClock())
        session = await team.join("auth")
        words: dict[str, Any] = {"note": {"text": "x"}, "report": {"message": "x"}, "unlock": {"paths": ["a"]}}
        quota = WriteQuota(team.clock, {"burst": 50_000, "rate": 1 << 10, "session": 1 << 20, "run": 1 << 20})
        team.session_service._quota = quota
        for _ in range(12):
            await team.ask(session, command, **words[command])
        assert "1 KiB of state per second" in await team.refused(session, command, **words[command])


def test_session_and_run_have_total_limits() -> None:
    """However slowly it writes; the limit of a run includes its ended sessions."""
    clock = ManualClock()
    mib = 1 << 20
    quota = WriteQuota(clock, {"burst": mib, "rate": mib, "session": 2 * mib, "run": 3 * mib})
    written = 0

    def write(session: SessionName) -> None:
        nonlocal written
        while True:
            quota.charge(session, 100_000)
            written += 1
            clock.advance(10)

    with pytest.raises(RefusedError, match="this session has reached its limit of 2 MiB"):
        write(SessionName("r", "a", 1))
    quota.close(SessionName("r", "a", 1))
    with pytest.raises(RefusedError, match="the sessions of run r have reached their limit of 3 MiB"):
        write(SessionName("r", "b", 1))
    assert written == 3 * mib // (100_000 + OVERHEAD)
    quota.charge(SessionName("other", "b", 1), 1)
