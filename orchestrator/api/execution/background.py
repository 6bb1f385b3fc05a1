"""Start the execution of a run in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.api.context import ProjectContext
from orchestrator.api.run_index import RunIndex
from orchestrator.config.store import MEMORY
from orchestrator.domain.settings.run_settings import Budget
from orchestrator.errors import RefusedError
from orchestrator.system.process import start_detached

#: Seconds between two checks whether the process has started.
_POLL_INTERVAL = 0.05


@dataclass(frozen=True, slots=True)
class BackgroundProcess:
    """A process that executes a run."""

    run: str
    pid: int
    log: Path
    """The file with its errors."""


async def start_in_background(
    context: ProjectContext,
    run: str,
    budget: Budget | None,
    capacity: int | None,
    *,
    allow_failing_base: bool,
) -> BackgroundProcess:
    """Start `council resume` for a run; see `Runs.start`."""
    index = RunIndex(context)
    if context.url == MEMORY:
        raise RefusedError("a memory store is lost when this process exits", "omit --detach, or use another store")
    if await index.is_live(run):
        raise RefusedError(f"run {run} is already running", f"`council watch {run}` shows it")
    log = context.project.background_log(run)
    await anyio.to_thread.run_sync(partial(log.parent.mkdir, mode=0o700, parents=True, exist_ok=True))
    # Not an argument: the URL of a server may contain a password, and arguments are visible to all users.
    env = context.environ if context.follows_file else {**context.environ, "COUNCIL_STATE": context.url}
    arguments = ["resume", run, *_options(budget, capacity, allow_failing_base=allow_failing_base)]
    start = partial(start_detached, arguments, env=env, cwd=context.project.top, log=log)
    child = await anyio.to_thread.run_sync(start)
    while child.poll() is None and not await index.is_live(run):  # noqa: ASYNC110  in another process
        await anyio.sleep(_POLL_INTERVAL)
    return BackgroundProcess(run, child.pid, log)


def _options(budget: Budget | None, capacity: int | None, *, allow_failing_base: bool) -> Sequence[str]:
    limits = {} if budget is None else budget.model_dump(exclude_none=True)
    text = ",".join(f"{key}={value}{'s' if key == 'time' else ''}" for key, value in limits.items())
    return [
        *(["--budget", text] if text else []),
        *([] if capacity is None else ["-j", str(capacity)]),
        *(["--allow-failing-base"] if allow_failing_base else []),
    ]
