"""What killed commands leave in and beside our repositories: temporary files and folders, lock files, half-built hubs.

None of it holds anything that is not elsewhere. That nobody uses it is known from no git command running for the
repository, and, of what other commands of ours make, from its age as well.
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
_LIVE_DIFF = re.compile(r".+\.live-[a-z0-9_]{8}")  # as `repo.intake.diffs` has tempfile name it
#: All that a hub consists of.
_PARTS = frozenset(
    {
        "hub.git",
        "trusted.git",
        "session.git",
        "sessions",
        "indexes",
        "places",
        "trash",
        "locks",
        "origin.json",
        "origin.json.new",
    }
)


def list_hubs(home: Path) -> list[Hub]:
    """Return the hubs in the folder for all of them. Blocks."""
    found = [path for path in sorted(home.iterdir()) if not path.is_symlink()] if home.is_dir() else []
    return [Hub(path) for path in found if _HUB.fullmatch(path.name) and (path / "trusted.git").is_dir()]


def list_incomplete_hubs(home: Path) -> list[Hub]:
    """Return the hubs whose making or removal was cut off, or is under way. Blocks."""
    found = sorted(home.iterdir()) if home.is_dir() else []
    hubs = [Hub(path.with_name(path.name.removesuffix(".new"))) for path in found if path.name.endswith(".new")]
    return [hub for hub in hubs if _HUB.fullmatch(hub.root.name) and _is_part_of_one(hub.unfinished)]


def _is_part_of_one(folder: Path) -> bool:
    """Whether a folder holds what we make, and nothing of anybody else."""
    return folder.is_dir() and not folder.is_symlink() and {path.name for path in folder.iterdir()} <= _PARTS


def list_stale_files(hub: Hub, now: float) -> list[Path]:
    """Return the temporary files and locks in a hub that are of nobody who lives; `now` is the wall clock. Blocks."""
    gits = {
        file.path
        for file in (*list_lock_files(hub), *list_partial_objects(hub.trusted))
        if is_inside_hub(hub, file.path)
    }
    found = [path for path in dict.fromkeys(_temporaries(hub)) if is_inside_hub(hub, path)]
    stale = gits.union(path for path in found if is_stale_file(_modified(path, now), now))
    return sorted(stale) if stale and not is_git_running(hub.trusted) else []


def _temporaries(hub: Hub) -> Iterator[Path]:
    yield from hub.trusted.glob("objects.*")  # where kept work was about to be applied
    yield from hub.root.glob("*.json.new")
    yield from hub.trash.glob("*")
    sessions = {f"{path.parent.name}-{path.name}" for path in hub.sessions.glob("*/*")}
    for path in hub.indexes.glob("*"):
        if (path.is_dir() and _LIVE_DIFF.fullmatch(path.name)) or not _owners(path.name) & sessions:
            yield path


def _owners(name: str) -> set[str]:
    """Return all that the session can be called whose index, or file beside it, has this name."""
    parts = name.split(".")
    return {".".join(parts[: end + 1]) for end in range(len(parts))}


def _modified(path: Path, now: float) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return now
