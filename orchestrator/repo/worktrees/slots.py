"""Worktree slots: checkouts, with setup files, that sessions and checks reuse.

    <hub>/slots/<number>/
      tree/         the checkout, whose path never changes
      git/          our git directory with its index; the rest is the trusted repository's
      record.json   the slot's contents; exists only while the slot is clean and unassigned
      stamps.json   the file snapshot that belongs to the record
      user          the slot's current or last session
      made.json     setup files that git does not ignore
      tmp/          temporary files of the setup commands

A slot without a record is assigned or in an unknown state. It is assigned while its lock is held, or while the session
named in `user` exists; then the slot may be the only copy of that session's work. Otherwise it is removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import anyio.to_thread

from orchestrator.domain.runs.leftovers import LeftoverStatus, assess_slot_state
from orchestrator.repo.worktrees.files.change_detection import TreeSnapshot
from orchestrator.repo.worktrees.files.file_trees import remove_all
from orchestrator.repo.worktrees.hub import Hub, is_inside_hub
from orchestrator.system.file_lock import FileLock
from orchestrator.system.files import atomic_write


@dataclass(frozen=True, slots=True, order=True)
class WorktreeSlot:
    """The paths of a slot."""

    hub: Hub = field(compare=False)
    number: int

    @property
    def root(self) -> Path:
        """The slot's folder."""
        return self.hub.slots / str(self.number)

    @property
    def tree(self) -> Path:
        """The checkout."""
        return self.root / "tree"

    @property
    def git_dir(self) -> Path:
        """Our git directory for the checkout, hidden from sessions."""
        return self.root / "git"

    @property
    def index(self) -> Path:
        """The index of the checkout as of assignment."""
        return self.git_dir / "index"

    @property
    def is_sparse(self) -> bool:
        """Whether only some folders are checked out. Reads the disk."""
        return (self.git_dir / "info" / "sparse-checkout").is_file()

    @property
    def scratch(self) -> Path:
        """The folder for temporary files of setup commands."""
        return self.root / "tmp"

    @property
    def lock(self) -> FileLock:
        """The lock held by the process that assigns or cleans the slot."""
        return self.hub.lock(f"slot-{self.number}")

    @property
    def env(self) -> dict[str, str]:
        """The environment for git commands on the checkout."""
        return {"GIT_WORK_TREE": str(self.tree)}


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """The contents of a clean slot: a commit, and the files that are not part of it."""

    commit: str
    sparse: tuple[str, ...] = ()
    """The folders that are checked out; all if empty."""
    setup: tuple[str, ...] = ()
    """The keys of the setup steps that ran (`sessions.setup.worktree_setup`)."""
    setup_at: str = ""
    """The commit that was checked out when setup ran; empty without setup."""
    is_check: bool = False
    """Whether the slot is for checks and was never used by a session."""
    extras: tuple[str, ...] = ()
    """The setup files, which are not in a commit."""
    unignored: tuple[str, ...] = ()
    """The setup files that git does not ignore."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Preserved ignored files and folders, each with its adapter; empty means all adapters."""
    bytes: int = 0
    """The bytes on disk when last measured."""
    used: float = 0.0
    """The time when the slot was last cleaned (wall-clock seconds)."""

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> SlotRecord:
        """Parse a record. Raises KeyError, TypeError or ValueError if damaged."""
        lists = {name: tuple(stored[name]) for name in ("sparse", "setup", "extras", "unignored")}
        return cls(**{**stored, **lists, "kept": dict(stored["kept"])})


def list_slots(hub: Hub) -> list[WorktreeSlot]:
    """Return all slots of a hub, in any state. Blocks."""
    return sorted(WorktreeSlot(hub, int(path.name)) for path in _within(hub, hub.slots) if path.name.isdecimal())


def read_record(slot: WorktreeSlot) -> SlotRecord | None:
    """Return a clean slot's record; None if it is not clean or unknown. Blocks."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return SlotRecord.of_json(json.loads((slot.root / "record.json").read_bytes()))
    return None


def read_snapshot(slot: WorktreeSlot) -> TreeSnapshot | None:
    """Return the file snapshot that belongs to a slot's record. Blocks."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return TreeSnapshot.of_json(slot.tree, json.loads((slot.root / "stamps.json").read_bytes()))
    return None


def write_record(slot: WorktreeSlot, record: SlotRecord, snapshot: TreeSnapshot) -> None:
    """Mark a clean slot as available. The caller must hold its lock. Blocks."""
    _write_json(slot.root / "stamps.json", snapshot.to_json())
    _write_json(slot.root / "record.json", asdict(record))


def assign_slot(slot: WorktreeSlot, session: Path, record: SlotRecord) -> None:
    """Assign a slot to a session. Blocks.

    The caller must hold the slot's lock, and may use the slot only if this returns.
    """
    atomic_write(slot.root / "user", os.fsencode(session), is_locked=True)
    (slot.root / "record.json").unlink(missing_ok=True)
    _write_json(slot.root / "made.json", {"unignored": record.unignored})


def read_setup_files(slot: WorktreeSlot) -> tuple[str, ...]:
    """Return the setup files in a session's slot that git does not ignore. Blocks."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return tuple(json.loads((slot.root / "made.json").read_bytes())["unignored"])
    return ()


def read_slot_session(slot: WorktreeSlot) -> Path | None:
    """Return the existing session folder that refers to this slot, or None. Blocks."""
    with suppress(OSError):
        session = Path(os.fsdecode((slot.root / "user").read_bytes()))
        if session.is_relative_to(slot.hub.sessions) and read_session_slot(slot.hub, session) == slot:
            return session
    return None


def read_session_slot(hub: Hub, session: Path) -> WorktreeSlot | None:
    """Return the slot that a session's folder refers to. Blocks briefly."""
    with suppress(OSError):
        target = (session / "slot").readlink()
        if target.parent == hub.slots and target.name.isdecimal():
            return WorktreeSlot(hub, int(target.name))
    return None


def assess_slot(slot: WorktreeSlot) -> tuple[LeftoverStatus, str] | None:
    """Assess a slot that is unlocked, or locked by the caller. Blocks."""
    return assess_slot_state(is_clean=read_record(slot) is not None, has_session=read_slot_session(slot) is not None)


def move_to_trash(hub: Hub, folder: Path) -> list[Path]:
    """Move a folder to the trash; return its new path. Blocks briefly.

    A missing folder is not an error.
    """
    hub.trash.mkdir(mode=0o700, exist_ok=True)
    target = hub.trash / f"{folder.name}-{token_hex(8)}"
    with suppress(FileNotFoundError):
        folder.rename(target)
        return [target]
    return []


async def empty_trash(hub: Hub, environ: Mapping[str, str], keep_fds: Sequence[int] = ()) -> None:
    """Delete the trash. Safe to run concurrently.

    Raises GitError if part of it can't be deleted.
    """
    entries = await anyio.to_thread.run_sync(_within, hub, hub.trash)
    if entries:
        await remove_all(entries, environ, keep_fds)


def _within(hub: Hub, folder: Path) -> list[Path]:
    """Return the entries of a folder in the hub; empty if a link leads out of the hub."""
    is_ours = folder.is_dir() and is_inside_hub(hub, folder / "any")
    return list(folder.iterdir()) if is_ours else []


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    atomic_write(path, json.dumps(value, separators=(",", ":")), is_locked=True)
