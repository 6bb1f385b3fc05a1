"""Notes of sessions on each store: searchable, bounded, part of checkpoints."""

from __future__ import annotations

import anyio
import pytest

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.security.secrets import REDACTED, Redactor
from orchestrator.domain.sessions import notes as bounds
from orchestrator.engine.session_api.notes import NoteStore
from orchestrator.errors import LeaseLost, RefusedError
from orchestrator.locking.ownership import claim_key
from orchestrator.protocols import Commit, Guard, Store, Write
from orchestrator.testing.clock import ManualClock

API, WEB = SessionName("r", "api", 1), SessionName("s", "web", 2)
SECRET = "hunter2hunter2"
SCOPE = "0123456789abcdef"


@pytest.fixture
def memory(store: Store, clock: ManualClock) -> NoteStore:
    """Return the notes of a scope."""
    return NoteStore(store, clock, SCOPE, Redactor([SECRET]))


async def test_notes_are_found_by_task_topic_and_path(memory: NoteStore, store: Store, clock: ManualClock) -> None:
    """Paths match overlapping patterns, topics ignore case, and all criteria must match."""
    first = await memory.add(API, "the port is 8080", topic="Set-up", paths=["src/api/**"])
    clock.advance(1)
    second = await memory.add(WEB, "run npm ci first", topic="set-up")
    assert await memory.all() == [first, second]
    assert await memory.find(task="api") == [first]
    assert await memory.find(topic="SET-UP") == [first, second]
    assert await memory.find(paths=["src/*/routes.py"]) == [first]
    assert await memory.find(topic="set-up", task="web", paths=["src"]) == []
    assert await memory.find_relevant("web", ["src/**"]) == [first, second]
    assert await memory.find_relevant("docs", ["docs/**"]) == []
    assert await NoteStore(store, clock, "another", Redactor()).all() == []
    with pytest.raises(RefusedError, match="invalid path pattern"):
        await memory.find(paths=["/etc"])
    assert (first.text, first.task, first.attempt, first.run) == ("the port is 8080", "api", 1, "r")


async def test_notes_above_the_limit_drop_the_oldest(
    memory: NoteStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scope has a maximum number of notes."""
    monkeypatch.setattr("orchestrator.engine.session_api.notes.MAX_NOTES", 3)
    for number in range(5):
        await memory.add(API, f"note {number}")
        clock.advance(0.002)
    assert [one.text for one in await memory.all()] == ["note 2", "note 3", "note 4"]


async def test_notes_above_the_limit_of_a_task_drop_its_own(
    memory: NoteStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task with too many notes drops none of other tasks."""
    monkeypatch.setattr("orchestrator.engine.session_api.notes.MAX_TASK_NOTES", 2)
    await memory.add(WEB, "of another")
    for number in range(5):
        clock.advance(0.002)
        await memory.add(API, f"note {number}")
    assert [one.text for one in await memory.all()] == ["of another", "note 3", "note 4"]


async def test_note_query_is_limited_to_what_notes_can_name(memory: NoteStore) -> None:
    """The cost of comparing two patterns grows with the length of both."""
    for paths, why in ((["a"] * 51, "51 paths"), (["*" * 1001], "1001 characters"), (["a" * 999] * 3, "2997 char")):
        with pytest.raises(RefusedError, match=why):
            await memory.find(paths=paths)


async def test_concurrent_notes_are_all_kept(memory: NoteStore) -> None:
    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(memory.add, API, f"note {number}")
    assert {one.text for one in await memory.all()} == {f"note {number}" for number in range(20)}


@pytest.mark.parametrize(
    ("text", "topic", "paths", "why"),
    [
        ("  \n", None, [], "the note is empty"),
        ("ä" * 2049, None, [], "4098 bytes .limit: 4096."),
        ("x", "t" * 101, [], "101 characters"),
        ("x", " ", [], "0 characters"),
        ("x", None, ["a"] * 51, "51 paths given .limit: 50."),
        ("x", None, ["a" * 1001], "1001 characters"),
        ("x", None, [f"{number}{'a' * 900}" for number in range(3)], "2703 characters .limit: 2000."),
        ("x", None, ["../a"], "invalid path pattern"),
    ],
)
async def test_oversized_note_is_rejected(
    memory: NoteStore, text: str, topic: str | None, paths: list[str], why: str
) -> None:
    """The error has the limit; nothing is stored."""
    with pytest.raises(RefusedError, match=why):
        await memory.add(API, text, topic=topic, paths=paths)
    assert await memory.all() == []


async def test_secrets_are_removed_and_the_largest_note_fits(memory: NoteStore) -> None:
    """Also from topics; invalid Unicode is replaced."""
    note = await memory.add(API, f"key {SECRET}\ud800", topic=f"about {SECRET}")
    assert (note.text, note.topic) == (f"key {REDACTED}?", f"about {REDACTED}")
    assert len((await memory.add(API, "x" * bounds.MAX_TEXT_BYTES)).text) == bounds.MAX_TEXT_BYTES


async def test_note_is_dropped_by_its_id(memory: NoteStore) -> None:
    """An unknown id is an error."""
    note = await memory.add(API, "wrong")
    await memory.drop(note.id)
    assert await memory.all() == []
    with pytest.raises(RefusedError, match=r"note .* not found"):
        await memory.drop(note.id)


async def test_note_by_a_fenced_session_is_rejected(memory: NoteStore, store: Store) -> None:
    """A note is written under the claim of its task."""
    await store.commit(Commit([Write(claim_key(API), 0, {"epoch": 2, "released": None})]))
    with pytest.raises(LeaseLost):
        await memory.add(API, "late", claim=Guard(claim_key(API), 1))
    await memory.add(API, "in time", claim=Guard(claim_key(API), 2))
    assert [one.text for one in await memory.all()] == ["in time"]
