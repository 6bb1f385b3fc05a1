"""Session contexts on each store: written under claims, readable by all, expiring."""

from __future__ import annotations

import anyio
import pytest

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.security.secrets import REDACTED, Redactor
from orchestrator.domain.sessions.contexts import (
    STALE_CONTEXT_SECONDS,
    SessionStatus,
    find_file_conflicts,
    summarize_task,
)
from orchestrator.engine.session_api.contexts import SessionContexts, clean_contexts, context_key, read_contexts
from orchestrator.errors import LeaseLost, RefusedError
from orchestrator.locking.ownership import claim_key
from orchestrator.protocols import Commit, Guard, Store, Write
from orchestrator.state.documents.update import delete_expired
from orchestrator.testing.clock import ManualClock

API, WEB, OTHER = SessionName("r", "api", 1), SessionName("r", "web", 2), SessionName("s", "api", 1)
SECRET = "hunter2hunter2"
SCOPE = "0123456789abcdef"


@pytest.fixture
def contexts(store: Store, clock: ManualClock) -> SessionContexts:
    """Return the contexts of one process."""
    return SessionContexts(store, clock, SCOPE, Redactor([SECRET]), orchestrator="o1")


@pytest.fixture
def others(store: Store, clock: ManualClock) -> SessionContexts:
    """Return the contexts of another process on the same store."""
    return SessionContexts(store, clock, SCOPE, Redactor(), orchestrator="o2")


async def test_context_of_a_session_is_visible_to_all_processes(
    contexts: SessionContexts, others: SessionContexts, clock: ManualClock
) -> None:
    """An update keeps other fields; each has a time."""
    await contexts.begin(API, "fixer")
    clock.advance(5)
    await contexts.update(API, file="src/api.py", message="adds an endpoint", progress="50%")
    await contexts.update(API, status=SessionStatus.WORKING)
    found = next(one for one in await others.all() if one.session == API)
    assert (found.session, found.adapter, found.orchestrator) == (API, "fixer", "o1")
    assert (found.file, found.message, found.progress) == ("src/api.py", "adds an endpoint", "50%")
    assert (found.updated - found.started, found.status) == (5, SessionStatus.WORKING)
    await contexts.update(API, status=SessionStatus.BLOCKED, message="waits for the schema", blocked_on="src/models.py")
    found = next(one for one in await others.all() if one.session == API)
    assert (found.status, found.blocked_on, found.message) == ("blocked", "src/models.py", "waits for the schema")
    assert [one.session for one in await others.all("r")] == [API]
    assert await others.all("s") == []


async def test_context_conflict_is_a_file_in_several_sessions(
    contexts: SessionContexts, others: SessionContexts
) -> None:
    """Edited or locked files count, but not those of done sessions or other scopes."""
    await contexts.begin(API, "fixer")
    await others.begin(WEB, "fixer")
    await others.begin(OTHER, "fixer")
    await contexts.update(API, file="src/api.py")
    await others.hold(WEB, ["src/api.py", "src/web.py"])
    await others.update(OTHER, file="src/web.py", status=SessionStatus.DONE)
    assert {path: [one.task for one in on] for path, on in find_file_conflicts(await contexts.all()).items()} == {
        "src/api.py": ["api", "web"]
    }
    assert [one.session for one in await contexts.all() if one.is_on("src/web.py")] == [WEB]
    await others.end(WEB)
    assert find_file_conflicts(await contexts.all()) == {}


async def test_task_summary_has_the_context(contexts: SessionContexts) -> None:
    """Sessions by status, with their files."""
    sessions = [SessionName("r", "api", number) for number in (1, 2, 3)]
    for one in sessions:
        await contexts.begin(one, "fixer")
    await contexts.begin(WEB, "fixer")
    await contexts.update(sessions[0], file="b.py")
    await contexts.update(sessions[1], status=SessionStatus.BLOCKED, message="x", blocked_on="y")
    await contexts.hold(sessions[1], ["a.py"])
    await contexts.end(sessions[2])
    found = summarize_task("api", await contexts.all("r"))
    assert found.by_status == {"working": 1, "blocked": 1, "waiting": 0, "done": 1}
    assert (found.total, found.files) == (3, ["a.py", "b.py"])


async def test_context_status_is_restored_after_a_wait(contexts: SessionContexts) -> None:
    await contexts.begin(API, "fixer")
    await contexts.update(API, status=SessionStatus.BLOCKED, message="x", blocked_on="the schema")
    async with contexts.waiting(API, "src/a.py"):
        found = next(one for one in await contexts.all() if one.session == API)
        assert (found.status, found.blocked_on) == ("waiting", "src/a.py")
    found = next(one for one in await contexts.all() if one.session == API)
    assert (found.status, found.blocked_on) == ("blocked", "the schema")
    async with contexts.waiting(API, "src/a.py"):
        await contexts.update(API, status=SessionStatus.DONE)
    found = next(one for one in await contexts.all() if one.session == API)
    assert found.status == "done"


async def test_context_without_updates_expires_after_half_an_hour(
    contexts: SessionContexts, others: SessionContexts, store: Store, clock: ManualClock
) -> None:
    """Each update renews it, and an expired one returns with all its fields."""
    await contexts.begin(API, "fixer")
    await contexts.begin(WEB, "fixer")
    await contexts.update(API, message="long work")
    clock.advance(STALE_CONTEXT_SECONDS - 1)
    await contexts.update(WEB, progress="1 of 2")
    clock.advance(1)
    assert [one.session for one in await others.all()] == [WEB]
    assert await delete_expired(store) == [context_key(API)]
    await contexts.update(API, progress="90%")
    found = next(one for one in await others.all() if one.session == API)
    assert (found.message, found.progress) == ("long work", "90%")


async def test_old_contexts_are_removed_on_request(
    contexts: SessionContexts, others: SessionContexts, store: Store, clock: ManualClock
) -> None:
    """Older than requested or expired, of any owner."""
    await contexts.begin(API, "fixer")
    clock.advance(STALE_CONTEXT_SECONDS)
    await contexts.begin(WEB, "fixer")
    clock.advance(60)
    await contexts.begin(OTHER, "fixer")
    assert await clean_contexts(store, clock.now(), 61) == ["r/api.1"]
    assert await clean_contexts(store, clock.now(), 60) == ["r/web.2"]
    assert await clean_contexts(store, clock.now(), 0) == ["s/api.1"]
    assert await clean_contexts(store, clock.now(), 0) == []
    await contexts.update(OTHER, message="still there")
    assert [one.message for one in await others.all()] == ["still there"]


async def test_context_update_by_a_fenced_session_is_rejected(store: Store, clock: ManualClock) -> None:
    """A record is written under the claim of its task; the new owner ends the old record."""
    key = claim_key(API)
    await store.commit(Commit([Write(key, 0, {"epoch": 1, "released": None})]))
    old = SessionContexts(store, clock, SCOPE, Redactor(), orchestrator="o1", claim=lambda _: Guard(key, 1))
    await old.begin(API, "fixer")
    await store.commit(Commit([Write(key, 1, {"epoch": 2, "released": None})]))
    new = SessionContexts(store, clock, SCOPE, Redactor(), orchestrator="o2", claim=lambda _: Guard(key, 2))
    await new.end(API)
    with pytest.raises(LeaseLost):
        await old.update(API, message="am I here?")
    await old.end(API)
    found = next(one for one in await new.all() if one.session == API)
    assert (found.status, found.message) == ("done", None)
    await new.end(SessionName("r", "nobody", 1))
    assert len(await new.all()) == 1


async def test_context_text_of_programs_is_sanitized(contexts: SessionContexts) -> None:
    """Secrets are redacted, lone surrogates replaced, long messages truncated; unknown sessions are rejected."""
    await contexts.begin(API, "fixer")
    found = await contexts.update(API, message=f"uses {SECRET} \ud800 " + "x" * 600, progress="9" * 50)
    assert found.message is not None
    assert found.message.startswith(f"uses {REDACTED} ? xxx")
    assert (len(found.message), len(found.progress or "")) == (500, 40)
    assert (await contexts.record_activity(API, f"Bash curl {SECRET}", None)).seen == f"Bash curl {REDACTED}"
    with pytest.raises(RefusedError, match="not running here"):
        await contexts.update(WEB, message="x")


async def test_concurrent_context_updates_are_all_kept(
    contexts: SessionContexts, store: Store, clock: ManualClock
) -> None:
    """Updates of one session stay in order, and a concurrently deleted record is created again."""
    await contexts.begin(API, "fixer")

    async def say(number: int) -> None:
        await (contexts.update(API, progress=str(number)) if number % 2 else contexts.hold(API, [f"{number}.py"]))

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(say, number)
        group.start_soon(clean_contexts, store, clock.now(), 0)
    await contexts.update(API, message="last")
    [found] = await read_contexts(store, "r")
    assert (found.progress, found.files, found.message) == ("19", ("18.py",), "last")
