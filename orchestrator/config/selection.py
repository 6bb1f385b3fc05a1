"""Apply command-line options to a config: selected tasks, capacity, and failing bases."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from orchestrator.config.load import default_slot_count
from orchestrator.config.model import RunConfig
from orchestrator.domain.wording import join_names
from orchestrator.errors import RefusedError

#: The number of task names in a remedy.
_MOST_NAMED = 5


def select_tasks(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """Return a run of these tasks and their direct and indirect needs, in file order.

    It has no trackers. Raises RefusedError for an unknown task.
    """
    tasks = {task.id: task for task in config.tasks}
    for name in names:
        if name not in tasks:
            near = difflib.get_close_matches(name, tasks, n=1)
            named = f"name one of: {join_names([*tasks], _MOST_NAMED)}"
            remedy = f"did you mean {near[0]!r}?" if near else named
            raise RefusedError(f"the file has no task {name!r}", remedy)
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        wanted += [need for need in tasks[name].needs if need not in wanted]
    selected = tuple(task for task in config.tasks if task.id in wanted)
    return config.model_copy(update={"tasks": selected, "trackers": {}, "template": None})


def with_capacity(config: RunConfig, capacity: int) -> RunConfig:
    """Return a run with another capacity, and the default number of worktree slots adjusted to it."""
    worktrees = config.worktrees
    if worktrees.max == default_slot_count(config.capacity):
        worktrees = worktrees.model_copy(update={"max": default_slot_count(capacity)})
    given = (*config.given, "capacity", *(["worktrees"] if worktrees != config.worktrees else []))
    return config.model_copy(update={"capacity": capacity, "worktrees": worktrees, "given": given})


def with_failing_base(config: RunConfig) -> RunConfig:
    """Return a run whose sessions start even if checks fail on the base."""
    tasks = tuple(task.model_copy(update={"allow_failing_base": True}) for task in config.tasks)
    return config.model_copy(update={"tasks": tasks})
