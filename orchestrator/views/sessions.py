"""Which tasks are at work, and the files that say so. What looks at the disk blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.protocols import Document, Key
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.views.content import ActiveTask, ViewChanges, active_task, context_view, ownership_view
from orchestrator.views.names import OWNERSHIP, context_path


class ActiveSessions:
    """The tasks at work in all runs, and what their files say so far."""

    def __init__(self) -> None:
        self.hubs: dict[str, Path | None] = {}
        """Where the repositories of a run are, as far as it was asked for."""
        self.has_missing_worktree = False
        """Whether a session was about to get its worktree when it was last looked at."""
        self._working: dict[Key, ActiveTask] = {}
        self._written: dict[str, bytes] = {}

    def take(self, documents: Mapping[Key, Document | None], specs: Mapping[Key, Document | None]) -> None:
        """Take the newest documents of tasks, with what each was asked to do."""
        for key, document in documents.items():
            found = None if document is None else active_task(document, specs.get(key))
            if found is not None:
                self._working[key] = found
            else:
                self._working.pop(key, None)

    def set_run(self, run: str, document: Document | None) -> None:
        """Take what is recorded of a run."""
        hub = None if document is None or document.damaged else document.value.get("hub")
        self.hubs[run] = Path(hub) if isinstance(hub, str) else None

    def changes(self) -> ViewChanges:
        """Return what is to be written since this was asked last."""
        files = {OWNERSHIP: ownership_view(self._working.values())}
        self.has_missing_worktree = False
        for key, one in self._working.items():
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
        place = None if hub is None else Worktree(Hub(hub), one.run, one.task, one.attempt.number).slot
        return None if place is None else str(place.tree)
