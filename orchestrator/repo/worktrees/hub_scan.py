"""Find temporary files, lock files and incomplete hubs of killed commands.

None of them is the only copy of any data. They are unused if no git command is running for the repository and, for
files of our other commands, if they are old enough.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from orchestrator.domain.runs.leftovers import is_stale_file
from orchestrator.repo.git.stale_files import is_git_running, list_partial_objects
from orchestrator.repo.worktrees.hub import Hub, is_inside_hub
from orchestrator.repo.worktrees.worktrees import list_lock_files

_HUB = re.compile(r".+-[0-9a-f]{12}")
_LIVE_DIFF = re.compile(r".+\.live-[a-z0-9_]{8}")  # the prefix that `repo.intake.diffs` passes to tempfile
#: The entries of a hub.
_PARTS = frozenset(
    {
        "hub.git",
        "trusted.git",
        "session.git",
        "sessions",
        "indexes",
        "slots",
        "trash",
        "locks",
        "origin.json",
        "origin.json.new",
    }
)


def list_hubs(home: Path) -> list[Hub]:
    """Return the hubs in the home folder. Blocks."""
    folders = [path for path in sorted(home.iterdir()) if not path.is_symlink()] if home.is_dir() else []
    return [Hub(path) for path in folders if _HUB.fullmatch(path.name) and (path / "trusted.git").is_dir()]


def list_incomplete_hubs(home: Path) -> list[Hub]:
    """Return the hubs whose creation or removal is running or was interrupted. Blocks."""
    paths = sorted(home.iterdir()) if home.is_dir() else []
    hubs = [Hub(path.with_name(path.name.removesuffix(".new"))) for path in paths if path.name.endswith(".new")]
    return [hub for hub in hubs if _HUB.fullmatch(hub.root.name) and _has_only_hub_parts(hub.staging_root)]


def _has_only_hub_parts(folder: Path) -> bool:
    """Return whether a folder contains only parts of a hub."""
    return folder.is_dir() and not folder.is_symlink() and {path.name for path in folder.iterdir()} <= _PARTS


def list_trash(hub: Hub) -> list[Path]:
    """Return the folders in a hub's trash, even while they are deleted. Blocks."""
    return [path for path in sorted(hub.trash.glob("*")) if is_inside_hub(hub, path)]


def list_stale_files(hub: Hub, now: float) -> list[Path]:
    """Return a hub's temporary files and locks without an owner at `now`. Blocks."""
    git_files = {
        file.path
        for file in (*list_lock_files(hub), *list_partial_objects(hub.trusted))
        if is_inside_hub(hub, file.path)
    }
    temporaries = [path for path in dict.fromkeys(_temporaries(hub)) if is_inside_hub(hub, path)]
    stale = git_files.union(path for path in temporaries if is_stale_file(_modified(path, now), now))
    return sorted(stale) if stale and not is_git_running(hub.trusted) else []


def _temporaries(hub: Hub) -> Iterator[Path]:
    yield from hub.trusted.glob("objects.*")  # temporary objects of an interrupted `council salvage apply`
    yield from hub.root.glob("*.json.new")
    sessions = {f"{path.parent.name}-{path.name}" for path in hub.sessions.glob("*/*")}
    for path in hub.indexes.glob("*"):
        if (path.is_dir() and _LIVE_DIFF.fullmatch(path.name)) or not _owners(path.name) & sessions:
            yield path


def _owners(name: str) -> set[str]:
    """Return the sessions that an entry of the `indexes` folder may belong to."""
    parts = name.split(".")
    return {".".join(parts[: end + 1]) for end in range(len(parts))}


def _modified(path: Path, now: float) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return now
