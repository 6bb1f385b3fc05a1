"""The contract of every sink, as tests: subclass `SinkContract` in a test module.

    class TestMySink(SinkContract):
        sink_type = MySink

        def make_options(self, folder):         # options as in the file; use `options = {...}` if they need no folder
            return {"file": str(folder / "events")}

        def delivered_positions(self, folder):  # positions of the delivered events, in that order
            return [...]

Needs pytest with pytest-asyncio in its auto mode (or mark your subclass `pytest.mark.asyncio`).
"""

# ruff: noqa: S101  this module is a test suite

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import anyio
from pydantic import BaseModel

from orchestrator.protocols import Event, JsonObject, RecordedEvent, SinkType
from orchestrator.testing.options_contract import OptionsContract

#: Seconds after which an operation fails.
TIMEOUT = 30.0
#: Maximum attempts per delivery: the receiver may be unavailable at first.
MAX_TRIES = 5

_RUN = "20260101-120000-abcd"
_DATA: Sequence[tuple[str, JsonObject]] = (
    ("run.created", {"tasks": 2, "target": "main"}),
    ("task.started", {"task": "a", "attempt": 1, "base": "0" * 40, "adapter": "x"}),
    ("task.retrying", {"task": "a", "attempt": 1, "reason": 'Ä 漢 🙂\n\t"quoted" \\ <b>&amp;</b> \x1b[31m\x7f'}),
    ("task.failed", {"task": "a", "attempt": 2, "reason": "x" * 64_000, "branch": None}),
    ("repository.changed", {"changes": ["refs/heads/main moved"], "sessions": ["a", "b"]}),
    ("something.new", {"nested": {"list": [1, 2.5, None, True, {}]}, "": 0}),
    ("task.landed", {"task": "b", "attempt": 1, "landed": "1" * 40}),
    ("run.finished", {"status": "incomplete"}),
)  # fmt: skip


def sample_events(first: int = 1, run: str = _RUN) -> list[RecordedEvent]:
    """Return events of many kinds, one unknown, at every second position."""
    return [
        RecordedEvent(first + 2 * index, 1_767_265_200.125 + index, Event(kind, {"run": run, **data}))
        for index, (kind, data) in enumerate(_DATA)
    ]


class SinkContract(OptionsContract):
    """The suite: `sink_type` is the class that the plugin registers."""

    sink_type: ClassVar[SinkType]
    own_keys: ClassVar[frozenset[str]] = frozenset({"use", "events"})

    def options_type(self) -> type[BaseModel]:
        """Return the sink's `Options`."""
        return self.sink_type.Options

    @abstractmethod
    def delivered_positions(self, folder: Path) -> Sequence[int]:
        """Return the positions of all delivered events, in the order of delivery.

        `folder` is the folder passed to `make_options`.
        """

    async def deliver(self, options: BaseModel, *batches: Sequence[RecordedEvent], tries: int = MAX_TRIES) -> None:
        """Deliver like a run: after an error, retry with a newly opened sink."""
        waiting = deque(batches)
        try:
            await self._deliver(options, waiting)
        except Exception:  # a sink may raise anything
            if tries == 1:
                raise
            await self.deliver(options, *waiting, tries=tries - 1)

    async def _deliver(self, options: BaseModel, waiting: deque[Sequence[RecordedEvent]]) -> None:
        with anyio.fail_after(TIMEOUT):
            async with self.sink_type(options) as sink:
                while waiting:
                    await sink.send(waiting[0])
                    waiting.popleft()

    async def test_sink_without_events_opens_and_closes(self, tmp_path: Path) -> None:
        """A run may have no events for the sink."""
        await self.deliver(self.validated(tmp_path))

    async def test_events_of_any_kind_arrive_in_order(self, tmp_path: Path) -> None:
        """Events may contain any text, and are sent individually and together."""
        events = sample_events()
        await self.deliver(self.validated(tmp_path), *([event] for event in events[:3]), events[3:])
        assert _first_times(self.delivered_positions(tmp_path)) == [event.position for event in events]

    async def test_repeated_events_are_accepted(self, tmp_path: Path) -> None:
        """After a restart, a run sends some events again, and then new ones."""
        options, events = self.validated(tmp_path), sample_events()
        await self.deliver(options, events[:4])
        await self.deliver(options, events[2:6], events[6:])
        assert _first_times(self.delivered_positions(tmp_path)) == [event.position for event in events]

    async def test_cancelled_send_can_be_repeated(self, tmp_path: Path) -> None:
        """A sink whose `send` is cancelled closes; reopened, it accepts the same events."""
        options, events = self.validated(tmp_path), sample_events()
        with anyio.fail_after(TIMEOUT):
            with anyio.CancelScope() as scope:
                async with self.sink_type(options) as sink:
                    scope.cancel()
                    await sink.send(events)
        await self.deliver(options, events)
        assert sorted(set(self.delivered_positions(tmp_path))) == [event.position for event in events]

    async def test_sink_of_two_concurrent_runs_delivers_both(self, tmp_path: Path) -> None:
        """Two sinks with the same options each deliver their own events."""
        options = self.validated(tmp_path)
        ours, theirs = sample_events(), sample_events(first=2, run="20260101-130000-ef01")
        async with anyio.create_task_group() as group:
            group.start_soon(self.deliver, options, ours[:4], ours[4:])
            group.start_soon(self.deliver, options, theirs[:4], theirs[4:])
        assert sorted(set(self.delivered_positions(tmp_path))) == sorted(event.position for event in (*ours, *theirs))


def _first_times(positions: Sequence[int]) -> list[int]:
    """Return the distinct positions in order of first occurrence."""
    return list(dict.fromkeys(positions))
