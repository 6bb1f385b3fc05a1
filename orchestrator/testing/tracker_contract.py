"""What every tracker promises, as tests: subclass `TrackerContract` in a test module.

class TestMyTracker(TrackerContract):
    tracker_type = MyTracker

    def given(self, folder):                # options of a list with at least two open tasks
        ...

Needs pytest with pytest-asyncio in its auto mode (or mark your subclass `pytest.mark.asyncio`).
"""

# ruff: noqa: S101  assert is what a test suite is made of, also one that is shipped

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
    """The suite; `tracker_type` is what the plugin registers, `given` must lead to at least two open tasks."""

    tracker_type: ClassVar[TrackerType]
    own_keys: ClassVar[frozenset[str]] = frozenset({"use"})

    def options_type(self) -> type[BaseModel]:
        """Return the tracker's `Options`."""
        return self.tracker_type.Options

    async def open_tasks(self, options: BaseModel) -> Sequence[TrackedTask]:
        """Open the tracker and ask for its tasks."""
        with anyio.fail_after(TIMEOUT):
            async with self.tracker_type(options) as tracker:
                return await tracker.tasks()

    async def tell(self, options: BaseModel, *events: RecordedEvent) -> None:
        """Open the tracker and send events."""
        with anyio.fail_after(TIMEOUT):
            async with self.tracker_type(options) as tracker:
                await tracker.send(events)

    async def test_its_tasks_could_stand_in_a_file(self, tmp_path: Path) -> None:
        """Ids are names, each there once whatever its case; prompts say something; needs are among the tasks."""
        tasks = await self.open_tasks(self.validated(tmp_path))
        assert len(tasks) >= 2, "given() leads to at least two open tasks"
        ids = [check_name(task.id) for task in tasks]
        assert len({name.casefold() for name in ids}) == len(ids), ids
        assert [task.id for task in tasks if not task.prompt.strip()] == []
        assert {need for task in tasks for need in task.needs} <= set(ids)

    async def test_the_same_tasks_have_the_same_ids(self, tmp_path: Path) -> None:
        """Asked again, a list that nobody has changed gives the same."""
        options = self.validated(tmp_path)
        assert await self.open_tasks(options) == await self.open_tasks(options)

    async def test_a_task_that_has_landed_is_not_open_any_more(self, tmp_path: Path) -> None:
        """The next run does not do it again; told twice, the rest stays as it was."""
        options = self.validated(tmp_path)
        first, *rest = await self.open_tasks(options)
        landed = _event("task.landed", first.id)
        await self.tell(options, landed, landed)
        left = await self.open_tasks(options)
        assert [task.id for task in left] == [task.id for task in rest]

    @pytest.mark.parametrize("kind", ["started", "retrying", "failed", "cancelled", "no_change", "conflict"])
    async def test_a_task_that_has_not_landed_stays_open(self, tmp_path: Path, kind: str) -> None:
        """Whatever else became of it: another run may do it."""
        options = self.validated(tmp_path)
        tasks = await self.open_tasks(options)
        await self.tell(options, _event(f"task.{kind}", tasks[0].id))
        assert [task.id for task in await self.open_tasks(options)] == [task.id for task in tasks]

    async def test_events_of_others_are_no_error(self, tmp_path: Path) -> None:
        """Every event of the run is told, also of tasks that are not its own."""
        options = self.validated(tmp_path)
        tasks = await self.open_tasks(options)
        others = [one for one in sample_events() if one.event.data.get("task") not in {task.id for task in tasks}]
        await self.tell(options, *others, _event("task.landed", "no-task-of-this-list"))
        assert await self.open_tasks(options) == tasks


def _event(kind: str, task: str) -> RecordedEvent:
    data = {"run": "20260101-120000-abcd", "task": task, "attempt": 1, "landed": "1" * 40, "reason": "none"}
    return RecordedEvent(7, 1_767_265_200.0, Event(kind, data))
