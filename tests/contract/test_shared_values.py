"""Shared values on each store: versioned, awaitable, bounded, fenced."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from orchestrator.client.commands import MAX_SHARED_BYTES
from orchestrator.client.strict_json import MAX_DEPTH
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.security.secrets import REDACTED, Redactor
from orchestrator.engine.session_api.shared_values import KIND, MAX_KEY_LENGTH, SharedValue, SharedValues
from orchestrator.errors import LeaseLost, RefusedError
from orchestrator.locking.ownership import claim_key
from orchestrator.protocols import Commit, Guard, Key, Store, Write
from orchestrator.state.documents.log_reader import read_range
from orchestrator.testing.clock import ManualClock

API, WEB = SessionName("r", "api", 1), SessionName("r", "web", 2)
SECRET = "hunter2hunter2"
PATIENT = 30  # seconds for an immediate effect


@pytest.fixture
def sharing(store: Store, clock: ManualClock) -> SharedValues:
    """Return the shared values of a run."""
    return SharedValues(store, clock, Redactor([SECRET]), "r")


async def test_shared_value_is_readable_by_all_sessions(
    sharing: SharedValues, store: Store, clock: ManualClock
) -> None:
    """With version, author and time; other runs cannot read it."""
    await sharing.put("api/port", 8080, writer=API)
    clock.advance(1)
    put = await sharing.put("api/port", {"ports": [8081, None]}, writer=WEB)
    assert put == SharedValue("api/port", 2, {"ports": [8081, None]}, "r/web.2", clock.now())
    assert await sharing.get("api/port") == put
    assert await sharing.get("api") is None
    assert await SharedValues(store, clock, Redactor(), "s").get("api/port") is None
    await sharing.put("done", None)
    listed = await sharing.list()
    assert [(one.key, one.version, one.size, one.writer) for one in listed] == [
        ("api/port", 2, len('{"ports":[8081,null]}'), "r/web.2"),
        ("done", 1, 4, None),
    ]
    assert [one.key for one in await sharing.list("api/")] == ["api/port"]


async def test_put_event_has_no_value(sharing: SharedValues, store: Store) -> None:
    await sharing.put("api/port", 8080, writer=API)
    await sharing.put("api/port", 8081)
    events = [event async for record in read_range(store, 0, await store.position()) for event in record.events]
    assert [event.type for event in events] == ["shared.put"] * 2
    assert events[0].data == {"run": "r", "task": "api", "attempt": 1, "key": "api/port"}
    assert events[1].data == {"run": "r", "task": None, "attempt": None, "key": "api/port"}


async def test_put_with_an_outdated_version_overwrites_nothing(sharing: SharedValues) -> None:
    """Of several puts on one version one succeeds; unconditional ones all do."""
    await sharing.put("count", 0, if_version=0)
    done: list[int] = []
    refused: list[str] = []

    async def count(number: int) -> None:
        try:
            await sharing.put("count", number, if_version=1)
        except RefusedError as error:
            refused.append(error.message)
        else:
            done.append(number)

    async with anyio.create_task_group() as group:
        for number in range(1, 6):
            group.start_soon(count, number)
    found = await sharing.get("count")
    assert found is not None
    assert (found.version, [found.value]) == (2, done)
    assert refused == ["count is at version 2, not at version 1"] * 4
    with pytest.raises(RefusedError, match="is at version 2, but was expected to be new"):
        await sharing.put("count", 9, if_version=0)
    with pytest.raises(RefusedError, match="other has no value, not at version 1"):
        await sharing.put("other", 9, if_version=1)


async def test_concurrent_puts_all_count(sharing: SharedValues) -> None:
    """Each creates a version."""
    made: list[int] = []

    async def put(number: int) -> None:
        made.append((await sharing.put("k", number)).version)

    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(put, number)
    assert sorted(made) == [1, 2, 3, 4]


class AwaitedClock(ManualClock):
    """A clock that reports waiters."""

    def __init__(self) -> None:
        super().__init__()
        self.awaited = anyio.Event()

    async def wait(self, event: anyio.Event, until: float | None) -> None:
        """Report the waiter and wait."""
        self.awaited.set()
        await super().wait(event, until)


async def test_waiter_is_woken_by_the_next_version(sharing: SharedValues, store: Store) -> None:
    """Only by a put; an existing newer version is returned at once."""
    got: list[SharedValue | None] = []
    clock = AwaitedClock()

    async def wait(after: int | None) -> None:
        got.append(await SharedValues(store, clock, Redactor(), "r").wait("k", after=after))

    with anyio.fail_after(PATIENT):
        async with anyio.create_task_group() as group:
            group.start_soon(wait, None)
            await clock.awaited.wait()
            await sharing.put("other", 1)
            first = await sharing.put("k", "one", writer=API)
    assert got == [first]
    assert await sharing.wait("k", timeout=0) == first
    clock.awaited = anyio.Event()
    with anyio.fail_after(PATIENT):
        async with anyio.create_task_group() as group:
            group.start_soon(wait, 1)
            await clock.awaited.wait()
            second = await sharing.put("k", "two", writer=WEB)
    assert got == [first, second]


async def test_chain_of_sessions_can_use_one_key(sharing: SharedValues) -> None:
    """Each takes the value of the one before it, in order, regardless of who waited first."""
    made: list[Any] = []

    async def step(number: int) -> None:
        before = await sharing.wait("chain", after=number - 1)
        assert before is not None
        made.append(before.value)
        await sharing.put("chain", [*before.value, number], if_version=before.version)

    with anyio.fail_after(PATIENT):
        async with anyio.create_task_group() as group:
            for number in (3, 1, 2):
                group.start_soon(step, number)
            await sharing.put("chain", [0])
    assert made == [[0], [0, 1], [0, 1, 2]]


async def test_wait_without_a_value_times_out(store: Store) -> None:
    """Half a minute by default."""
    got: list[SharedValue | None] = []
    clock = AwaitedClock()
    sharing = SharedValues(store, clock, Redactor(), "r")

    async def wait() -> None:
        got.append(await sharing.wait("k"))

    assert await sharing.wait("k", timeout=0) is None
    with anyio.fail_after(PATIENT):
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await clock.awaited.wait()
            clock.advance(29)
            await anyio.wait_all_tasks_blocked()
            assert got == []
            clock.advance(1)
    assert got == [None]


@pytest.mark.parametrize("key", ["", "/", "a/", "/a", "a//b", "../a", "a b", "a*", "ä", "x.lock", "a/" * 101 + "a"])
async def test_invalid_key_is_rejected(sharing: SharedValues, key: str) -> None:
    """By every function with a key."""
    for refused in (sharing.put(key, 1), sharing.get(key), sharing.wait(key, timeout=0)):
        with pytest.raises(RefusedError, match="invalid key for a shared value"):
            await refused
    assert await sharing.list() == []


async def test_longest_key_is_accepted(sharing: SharedValues) -> None:
    """With several parts."""
    key = "/".join(["a" * 49] * 4) + "b"
    assert len(key) == MAX_KEY_LENGTH
    assert (await sharing.put(key, 1)).key == key


async def test_secrets_are_neither_keys_nor_values(sharing: SharedValues) -> None:
    """Field names are also redacted."""
    put = await sharing.put("k", {SECRET: [f"key {SECRET}"]})
    assert put.value == {REDACTED: [f"key {REDACTED}"]}
    assert await sharing.get("k") == put
    with pytest.raises(RefusedError, match="contains a secret"):
        await sharing.put(SECRET, 1)


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("x" * (MAX_SHARED_BYTES - 1), f"{MAX_SHARED_BYTES + 1} bytes .limit: {MAX_SHARED_BYTES}."),
        ("ä" * (MAX_SHARED_BYTES // 2), "limit"),
        (float("inf"), "infinite"),
        (["\ud800"], "can't share the value"),
        ("a\0b", r"U\+0000"),
        ({1: 2}, "can't share the value"),
        (1 << 70, "can't share the value"),
        (_nested(MAX_DEPTH + 1), "nested more than"),
        (_nested(5000), "can't share the value"),
        (object(), "can't share the value"),
    ],
    ids=range(10),
)
async def test_oversized_value_is_rejected(sharing: SharedValues, value: Any, why: str) -> None:
    """Nothing is stored."""
    with pytest.raises(RefusedError, match=why):
        await sharing.put("k", value)
    assert await sharing.get("k") is None


async def test_largest_and_deepest_value_is_accepted(sharing: SharedValues) -> None:
    """Unchanged."""
    for value in ("x" * (MAX_SHARED_BYTES - 2), _nested(MAX_DEPTH)):
        await sharing.put("k", value)
        found = await sharing.get("k")
        assert found is not None
        assert found.value == value


async def test_keys_above_the_limit_of_a_run_are_rejected(
    sharing: SharedValues, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Existing keys can still be written."""
    monkeypatch.setattr("orchestrator.engine.session_api.shared_values.MAX_KEYS", 2)
    await sharing.put("a", 1)
    await sharing.put("b", 1)
    with pytest.raises(RefusedError, match="can't store c: run r already has 2 other"):
        await sharing.put("c", 1)
    assert (await sharing.put("a", 2)).version == 2


async def test_bytes_above_the_limit_of_a_run_are_rejected(
    sharing: SharedValues, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restore writes all of them in one commit; replaced values do not count."""
    monkeypatch.setattr("orchestrator.engine.session_api.shared_values.MAX_BYTES", 1000)
    await sharing.put("a", "x" * 300)
    await sharing.put("b", "x" * 300)
    with pytest.raises(RefusedError, match="can't store c:"):
        await sharing.put("c", "x" * 400)
    assert (await sharing.put("a", "x" * 400)).version == 2
    with pytest.raises(RefusedError, match="can't store a:"):
        await sharing.put("a", "x" * 900)


async def test_put_by_a_fenced_session_is_rejected(sharing: SharedValues, store: Store) -> None:
    """A value is written under the claim of its task."""
    await store.commit(Commit([Write(claim_key(API), 0, {"epoch": 2, "released": None})]))
    with pytest.raises(LeaseLost):
        await sharing.put("k", "late", writer=API, claim=Guard(claim_key(API), 1))
    assert await sharing.get("k") is None
    await sharing.put("k", "in time", writer=API, claim=Guard(claim_key(API), 2))


async def test_version_continues_after_a_removal(sharing: SharedValues, store: Store) -> None:
    """So that a waiter for a later version gets no older one and does not miss the new one."""
    await sharing.put("k", 1)
    await store.commit(Commit([Write(Key(KIND, "r/k"), 1, None)]))
    assert await sharing.get("k") is None
    put = await sharing.put("k", 2, if_version=0)
    assert put == await sharing.get("k")
    assert put.version > 1
    assert await sharing.wait("k", after=1, timeout=0) == put


async def test_document_of_another_kind_is_not_a_value(sharing: SharedValues, store: Store) -> None:
    await store.commit(Commit([Write(Key(KIND, "r/k"), 0, {"odd": 1})]))
    with pytest.raises(RefusedError, match="is unreadable: put the value again"):
        await sharing.get("k")
    assert [(one.key, one.writer) for one in await sharing.list()] == [("k", None)]
    assert (await sharing.put("k", 1)).version == 2
