"""The contract of every tracker, as tests: subclass `TrackerContract`.

    class TestMyTracker(TrackerContract):
        tracker_type = MyTracker

        def make_options(self, folder):                # options of a list with at least two open tasks
            ...

Needs pytest with pytest-asyncio in its auto mode (or mark your subclass `pytest.mark.asyncio`).
"""

# ruff: noqa: S101  this module is a test suite

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import anyio
import pytest
from pydantic import BaseModel

from orchestrator.domain.settings.names import check_name
from orchestrator.protocols import Event, RecordedEvent, TrackedTask, TrackerType
from orchestrator.testing.options_contract import OptionsContract
from orchestrator.testing.sink_contract import TIMEOUT, sample_events


class TrackerContract(OptionsContract):
    """The suite: `tracker_type` is the class that the plugin registers.

    The options returned by `make_options` select a list with at least two open tasks.
    """

    tracker_type: ClassVar[TrackerType]
    own_keys: ClassVar[frozenset[str]] = frozenset({"use"})

    def options_type(self) -> type[BaseModel]:
        """Return the tracker's `Options`."""
        return self.tracker_type.Options

    async def open_tasks(self, options: BaseModel) -> Sequence[TrackedTask]:
        """Open the tracker and return its tasks."""
        with anyio.fail_after(TIMEOUT):
            async with self.tracker_type(options) as tracker:
                return await tracker.tasks()

    async def send_events(self, options: BaseModel, *events: RecordedEvent) -> None:
        """Open the tracker and send events."""
        with anyio.fail_after(TIMEOUT):
            async with self.tracker_type(options) as tracker:
                await tracker.send(events)

    async def test_open_tasks_are_valid_tasks_of_a_file(self, tmp_path: Path) -> None:
        """Ids are unique in any case, prompts not empty, `needs` refer to listed tasks."""
        tasks = await self.open_tasks(self.validated(tmp_path))
        assert len(tasks) >= 2, "make_options() must select a list with at least two open tasks"
        ids = [check_name(task.id) for task in tasks]
        assert len({name.casefold() for name in ids}) == len(ids), ids
        assert [task.id for task in tasks if not task.prompt.strip()] == []
        assert {need for task in tasks for need in task.needs} <= set(ids)

    async def test_unchanged_list_returns_the_same_tasks(self, tmp_path: Path) -> None:
        """A second read of an unchanged list returns equal tasks."""
        options = self.validated(tmp_path)
        assert await self.open_tasks(options) == await self.open_tasks(options)

    async def test_landed_task_is_not_open(self, tmp_path: Path) -> None:
        """A repeated event changes nothing, and the other tasks stay open."""
        options = self.validated(tmp_path)
        first, *rest = await self.open_tasks(options)
        landed = _event("task.landed", first.id)
        await self.send_events(options, landed, landed)
        left = await self.open_tasks(options)
        assert [task.id for task in left] == [task.id for task in rest]

    @pytest.mark.parametrize("kind", ["started", "retrying", "failed", "cancelled", "no_change", "conflict"])
    async def test_task_that_has_not_landed_stays_open(self, tmp_path: Path, kind: str) -> None:
        """Another run may execute the task."""
        options = self.validated(tmp_path)
        tasks = await self.open_tasks(options)
        await self.send_events(options, _event(f"task.{kind}", tasks[0].id))
        assert [task.id for task in await self.open_tasks(options)] == [task.id for task in tasks]

    async def test_events_of_other_tasks_are_accepted(self, tmp_path: Path) -> None:
        """A tracker receives all events of the run, also those of tasks not in its list."""
        options = self.validated(tmp_path)
        tasks = await self.open_tasks(options)
        others = [event for event in sample_events() if event.event.data.get("task") not in {task.id for task in tasks}]
        await self.send_events(options, *others, _event("task.landed", "no-task-of-this-list"))
        assert await self.open_tasks(options) == tasks


def _event(kind: str, task: str) -> RecordedEvent:
    data = {"run": "20260101-120000-abcd", "task": task, "attempt": 1, "landed": "1" * 40, "reason": "none"}
    return RecordedEvent(7, 1_767_265_200.0, Event(kind, data))
