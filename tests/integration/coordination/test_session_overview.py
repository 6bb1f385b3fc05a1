"""The sessions of a run, seen from outside: by Python and in the shell."""

from __future__ import annotations

import json
import signal

import pytest

from orchestrator import Council, RefusedError
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.sessions.contexts import SessionStatus
from orchestrator.engine.session_api.contexts import SessionContexts
from orchestrator.engine.session_api.notes import NoteStore
from orchestrator.locking.ownership import ownership_scope
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.command_server import StartedCommand
from tests.conftest import Repository
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest

TASKS = [{"id": name, "prompt": f"write {name}.txt x\nhang"} for name in ("auth", "web")]


def started(repository: Repository) -> tuple[StartedCommand, str]:
    """Start a run of two sessions that do not end; return its id once both are running."""
    child = repository.start("run", str(repository.configure(TASKS)))
    spawned = wait_for(lambda: repository.spawns.exists() and len(repository.spawns.read_text().splitlines()) == 2)
    assert spawned
    return child, str(repository.council("status", "--json").result["run"])


def ended(repository: Repository, child: StartedCommand) -> None:
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)


async def test_contexts_are_visible_from_outside(repository: Repository) -> None:
    """In the result, in text and in Python, with conflicts on files and a summary per task; removed with the run."""
    child, run = started(repository)
    try:
        async with (
            FileStore.open(repository.log, SystemClock()) as store,
            Council.open(repository.top, environ=repository.environ) as council,
        ):
            scope = ownership_scope(str(repository.top), "main")
            contexts = SessionContexts(store, SystemClock(), scope, Redactor(), orchestrator="o1")
            auth, web = SessionName(run, "auth", 1), SessionName(run, "web", 1)
            for one in (auth, web):
                await contexts.begin(one, "fake")
                await contexts.update(one, file="src/api.py")
            await contexts.update(auth, message="adds an endpoint", progress="50%")
            await contexts.update(web, status=SessionStatus.BLOCKED, message="needs it", blocked_on="the schema")
            assert {one.session: one.status for one in await council.sessions.list()} == {
                auth: SessionStatus.WORKING,
                web: SessionStatus.BLOCKED,
            }
            assert {path: len(found) for path, found in (await council.sessions.file_conflicts(run)).items()} == {
                "src/api.py": 2
            }
            assert (await council.sessions.summarize_task("web")).by_status[SessionStatus.BLOCKED] == 1
            with pytest.raises(RefusedError, match="has no task"):
                await council.sessions.summarize_task("nothing")
            report = await council.runs.status()
            assert [(one.task, one.file, one.progress) for one in report.sessions] == [
                ("auth", "src/api.py", "50%"),
                ("web", "src/api.py", None),
            ]
            text = repository.council("status").stdout
            assert "50%; src/api.py: adds an endpoint" in text
            assert "blocked on the schema; src/api.py: needs it" in text
            [reported] = [
                one for one in repository.council("status", "--json").result["sessions"] if one["task"] == "web"
            ]
            assert (reported["status"], reported["blocked_on"], reported["attempt"]) == ("blocked", "the schema", 1)
            assert await council.sessions.prune(0) == [f"{run}/auth.1", f"{run}/web.1"]
            assert await council.sessions.list() == []
    finally:
        ended(repository, child)
    assert repository.council("status", "--json").result["sessions"] == []


async def test_details_are_visible_from_outside(repository: Repository) -> None:
    child, run = started(repository)
    try:
        async with Council.open(repository.top, environ=repository.environ) as council:
            found = await council.sessions.details("auth", run)
            assert (found.task, found.attempt, found.stats.files, found.stats.added) == ("auth", 1, 1, 1)
            assert "+++ b/auth.txt" in found.diff
            with pytest.raises(RefusedError, match="has no task"):
                await council.sessions.details("nothing")
    finally:
        ended(repository, child)
    async with Council.open(repository.top, environ=repository.environ) as council:
        with pytest.raises(RefusedError, match="has no running session"):
            await council.sessions.details("auth", run)


async def test_notes_are_listed_and_dropped_from_outside(repository: Repository) -> None:
    """Those of all runs on the same target; they outlive the records of the runs."""
    tasks = [{"id": "a", "prompt": "write a.txt a"}]
    runs = []
    for _ in range(2):
        repository.council("run", str(repository.configure(tasks)))
        runs.append(str(repository.council("status", "--json").result["run"]))
    async with (
        FileStore.open(repository.log, SystemClock()) as store,
        Council.open(repository.top, environ=repository.environ) as council,
    ):
        memory = NoteStore(store, SystemClock(), ownership_scope(str(repository.top), "main"), Redactor())
        first = await memory.add(SessionName(runs[0], "a", 1), "of the first", topic="order", paths=["src/**"])
        second = await memory.add(SessionName(runs[1], "a", 1), "of the second")
        assert await council.notes.list() == await council.notes.list(runs[0], task="a") == [first, second]
        assert await council.notes.list(paths=["src/a.py"]) == await council.notes.list(topic="Order") == [first]
        third = await memory.add(SessionName(runs[1], "a", 1), "wrong")
        await council.notes.drop(third.id)
        for run in runs:
            await forget(council, run)
        assert await memory.all() == [first, second], "the next run on that target gets it"


async def test_notes_of_a_runs_own_branch_are_removed_with_its_record(repository: Repository) -> None:
    config = repository.configure([{"id": "a", "prompt": "write a.txt a"}])
    settings = json.loads(config.read_text())
    del settings["target"]
    config.write_text(json.dumps(settings))
    run = repository.council("run", str(config), "--json").result["run"]
    async with (
        FileStore.open(repository.log, SystemClock()) as store,
        Council.open(repository.top, environ=repository.environ) as council,
    ):
        memory = NoteStore(store, SystemClock(), ownership_scope(str(repository.top), f"council/{run}"), Redactor())
        note = await memory.add(SessionName(run, "a", 1), "x")
        assert await council.notes.list() == [note]
        await forget(council, run)
        assert await memory.all() == []
        [checkpoint] = await council.checkpoints.list(run)
        await council.checkpoints.restore(checkpoint.id)
        assert await council.notes.list() == [note]


async def forget(council: Council, run: str) -> None:
    """Remove the record of a run."""
    found = [one for one in await council.cleaner.find(runs=0) if one.kind == "run" and one.run == run]
    assert [one.error for one in await council.cleaner.remove(found)] == [None]


async def test_processes_and_their_claims_are_listed(repository: Repository) -> None:
    """Of a killed one and of the one that took over; the claim of a second attempt is a retry."""
    config = str(repository.configure([{"id": "a", "prompt": "attempt 1 exit 1\nwrite a.txt a"}]))
    assert repository.council("run", config, failpoints="session.spawned=kill").code == -signal.SIGKILL
    [killed] = repository.council("status", "--json").result["orchestrators"]
    assert (killed["role"], killed["ended"], killed["reason"]) == ("leader", None, None)
    assert repository.council("resume").code == 0
    reported = repository.council("status", "--json").result
    before, after = reported["orchestrators"]
    assert before["id"] == killed["id"] != after["id"]
    assert before["reason"].endswith("process exited")
    assert (after["reason"], after["ended"] >= after["heartbeat"] >= after["since"]) == (None, True)
    claims = reported["claims"]
    assert (claims["takeovers"], claims["conflicts"], claims["refused"]) == (1, 0, 0)
    assert claims["claims"] >= claims["takeovers"] + 1
    assert claims.keys() == {"claims", "conflicts", "renewals", "takeovers", "retries", "sweeps", "refused"}
