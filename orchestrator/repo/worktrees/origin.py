"""Record which repository and stores a hub is for.

The record is in the hub itself, because the state that names a hub is in the user's repository and is deleted with it.
The record shows when a hub is no longer needed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config.store import folder_url
from orchestrator.system.files import atomic_write

_FILE = "origin.json"
_PASSWORD = re.compile(r"//[^/@]*@")


@dataclass(frozen=True, slots=True)
class MountedPath:
    """A user's path, and the mount point that contained it."""

    path: Path
    mount: Path

    @classmethod
    def of(cls, path: Path) -> MountedPath:
        """Return the mounted path for an existing path."""
        path = path.resolve()
        return cls(path, next(folder for folder in (path, *path.parents) if os.path.ismount(folder)))

    def is_gone(self) -> bool:
        """Return whether the path was removed; False if its disk may be unmounted."""
        try:
            self.path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return os.path.ismount(self.mount)
        except OSError:
            return False
        return False


@dataclass(frozen=True, slots=True)
class StoreLocation:
    """A store: its URL as identity, and its local paths (`Store.local_paths`)."""

    url: str
    paths: tuple[MountedPath, ...]

    @classmethod
    def of(cls, url: str, paths: Sequence[Path]) -> StoreLocation:
        """Return the location of an existing store, however its paths are spelled. Blocks.

        A store without local paths is identified by its URL without the password.
        """
        mounted = tuple(map(MountedPath.of, paths))
        return cls(folder_url(mounted[0].path) if mounted else _PASSWORD.sub("//", url), mounted)

    def is_gone(self) -> bool:
        """Return whether the store was removed; False if unknown."""
        return bool(self.paths) and all(path.is_gone() for path in self.paths)


@dataclass(frozen=True, slots=True)
class HubOrigin:
    """The repository and stores that a hub is for.

    `name` is the repository's git directory or URL, `source` its path (None for a URL), `stores` all stores that know
    its runs.
    """

    name: str
    source: MountedPath | None
    stores: tuple[StoreLocation, ...]

    def is_gone(self) -> bool:
        """Return whether the repository and all of its stores were removed."""
        return (self.source is None or self.source.is_gone()) and all(store.is_gone() for store in self.stores)


@dataclass(frozen=True, slots=True)
class HubUser:
    """A repository's identity, its git directory if local, and the store.

    `store` is None for a check that starts no run.
    """

    name: str
    git_dir: Path | None
    store: StoreLocation | None


def record_user(root: Path, user: HubUser) -> None:
    """Add a user to a hub's origin. The caller must hold the hub's lock. Blocks."""
    before = read_origin(root)
    known = () if before is None else before.stores
    new = () if user.store is None else (user.store,)
    after = HubOrigin(
        user.name,
        None if user.git_dir is None else MountedPath.of(user.git_dir),
        (*known, *(store for store in new if store not in known)),
    )
    if after == before:
        return
    atomic_write(root / _FILE, json.dumps(_encoded(after)), is_locked=True)


def read_origin(root: Path) -> HubOrigin | None:
    """Return a hub's origin, or None if unknown. Blocks."""
    try:
        stored = json.loads((root / _FILE).read_bytes())
        source = None if stored["source"] is None else _mounted_path(stored["source"])
        return HubOrigin(stored["name"], source, tuple(_store(columns) for columns in stored["stores"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _encoded(origin: HubOrigin) -> dict[str, object]:
    def pair(mounted: MountedPath) -> list[str]:
        return [str(mounted.path), str(mounted.mount)]

    source = None if origin.source is None else pair(origin.source)
    stores = [[store.url, *map(pair, store.paths)] for store in origin.stores]
    return {"name": origin.name, "source": source, "stores": stores}


def _mounted_path(pair: list[str]) -> MountedPath:
    path, mount = pair
    return MountedPath(Path(path), Path(mount))


def _store(columns: list[Any]) -> StoreLocation:
    url, *pairs = columns
    return StoreLocation(url, tuple(map(_mounted_path, pairs)))
