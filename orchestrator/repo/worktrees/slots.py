"""The checkouts that sessions and checks take turns in: a place keeps its path, and what setup made there, for life.

    <hub>/places/<number>/
      tree/         the checkout
      git/          a git directory of ours, with its index; the rest is the trusted repository's
      record.json   what it holds; there only while it is clean and nobody's
      stamps.json   which files it consists of, as far as the record goes
      user          the session that has or had it
      made.json     which of its files are no session's work
      tmp/          temporary files of the commands that set it up

A place without a record is somebody's, or of unknown state. It is somebody's while its lock is held, or while the
session that `user` names is there: then what it holds may be nowhere else. Otherwise it is thrown away.
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

from orchestrator.domain.runs.leftovers import LeftoverStatus, judge_slot
from orchestrator.repo.worktrees.change_detection import TreeSnapshot
from orchestrator.repo.worktrees.hub import Hub, is_inside_hub
from orchestrator.repo.worktrees.removal import remove_all
from orchestrator.system.file_lock import FileLock


@dataclass(frozen=True, slots=True, order=True)
class WorktreeSlot:
    """Where one checkout is."""

    hub: Hub = field(compare=False)
    number: int

    @property
    def root(self) -> Path:
        """The folder of all of it."""
        return self.hub.places / str(self.number)

    @property
    def tree(self) -> Path:
        """The checkout."""
        return self.root / "tree"

    @property
    def git_dir(self) -> Path:
        """Our own git directory of the checkout; no session sees it."""
        return self.root / "git"

    @property
    def index(self) -> Path:
        """The index of the checkout as it was handed out."""
        return self.git_dir / "index"

    @property
    def is_sparse(self) -> bool:
        """Whether only some folders are checked out. A look at the disk."""
        return (self.git_dir / "info" / "sparse-checkout").is_file()

    @property
    def scratch(self) -> Path:
        """A place for temporary files of what sets it up."""
        return self.root / "tmp"

    @property
    def lock(self) -> FileLock:
        """Held by whoever hands it to a session, or cleans it."""
        return self.hub.lock(f"place-{self.number}")

    @property
    def env(self) -> dict[str, str]:
        """What points a git command in `git_dir` at the checkout."""
        return {"GIT_WORK_TREE": str(self.tree)}


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """What a clean place holds beside the files of a commit."""

    commit: str
    sparse: tuple[str, ...] = ()
    """The folders that are checked out; all if empty."""
    setup: tuple[str, ...] = ()
    """What the commands were that set it up, as `repo.worktrees.setup_keys` tells them apart."""
    setup_at: str = ""
    """The commit whose files were there when they ran; empty without any."""
    is_check: bool = False
    """Whether checks run in it, and no session ever did."""
    extras: tuple[str, ...] = ()
    """The files that those made, which are in no commit."""
    unignored: tuple[str, ...] = ()
    """Those of them that git does not ignore."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Ignored files and folders that stay, each with the adapter for whose sessions alone; empty is all."""
    bytes: int = 0
    """What it took on disk when that was last measured."""
    used: float = 0.0
    """When it was last cleaned (wall-clock seconds)."""

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> SlotRecord:
        """Return a record as it was stored; raises KeyError, TypeError or ValueError where it is damaged."""
        lists = {name: tuple(stored[name]) for name in ("sparse", "setup", "extras", "unignored")}
        return cls(**{**stored, **lists, "kept": dict(stored["kept"])})


def list_slots(hub: Hub) -> list[WorktreeSlot]:
    """Return all places of a hub, in whatever state. Blocks."""
    return sorted(WorktreeSlot(hub, int(path.name)) for path in _within(hub, hub.places) if path.name.isdecimal())


def read_record(place: WorktreeSlot) -> SlotRecord | None:
    """Return what a clean place holds; None where it is not clean, or nobody knows. Blocks."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return SlotRecord.of_json(json.loads((place.root / "record.json").read_bytes()))
    return None


def read_snapshot(place: WorktreeSlot) -> TreeSnapshot | None:
    """Return the stamps that belong to a place's record. Blocks."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return TreeSnapshot.of_json(place.tree, json.loads((place.root / "stamps.json").read_bytes()))
    return None


def write_record(place: WorktreeSlot, record: SlotRecord, stamps: TreeSnapshot) -> None:
    """Have a place that is clean be anybody's; the caller holds its lock. Blocks."""
    _write_json(place.root / "stamps.json", stamps.to_json())
    _write_json(place.root / "record.json", asdict(record))


def assign_slot(place: WorktreeSlot, session: Path, record: SlotRecord) -> None:
    """Make a place that of a session; the caller holds its lock, and goes on only if this returns. Blocks."""
    staged = place.root / "user.new"
    staged.write_bytes(os.fsencode(session))
    staged.rename(place.root / "user")
    (place.root / "record.json").unlink(missing_ok=True)
    _write_json(place.root / "made.json", {"unignored": record.unignored})


def read_setup_files(place: WorktreeSlot) -> tuple[str, ...]:
    """Return the files that setup made in a session's place and git does not ignore. Blocks."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return tuple(json.loads((place.root / "made.json").read_bytes())["unignored"])
    return ()


def read_slot_session(place: WorktreeSlot) -> Path | None:
    """Return the folder of the session that a place belongs to, if that is there and says the same. Blocks."""
    with suppress(OSError):
        session = Path(os.fsdecode((place.root / "user").read_bytes()))
        if session.is_relative_to(place.hub.sessions) and read_session_slot(place.hub, session) == place:
            return session
    return None


def read_session_slot(hub: Hub, session: Path) -> WorktreeSlot | None:
    """Return the place that a session's folder names. Blocks, for a moment."""
    with suppress(OSError):
        target = (session / "place").readlink()
        if target.parent == hub.places and target.name.isdecimal():
            return WorktreeSlot(hub, int(target.name))
    return None


def assess_slot(place: WorktreeSlot) -> tuple[LeftoverStatus, str] | None:
    """Judge a place that nobody else has the lock of, as `judge_slot` does. Blocks."""
    return judge_slot(is_clean=read_record(place) is not None, has_session=read_slot_session(place) is not None)


def move_to_trash(hub: Hub, folder: Path) -> list[Path]:
    """Move a folder to where it waits for its deletion, in an instant however much is in it; return that. Blocks.

    One that is not there is no mistake.
    """
    hub.trash.mkdir(mode=0o700, exist_ok=True)
    waits = hub.trash / f"{folder.name}-{token_hex(8)}"
    with suppress(FileNotFoundError):
        folder.rename(waits)
        return [waits]
    return []


async def empty_trash(hub: Hub, environ: Mapping[str, str], keep_fds: Sequence[int] = ()) -> None:
    """Delete what was thrown away; GitError if not all of it can be. Safe side by side with others that do so."""
    found = await anyio.to_thread.run_sync(_within, hub, hub.trash)
    if found:
        await remove_all(found, environ, keep_fds)


def _within(hub: Hub, folder: Path) -> list[Path]:
    """Return what is in a folder of a hub; nothing where a link leads elsewhere."""
    is_ours = folder.is_dir() and is_inside_hub(hub, folder / "any")
    return list(folder.iterdir()) if is_ours else []


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    staged = path.with_name(f"{path.name}.new")
    staged.write_text(json.dumps(value, separators=(",", ":")))
    staged.rename(path)
