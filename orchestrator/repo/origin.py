"""Whom a hub is for: the repository, and the projects whose state knows of its runs.

Recorded in the hub itself, so that it can be told when nobody is left who could need it: the state that names a hub
is in the user's repository and goes with it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

_FILE = "origin.json"


@dataclass(frozen=True, slots=True)
class Place:
    """A path of the user's, and the mount point that it was beneath."""

    path: Path
    mount: Path

    @classmethod
    def of(cls, path: Path) -> Place:
        """Return a path that exists as a place."""
        path = path.resolve()
        return cls(path, next(folder for folder in (path, *path.parents) if os.path.ismount(folder)))

    def is_gone(self) -> bool:
        """Whether it was removed; false also where that can't be told: a disk that is not mounted is not gone."""
        try:
            self.path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return os.path.ismount(self.mount)
        except OSError:
            return False
        return False


@dataclass(frozen=True, slots=True)
class Origin:
    """`name` is the repository's git directory or URL, `source` its place (None for a URL), `states` all state logs."""

    name: str
    source: Place | None
    states: tuple[Place, ...]

    def is_gone(self) -> bool:
        """Whether neither the repository nor any state that knows of its runs is on this machine any more."""
        return (self.source is None or self.source.is_gone()) and all(one.is_gone() for one in self.states)


@dataclass(frozen=True, slots=True)
class User:
    """Who uses a hub: the repository's identity, its git directory if it is on this machine, the project's state.

    The latter is None for who only looks whether a run would be possible.
    """

    name: str
    git_dir: Path | None
    state: Path | None


def record(root: Path, user: User) -> None:
    """Add a user to a hub's origin; the caller holds the hub's lock. Blocks."""
    before = read(root)
    known = () if before is None else before.states
    new = () if user.state is None else (Place.of(user.state),)
    after = Origin(
        user.name,
        None if user.git_dir is None else Place.of(user.git_dir),
        (*known, *(state for state in new if state not in known)),
    )
    if after == before:
        return
    staged = root / f"{_FILE}.new"
    staged.write_text(json.dumps(_encoded(after)))
    staged.replace(root / _FILE)


def read(root: Path) -> Origin | None:
    """Return whom a hub is for; None if that is not known. Blocks."""
    try:
        found = json.loads((root / _FILE).read_bytes())
        source = None if found["source"] is None else _place(found["source"])
        return Origin(found["name"], source, tuple(_place(one) for one in found["states"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _encoded(origin: Origin) -> dict[str, object]:
    def pair(place: Place) -> list[str]:
        return [str(place.path), str(place.mount)]

    source = None if origin.source is None else pair(origin.source)
    return {"name": origin.name, "source": source, "states": [pair(one) for one in origin.states]}


def _place(pair: list[str]) -> Place:
    path, mount = pair
    return Place(Path(path), Path(mount))
