"""What is damaged is found on request, and settled for on request: what can be read counts from then on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import HistoryGone
from orchestrator.protocols import Commit, Event, Key, Write
from orchestrator.state import snapshot
from orchestrator.state.file import FileStore
from orchestrator.testing.clock import ManualClock

HIT, WHOLE, NEVER = Key("task", "hit"), Key("task", "whole"), Key("task", "never")


@pytest.fixture
async def place(tmp_path: Path) -> Path:
    """The folder of a store of three segments: the second version of a document is in the second, and never again."""
    async with FileStore.open(tmp_path, ManualClock(), segment_bytes=600) as store:
        await store.commit(Commit([Write(HIT, 0, {"n": "first"}), Write(WHOLE, 0, {"n": 0})]))
        for number in range(1, 12):
            await store.commit(Commit([Write(WHOLE, number, {"n": number})], [Event("counted")]))
            if number == 4:
                await store.commit(Commit([Write(HIT, 1, {"n": "second"}), Write(NEVER, 0, {"n": "only"})]))
    (tmp_path / snapshot.NAME).unlink(missing_ok=True)
    assert len(log(tmp_path)) >= 3
    return tmp_path


def log(place: Path) -> list[Path]:
    """Return the segments."""
    return sorted(place.glob("*.jsonl*"))


def spoil(place: Path, what: bytes, by: bytes) -> Path:
    """Change some bytes of the log; return the segment."""
    (segment,) = [path for path in log(place) if what in path.read_bytes()]
    segment.write_bytes(segment.read_bytes().replace(what, by, 1))
    return segment


async def test_a_sound_log_is_left_alone(place: Path) -> None:
    """To verify it says how much there is, and repair does nothing."""
    async with FileStore.open(place, ManualClock()) as store:
        verified = await store.verify()
        assert verified.is_sound
        assert (verified.position, verified.bytes) == (13, sum(path.stat().st_size for path in log(place)))
        assert await store.repair() == verified
        assert await store.position() == 13


async def test_damage_that_comes_while_a_store_is_open_is_found(place: Path) -> None:
    """What has been read stays right, and is what repair goes by."""
    async with FileStore.open(place, ManualClock()) as store:
        spoil(place, b'"second"', b'"sec0nd"')
        verified = await store.verify()
        assert not verified.is_sound
        assert set(verified.damaged) == {HIT, NEVER}
        assert not verified.differs
        assert (await store.repair()).is_sound
        found = await store.get(HIT)
        assert found is not None
        assert (found.value, found.version) == ({"n": "second"}, 3)


@pytest.mark.parametrize(
    "damage", [lambda place: spoil(place, b'"second"', b'"sec0nd"'), lambda place: spoil(place, b'"never"', b'"NEVER"')]
)
async def test_what_is_lost_is_settled_for(place: Path, damage: Callable[[Path], Path]) -> None:
    """The newest value that is known is the next version, or there is none; what was damaged is kept aside."""
    spoiled = damage(place).read_bytes()
    async with FileStore.open(place, ManualClock()) as store:
        before = await store.get(HIT)
        assert before is not None
        assert before.damaged
        verified = await store.verify()
        assert HIT in verified.damaged
        assert (await store.repair()).is_sound
        after, whole = await store.get(HIT), await store.get(WHOLE)
        assert after is not None
        assert whole is not None
        assert (after.value, after.damaged, after.version) == ({"n": "first"}, False, before.version + 1)
        assert whole.value == {"n": 11}
        assert await store.get(NEVER) is None
        events = (await store.history(HIT))[0].events
        assert [event.data["key"] for event in events if event.type == "state.repaired"].count("task/hit") == 1
        with pytest.raises(HistoryGone):
            await store.at(1)
    assert any(path.read_bytes() == spoiled for path in (place / "damaged").iterdir())
    async with FileStore.open(place, ManualClock()) as store:
        assert not store.damage
        assert await store.get(HIT) == after
        assert (await store.verify()).is_sound


async def test_damage_in_the_newest_segment_is_repaired(place: Path) -> None:
    """That one is closed first."""
    newest = log(place)[-1]
    newest.write_bytes(newest.read_bytes().replace(b'{"n":11}', b'{"n":99}'))
    async with FileStore.open(place, ManualClock()) as store:
        assert WHOLE in (await store.verify()).damaged
        assert (await store.repair()).is_sound
        found = await store.get(WHOLE)
        assert found is not None
        assert found.value == {"n": 10}
