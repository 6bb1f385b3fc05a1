"""The context of a council's topics: project, store, plugins and stop signal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from orchestrator.project import Project, council_home, find_project
from orchestrator.protocols import Store
from orchestrator.state import offline
from orchestrator.state.log.identity import record_store_use
from orchestrator.system.clock import Clock

if TYPE_CHECKING:
    from orchestrator.plugins import Plugins


class LazyPlugins:
    """Plugins that are loaded on first use, by default the installed ones."""

    def __init__(self, loaded: Plugins | None, environ: Mapping[str, str], untrusted: Sequence[Path]) -> None:
        """Use `loaded` if given; `untrusted` are the folders whose plugins are skipped."""
        self._loaded, self._environ, self._untrusted = loaded, environ, untrusted

    def get(self) -> Plugins:
        """Return the plugins. Blocks on first use."""
        if self._loaded is None:
            from orchestrator.plugins import load_plugins  # noqa: PLC0415  slow; commands that show a run need no plugin

            self._loaded = load_plugins(self._environ, self._untrusted)
        return self._loaded

    async def load(self) -> Plugins:
        """Return the plugins without blocking the event loop."""
        return await anyio.to_thread.run_sync(self.get) if self._loaded is None else self._loaded


@dataclass(frozen=True, slots=True)
class ProjectContext:
    """An open project; `environ` is used instead of the process's environment."""

    project: Project
    store: Store
    url: str
    """The URL of the store."""
    clock: Clock
    environ: Mapping[str, str]
    plugins: LazyPlugins
    follows_file: bool = False
    """Whether the store comes from the run's file or the project; False if the user has chosen another store."""
    unreadable: list[str] = field(default_factory=list)
    """Errors of the runs that the last listing of all runs had to skip."""

    @property
    def followed_store(self) -> Store:
        """The store for followers of the log, which waits while a server is unreachable."""
        return offline.waiting_store(self.store, self.clock)

    @property
    def damage(self) -> tuple[str, ...]:
        """The damage found since the state was opened, and errors of unreadable runs."""
        return (*(one.describe() for one in self.store.damage), *self.unreadable)

    async def check_writable(self) -> None:
        """Raise RefusedError if the store is read-only: opened from outside its project."""
        await anyio.to_thread.run_sync(self._check_folder)

    async def join_project(self) -> None:
        """Make a folder outside any project one of this store, so that this machine can work in its runs there."""
        await anyio.to_thread.run_sync(self._join_project)

    def _join_project(self) -> None:
        if self.project.folder.is_dir() or self.store.local_paths():
            return
        self.project.create()
        self.use_store(self.url)

    def use_store(self, url: str | None) -> None:
        """Let the project use a store by default, and trust it; None means its own. Blocks."""
        if url is not None:
            record_store_use(url, council_home(self.environ))
        self.project.set_store_url(url)

    def _check_folder(self) -> None:
        if not self.project.folder.is_dir():
            find_project(self.project.top)


class StopSignal:
    """A signal that stops the active runs of a council, and runs that start later."""

    def __init__(self) -> None:
        self._callbacks: set[Callable[[], None]] = set()
        self.is_set = False

    def set(self) -> None:
        """Stop all active runs."""
        self.is_set = True
        for stop in list(self._callbacks):
            stop()

    def add(self, stop: Callable[[], None]) -> None:
        """Call `stop` when the signal is set, or immediately if it is set already."""
        self._callbacks.add(stop)
        if self.is_set:
            stop()

    def remove(self, stop: Callable[[], None]) -> None:
        """Undo `add`."""
        self._callbacks.discard(stop)
