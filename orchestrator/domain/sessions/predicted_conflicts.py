"""Predicted merge conflicts between the unfinished work of sessions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

from orchestrator.domain.sessions.contexts import SessionContext, filter_active
from orchestrator.domain.wording import join_names

#: The maximum number of recorded paths of a conflict; the others are only counted.
MAX_PATHS: Final = 20


@dataclass(frozen=True)
class ChangedPaths:
    """The files that a session changed or added, and those that it removed."""

    present: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()

    @cached_property
    def files(self) -> frozenset[str]:
        """All of these files."""
        return self.present | self.removed

    @cached_property
    def folders(self) -> frozenset[str]:
        """The folders above them, including the top folder, which is empty."""
        return frozenset(_parents(self.files))

    @cached_property
    def left_folders(self) -> frozenset[str]:
        """The folders from which files were removed, perhaps because the folder was renamed."""
        return frozenset(path.rpartition("/")[0] for path in self.removed)

    def __or__(self, other: ChangedPaths) -> ChangedPaths:
        """Return the changes of both."""
        return ChangedPaths(self.present | other.present, self.removed | other.removed)

    def with_renames(self, renames: Mapping[str, str]) -> ChangedPaths:
        """Return the changes with the other names of the changed files in addition."""
        names = frozenset(renames[path] for path in self.files & renames.keys())
        return self | ChangedPaths(names) if names else self

    def may_conflict(self, other: ChangedPaths) -> bool:
        """Return whether a merge of both can conflict.

        It can if both changed one file, if a file of one is a folder of the other, or if one perhaps renamed a folder
        in which the other changed files.
        """
        return not (
            self.files.isdisjoint(other.files)
            and self.files.isdisjoint(other.folders)
            and other.files.isdisjoint(self.folders)
            and self.left_folders.isdisjoint(other.folders)
            and other.left_folders.isdisjoint(self.folders)
        )

    def select_causes(self, new: Collection[str], before: ChangedPaths, *, are_edits: bool) -> ChangedPaths:
        """Return the changes that may have caused another merge result, since the paths `new` changed.

        `before` is the state before that. `are_edits` means that all of these files existed at the start and still do.
        Other changes, together with removals, may be renames, so that any of the files may be merged in another way.
        """
        if not are_edits and (self.removed or before.removed):
            return before | self | ChangedPaths(frozenset(new))
        return ChangedPaths(frozenset(new))


def _parents(files: Iterable[str]) -> Iterable[str]:
    found: set[str] = set()
    for path in files:
        folder = path.rpartition("/")[0]
        while folder not in found:
            found.add(folder)
            folder = folder.rpartition("/")[0]
    return found


class PredictedConflict(NamedTuple):
    """A merge conflict between the unfinished work of two tasks."""

    tasks: tuple[str, str]
    """Both tasks, sorted."""
    paths: tuple[str, ...]
    """The conflicting paths, sorted; at most 20."""


def list_conflicts(contexts: Iterable[SessionContext]) -> list[PredictedConflict]:
    """Return the predicted conflicts between active sessions of one run, sorted."""
    active = {context.task: context.conflicts for context in filter_active(contexts)}
    pairs: dict[tuple[str, str], set[str]] = {}
    for task, conflicts in active.items():
        for other in conflicts.keys() & active.keys():
            pairs.setdefault((min(task, other), max(task, other)), set()).update(conflicts[other])
    return [PredictedConflict(tasks, tuple(sorted(paths))) for tasks, paths in sorted(pairs.items())]


def describe_rebase(landed: Mapping[str, Collection[str]]) -> str:
    """Return a note for the session that continues on landed work: the conflicting paths, by landed task."""
    paths = {path for one in landed.values() for path in one}
    return (
        f"The previous session was stopped, because the work of {join_names(landed)} has landed, and the unfinished "
        f"changes of this task conflicted with it in {join_names(sorted(paths), MAX_PATHS)}. This worktree contains "
        "the newest commit of the target branch. Continue the task there, and keep what has landed."
    )


def describe_conflict(other: str, paths: Collection[str]) -> str:
    """Return a message for the agent of a task: its changes conflict with those of the task `other`."""
    return (
        f"Merge conflict ahead: your changes conflict with the unfinished changes of task {other} in "
        f"{join_names(sorted(paths), MAX_PATHS)}. One of you lands first, and the other one then has to merge. "
        f"`council ask {other}` shows its changes. If your task allows it, change other lines or files."
    )
