"""Quarantine an agent's objects, without alternates, until they are accepted."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from orchestrator.repo.git.loose_objects import has_valid_hash


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A folder for new objects, which move to the object folder `hub` once accepted."""

    objects: Path
    hub: Path

    def empty(self) -> None:
        """Create the folder, or remove the objects of an earlier attempt. Blocks."""
        shutil.rmtree(self.objects, ignore_errors=True)
        (self.objects / "pack").mkdir(mode=0o700, parents=True)

    @property
    def folders(self) -> tuple[Path, Path]:
        """The folders that may contain an object written here: this one and the hub."""
        return self.objects, self.hub

    @property
    def read_env(self) -> dict[str, str]:
        """The environment that lets git also read these objects."""
        return {"GIT_ALTERNATE_OBJECT_DIRECTORIES": str(self.objects)}

    @property
    def write_env(self) -> dict[str, str]:
        """The environment that makes git write new objects here and read those of the hub."""
        return {"GIT_OBJECT_DIRECTORY": str(self.objects), "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(self.hub)}

    def admit_objects(self, refused: Collection[str] = ()) -> None:
        """Move the loose objects into the hub, except the refused ones. Blocks.

        Safe to repeat. Each object is hashed first: its writer processed an agent's files, so its name proves nothing.
        Raises OSError if an object's content does not match its name.
        """
        for folder in self.objects.glob("[0-9a-f][0-9a-f]"):
            target = self.hub / folder.name
            target.mkdir(exist_ok=True)
            for file in folder.iterdir():
                name = f"{folder.name}{file.name}"
                if name in refused:
                    continue
                if not has_valid_hash(file, name):
                    raise OSError(f"object {name} does not match its name")
                file.rename(target / file.name)

    def admit_packs(self) -> None:
        """Move packs indexed by `git index-pack` into the hub. Safe to repeat. Blocks."""
        packs = self.hub / "pack"
        packs.mkdir(exist_ok=True)
        # git looks for the .idx: the pack must be there first.
        for suffix in (".pack", ".rev", ".idx"):
            for part in (self.objects / "pack").glob(f"pack-*{suffix}"):
                part.rename(packs / part.name)
