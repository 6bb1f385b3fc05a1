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

from orchestrator.domain.runs.statuses import FINAL_STATUSES, SUCCESS_STATUSES, TaskStatus
from orchestrator.domain.settings.names import check_name
from orchestrator.protocols import SyncResult, TrackedState, TrackedTask, TrackerType
from orchestrator.testing.options_contract import OptionsContract
from orchestrator.testing.sink_contract import TIMEOUT

_RUN = "20260101-120000-abcd"


def make_state(task: str, status: TaskStatus, **fields: object) -> TrackedState:
    """Return the state of a task with a status."""
    report = {
        "id": task,
        "status": str(status),
        "attempts": 1,
        "landed": "1" * 40 if status is TaskStatus.LANDED else None,
        "branch": None,
        "reason": None,
        "cost": 0.25,
        "pull_request": None,
        **fields,
    }
    return TrackedState(
        run=_RUN,
        task=report,
        label=status.record.label,
        has_ended=status in FINAL_STATUSES,
        is_done=status in SUCCESS_STATUSES,
        owner="process 1 on example",
        heartbeat=1_767_265_200.0,
        epoch=1,
    )


class TrackerContract(OptionsContract):
    """The suite: `tracker_type` is the class that the plugin registers.

    The options returned by `make_options` select a list with at least two open tasks.
    """

    tracker_type: ClassVar[TrackerType]
    own_keys: ClassVar[frozenset[str]] = frozenset({"use", "sync_interval"})

    def options_type(self) -> type[BaseModel]:
        """Return the tracker's `Options`."""
        return self.tracker_type.Options

    async def open_tasks(self, options: BaseModel) -> Sequence[TrackedTask]:
        """Open the tracker and return its tasks."""
        with anyio.fail_after(TIMEOUT):
            async with self.tracker_type(options) as tracker:
                return await tracker.tasks()

    async def sync(self, options: BaseModel, *states: TrackedState) -> SyncResult:
        """Open the tracker and synchronize it; raise the problem that it reports, if any."""
        with anyio.fail_after(TIMEOUT):
            async with self.tracker_type(options) as tracker:
                result = await tracker.sync(states)
        if result.problem is not None:
            raise result.problem
        return result

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

    @pytest.mark.parametrize("status", sorted(SUCCESS_STATUSES))
    async def test_finished_task_is_not_open(self, tmp_path: Path, status: TaskStatus) -> None:
        """A repeated synchronization changes nothing, and the other tasks stay open."""
        options = self.validated(tmp_path)
        first, *rest = await self.open_tasks(options)
        state = make_state(first.id, status)
        for _ in range(2):
            assert not (await self.sync(options, state)).requests
        left = await self.open_tasks(options)
        assert [task.id for task in left] == [task.id for task in rest]

    @pytest.mark.parametrize("status", sorted(set(TaskStatus) - SUCCESS_STATUSES))
    async def test_unfinished_task_is_open_for_its_run(self, tmp_path: Path, status: TaskStatus) -> None:
        """Nobody has requested anything, and the tracker shows the next state too."""
        options = self.validated(tmp_path)
        first, *rest = await self.open_tasks(options)
        for _ in range(2):
            assert not (await self.sync(options, make_state(first.id, status))).requests
        assert not (await self.sync(options, make_state(first.id, TaskStatus.LANDED))).requests
        assert [task.id for task in await self.open_tasks(options)] == [task.id for task in rest]

    async def test_state_of_a_task_that_has_left_the_list_is_accepted(self, tmp_path: Path) -> None:
        """A person may have deleted it."""
        options = self.validated(tmp_path)
        tasks = await self.open_tasks(options)
        await self.sync(options, make_state("no-task-of-this-list", TaskStatus.LANDED))
        assert await self.open_tasks(options) == tasks
