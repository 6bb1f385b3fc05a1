"""The public entry point: a project, with all operations on its runs by topic."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from orchestrator.api import topics
from orchestrator.api.context import ProjectContext, StopSignal
from orchestrator.api.opening import OnOutage, open_project
from orchestrator.project import council_home
from orchestrator.system.clock import Clock, SystemClock

if TYPE_CHECKING:
    from orchestrator.config.model import RunConfig
    from orchestrator.config.schema import Config
    from orchestrator.plugins import Plugins


class Council:
    """A project, opened by `Council.open`.

    Its operations are grouped by topic: `council.runs`, `council.tasks`, etc. Tasks of one event loop can use it
    concurrently. Each topic is imported on first use.
    """

    notices: Sequence[str]
    """Messages for the user about how the state was opened."""

    def __init__(
        self,
        context: ProjectContext,
        config: RunConfig | None,
        opened_at: int,
        stop: StopSignal,
        notices: Sequence[str] = (),
    ) -> None:
        """Set up a council; `opened_at` is the log position at which it was opened."""
        self.project, self.config, self.notices = context.project, config, notices
        self._context, self._opened_at, self._stop = context, opened_at, stop

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        source: str | Path | Config | RunConfig | None = None,
        *,
        plugins: Plugins | None = None,
        state: str | None = None,
        clock: Clock | None = None,
        environ: Mapping[str, str] = os.environ,
        on_outage: OnOutage = "fail",
    ) -> AsyncIterator[Self]:
        """Open a project's state for the body of the `async with`.

        `source` is a YAML file or a `Config` for `runs.run` (paths in a `Config` are relative to the current folder),
        or a folder, for the runs that were started in its repository. None is the current folder.

        `state` is the URL of the store (`file:///a/folder`, `memory:`, or a scheme that a plugin registers), or its
        folder. The default is, in this order: `COUNCIL_STATE` of `environ`, the store in the YAML file, the store of
        the newest run, and `.council/state` of the project. A store from `state` or `COUNCIL_STATE` can be read from
        any folder. `plugins` replaces the installed plugins, and `environ` the process's environment; sessions get only
        the allowed variables of it.

        If the state is empty and `.worktrees` has state in an earlier format, that state is imported and `notices`
        reports it, but not into a store from `state`.

        With `on_outage="wait"`, this and all operations wait while the store's server does not answer, and log a
        warning; with `"pause"`, only once it has answered; with `"fail"`, they raise StoreUnavailable. An active run
        follows its own setting, `when_unreachable`.

        Raises ConfigError, with all problems of the file; RefusedError if there is nothing to open, or if the store was
        created on another machine and `adopt_state` has not accepted it.
        """
        clock, stop = clock or SystemClock(), StopSignal()
        opening = open_project(source, plugins, state, clock, environ, on_outage, stop)
        async with opening as (context, config, notices):
            yield cls(context, config, await context.store.position(), stop, notices)

    @cached_property
    def runs(self) -> topics.Runs:
        """Starting, resuming, finding and following runs."""
        return topics.Runs(self._context, self._stop, self.config, self._opened_at)

    @cached_property
    def tasks(self) -> topics.Tasks:
        """Cancelling, retrying, approving and describing single tasks."""
        return topics.Tasks(self._context)

    @cached_property
    def logs(self) -> topics.TaskLogs:
        """The output of tasks."""
        return topics.TaskLogs(self._context)

    @cached_property
    def changes(self) -> topics.TaskChanges:
        """The changes of tasks, and unmerged work."""
        return topics.TaskChanges(self._context)

    @cached_property
    def reports(self) -> topics.RunReports:
        """The summary, metrics and usage of runs."""
        return topics.RunReports(self._context)

    @cached_property
    def sessions(self) -> topics.Sessions:
        """The sessions of runs, and the values that they share."""
        return topics.Sessions(self._context)

    @cached_property
    def notes(self) -> topics.Notes:
        """The notes of sessions."""
        return topics.Notes(self._context)

    @cached_property
    def locks(self) -> topics.Locks:
        """The locks of sessions, tasks and merges, and named locks."""
        return topics.Locks(self._context)

    @cached_property
    def checks(self) -> topics.Checks:
        """The recorded results of checks."""
        return topics.Checks(self._context)

    @cached_property
    def checkpoints(self) -> topics.Checkpoints:
        """The checkpoints of runs."""
        return topics.Checkpoints(self._context)

    @cached_property
    def history(self) -> topics.StateHistory:
        """The recorded state at earlier positions, and its commits."""
        return topics.StateHistory(self._context)

    @cached_property
    def state(self) -> topics.State:
        """The documents, and the maintenance of the store."""
        return topics.State(self._context)

    @cached_property
    def cleaner(self) -> topics.Cleaner:
        """The removal of leftovers of the project's runs and of this machine."""
        context = self._context
        home, environ = council_home(context.environ), context.environ
        return topics.Cleaner(home, environ, context.clock, context.project, context.store, context.url)

    @property
    def plugins(self) -> Plugins:
        """The plugins passed to `open`, or the installed ones. Blocks on first use."""
        return self._context.plugins.get()

    @property
    def store_url(self) -> str:
        """The URL of the store."""
        return self._context.url

    @property
    def is_empty(self) -> bool:
        """Whether the store had no commits when it was opened."""
        return self._opened_at == 0

    @property
    def damage(self) -> tuple[str, ...]:
        """Descriptions of the damage found since the state was opened."""
        return self._context.damage

    def stop(self) -> None:
        """Stop this council's active runs cleanly: stop sessions, and preserve their work.

        `runs.run` and `runs.resume` return soon after; a later `resume` continues the runs.
        """
        self._stop.set()
