"""Whom a hub is for: the repository, and the stores that know of its runs.

Recorded in the hub itself, so that it can be told when nobody is left who could need it: the state that names a hub
is in the user's repository and goes with it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.store import folder_url, store_folder

_FILE = "origin.json"
_PASSWORD = re.compile(r"//[^/@]*@")


@dataclass(frozen=True, slots=True)
class MountedPath:
    """A path of the user's, and the mount point that it was beneath."""

    path: Path
    mount: Path

    @classmethod
    def of(cls, path: Path) -> MountedPath:
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
class StoreLocation:
    """Where a store is: its URL, by which it is known, and its folder if it is in one."""

    url: str
    folder: MountedPath | None

    @classmethod
    def of(cls, url: str) -> StoreLocation:
        """Return where the store of a URL is, which exists; whatever way leads to its folder, it is the same. Blocks.

        Of other stores the URL is kept without what may be a password.
        """
        folder = store_folder(url)
        if folder is None:
            return cls(_PASSWORD.sub("//", url), None)
        place = MountedPath.of(folder)
        return cls(folder_url(place.path), place)

    def is_gone(self) -> bool:
        """Whether it was removed; false also where that can't be told."""
        return self.folder is not None and self.folder.is_gone()


@dataclass(frozen=True, slots=True)
class HubOrigin:
    """`name` is the repository's git directory or URL, `source` its place (None for a URL), `stores` all stores."""

    name: str
    source: MountedPath | None
    stores: tuple[StoreLocation, ...]

    def is_gone(self) -> bool:
        """Whether neither the repository nor any store that knows of its runs is on this machine any more."""
        return (self.source is None or self.source.is_gone()) and all(one.is_gone() for one in self.stores)


@dataclass(frozen=True, slots=True)
class HubUser:
    """Who uses a hub: the repository's identity, its git directory if it is on this machine, the URL of the store.

    The latter is None for who only looks whether a run would be possible.
    """

    name: str
    git_dir: Path | None
    store: str | None


def record_user(root: Path, user: HubUser) -> None:
    """Add a user to a hub's origin; the caller holds the hub's lock. Blocks."""
    before = read_origin(root)
    known = () if before is None else before.stores
    new = () if user.store is None else (StoreLocation.of(user.store),)
    after = HubOrigin(
        user.name,
        None if user.git_dir is None else MountedPath.of(user.git_dir),
        (*known, *(one for one in new if one not in known)),
    )
    if after == before:
        return
    staged = root / f"{_FILE}.new"
    staged.write_text(json.dumps(_encoded(after)))
    staged.replace(root / _FILE)


def read_origin(root: Path) -> HubOrigin | None:
    """Return whom a hub is for; None if that is not known. Blocks."""
    try:
        found = json.loads((root / _FILE).read_bytes())
        source = None if found["source"] is None else _place(found["source"])
        return HubOrigin(found["name"], source, tuple(_store(one) for one in found["stores"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _encoded(origin: HubOrigin) -> dict[str, object]:
    def pair(place: MountedPath) -> list[str]:
        return [str(place.path), str(place.mount)]

    source = None if origin.source is None else pair(origin.source)
    stores = [[one.url, *(pair(one.folder) if one.folder is not None else [])] for one in origin.stores]
    return {"name": origin.name, "source": source, "stores": stores}


def _place(pair: list[str]) -> MountedPath:
    path, mount = pair
    return MountedPath(Path(path), Path(mount))


def _store(columns: list[str]) -> StoreLocation:
    url, *pair = columns
    return StoreLocation(url, _place(pair) if pair else None)
