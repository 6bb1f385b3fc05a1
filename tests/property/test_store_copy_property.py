"""A copy of a store through a file has the same contents and history."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import HistoryCompacted
from orchestrator.protocols import Commit, Event, JsonObject, Key, Store, Write
from orchestrator.state.stores.file import FileStore
from orchestrator.state.transfer.copying import export_to_stream, import_from_stream
from orchestrator.testing.clock import ManualClock
from orchestrator.testing.store_contract.suite import read_dump
from tests.hypothesis_settings import example_settings
from tests.store_kinds import SERVERS, open_kind

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
_leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _text
_values = st.dictionaries(
    _text,
    st.recursive(_leaves, lambda inner: st.lists(inner) | st.dictionaries(_text, inner), max_leaves=5),
    max_size=3,
)
KEYS = [Key("task", "a"), Key("task", "ü\n"), Key("run", "a")]

#: Document, value (None deletes it), and lifetime.
_Change = tuple[int, JsonObject | None, float | None]
_changes = st.tuples(
    st.integers(0, len(KEYS) - 1), st.none() | _values, st.none() | st.floats(0.5, 100.0, allow_subnormal=False)
)
#: Changed documents, event data, and the following seconds; or a compaction up to that age.
_commits = st.tuples(st.lists(_changes, max_size=3, unique_by=lambda one: one[0]), _values, st.floats(0.0, 60.0))
_steps = _commits | st.floats(0.0, 300.0)


async def perform(store: Store, clock: ManualClock, step: tuple[list[_Change], JsonObject, float] | float) -> None:
    """Apply one step to a store."""
    if isinstance(step, float):
        await store.compact(clock.now() - step, 1 << 40)
        return
    changes, data, seconds = step
    writes = []
    for number, value, ttl in changes:
        found = await store.get(KEYS[number])
        writes.append(Write(KEYS[number], found.version if found else 0, value, ttl))
    await store.commit(Commit(writes, [Event("e", data)] if data else []))
    clock.advance(seconds)


async def moments(store: Store) -> list[object]:
    """Return the state of a store at each position, and its versions."""
    found: list[object] = [await store.history(key, 100) for key in KEYS]
    for position in range(await store.position() + 1):
        try:
            found.append(await store.at(position))
        except HistoryCompacted as gone:
            found.append(gone.first)
    return found


async def check(
    steps: Sequence[tuple[list[_Change], JsonObject, float] | float], segment_bytes: int, kinds: Sequence[str]
) -> None:
    """Run the steps, and copy the store to a file and from it into stores of some kinds."""
    clock = ManualClock()
    with TemporaryDirectory() as folder:
        async with FileStore.open(Path(folder) / "a", clock, segment_bytes=segment_bytes) as source:
            for step in steps:
                await perform(source, clock, step)
            file = io.BytesIO()
            await export_to_stream(source, file, clock.now())
            expected, reported = await read_dump(source), await moments(source)
            listed = [one.key for one in await source.list("task")]
        async with AsyncExitStack() as stack:
            file_target = FileStore.open(Path(folder) / "b", clock, segment_bytes=segment_bytes)
            others = [open_kind(kind, Path(folder) / kind, clock) for kind in kinds]
            for target in (file_target, *others):
                store = await stack.enter_async_context(target)
                await import_from_stream("FILE", partial(io.BytesIO, file.getvalue()), store)
                assert await read_dump(store) == expected
                assert await moments(store) == reported
                assert [one.key for one in await store.list("task")] == listed
        async with FileStore.open(Path(folder) / "b", clock) as reopened:
            assert await read_dump(reopened) == expected
            assert [one.key for one in await reopened.list("task")] == listed


@example_settings(40)
@given(st.lists(_steps, max_size=25), st.sampled_from([1, 400, 1 << 20]))
def test_copy_through_a_file_is_equal(
    steps: list[tuple[list[_Change], JsonObject, float] | float], segment_bytes: int
) -> None:
    """At every position, with gaps, deletions and expiry; also after reopening."""
    anyio.run(check, steps, segment_bytes, ["memory"])


@pytest.mark.extended
@example_settings(40)
@given(st.lists(_steps, max_size=25))
def test_copy_to_a_server_is_equal(steps: list[tuple[list[_Change], JsonObject, float] | float]) -> None:
    """The same as of a copy to this machine."""
    anyio.run(check, steps, 400, list(SERVERS))
