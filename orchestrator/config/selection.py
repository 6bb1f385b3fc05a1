"""What the command line chooses of a file: some of its tasks, and how many sessions there are at once. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from orchestrator.config.load import default_slot_count
from orchestrator.config.model import RunConfig
from orchestrator.errors import RefusedError

#: Tasks that are named to somebody whose name is none.
_MOST_NAMED = 5


def select_tasks(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """Return a run of these tasks and those that they need, directly or not, in the file's order.

    Its trackers bring no further tasks. RefusedError for a name that no task has.
    """
    tasks = {task.id: task for task in config.tasks}
    for name in names:
        if name not in tasks:
            near = difflib.get_close_matches(name, tasks, n=1)
            more = f" and {len(tasks) - _MOST_NAMED} more" if len(tasks) > _MOST_NAMED else ""
            named = f"name one of: {', '.join([*tasks][:_MOST_NAMED])}{more}"
            remedy = f"did you mean {near[0]!r}?" if near else named
            raise RefusedError(f"the file has no task {name!r}", remedy)
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        wanted += [need for need in tasks[name].needs if need not in wanted]
    left = tuple(task for task in config.tasks if task.id in wanted)
    return config.model_copy(update={"tasks": left, "trackers": {}, "template": None})


def with_capacity(config: RunConfig, capacity: int) -> RunConfig:
    """Return a run with so many sessions at once, and worktree slots for as many where the file leaves that open."""
    worktrees = config.worktrees
    if worktrees.max == default_slot_count(config.capacity):
        worktrees = worktrees.model_copy(update={"max": default_slot_count(capacity)})
    given = (*config.given, "capacity", *(["worktrees"] if worktrees != config.worktrees else []))
    return config.model_copy(update={"capacity": capacity, "worktrees": worktrees, "given": given})


def with_failing_base(config: RunConfig) -> RunConfig:
    """Return a run whose checks may all fail on the base."""
    tasks = tuple(task.model_copy(update={"allow_failing_base": True}) for task in config.tasks)
    return config.model_copy(update={"tasks": tasks})
