"""Track active tasks, and compute their files. Methods that read the disk block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.protocols import Document, Key
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.views.content import ActiveTask, ViewChanges, active_task, context_view, ownership_view
from orchestrator.views.names import OWNERSHIP, context_path


class ActiveSessions:
    """The active tasks of all runs, and the last written content of their files."""

    def __init__(self) -> None:
        self.hubs: dict[str, Path | None] = {}
        """The hub of each known run; None if it has none."""
        self.has_missing_worktree = False
        """Whether a session had no worktree yet at the last call of `changes`."""
        self._active: dict[Key, ActiveTask] = {}
        self._written: dict[str, bytes] = {}

    def take(self, documents: Mapping[Key, Document | None], specs: Mapping[Key, Document | None]) -> None:
        """Update the active tasks from their newest documents and specs."""
        for key, document in documents.items():
            task = None if document is None else active_task(document, specs.get(key))
            if task is not None:
                self._active[key] = task
            else:
                self._active.pop(key, None)

    def set_run(self, run: str, document: Document | None) -> None:
        """Record the hub of a run."""
        hub = None if document is None or document.damaged else document.value.get("hub")
        self.hubs[run] = Path(hub) if isinstance(hub, str) else None

    def changes(self) -> ViewChanges:
        """Return the files that have changed since the last call."""
        files = {OWNERSHIP: ownership_view(self._active.values())}
        self.has_missing_worktree = False
        for key, one in self._active.items():
            if one.has_session:
                worktree = self._worktree(one)
                self.has_missing_worktree |= worktree is None and self.hubs.get(one.run) is not None
                files[context_path(key)] = context_view(one, worktree)
        changed = {name: data for name, data in files.items() if self._written.get(name) != data}
        gone = dict.fromkeys(self._written.keys() - files.keys())
        self._written = files
        return ViewChanges({**changed, **gone})

    def _worktree(self, one: ActiveTask) -> str | None:
        hub = self.hubs.get(one.run)
        slot = None if hub is None else Worktree(Hub(hub), one.run, one.task, one.attempt.number).slot
        return None if slot is None else str(slot.tree)
