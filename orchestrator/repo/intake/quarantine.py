"""Objects of an agent's that are not admitted yet: a folder of their own beside the hub's, which borrows nothing."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from orchestrator.repo.git.loose_objects import has_valid_hash


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A folder of objects; `hub` is the folder of objects that they enter when they are admitted."""

    objects: Path
    hub: Path

    def empty(self) -> None:
        """Make it, or empty it of what an earlier attempt left. Blocks."""
        shutil.rmtree(self.objects, ignore_errors=True)
        (self.objects / "pack").mkdir(mode=0o700, parents=True)

    @property
    def folders(self) -> tuple[Path, Path]:
        """Where objects may be that were written here, unless they were there before."""
        return self.objects, self.hub

    @property
    def read_env(self) -> dict[str, str]:
        """What lets git see these objects too."""
        return {"GIT_ALTERNATE_OBJECT_DIRECTORIES": str(self.objects)}

    @property
    def write_env(self) -> dict[str, str]:
        """What makes git write new objects here, and see those of the hub."""
        return {"GIT_OBJECT_DIRECTORY": str(self.objects), "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(self.hub)}

    def admit_objects(self, refused: Collection[str] = ()) -> None:
        """Move the objects that are files of their own into the hub, except the refused ones. Safe to repeat. Blocks.

        Each is hashed first: what wrote it looked at an agent's files, so its name proves nothing. Raises OSError for
        one that is not what its name says.
        """
        for folder in self.objects.glob("[0-9a-f][0-9a-f]"):
            target = self.hub / folder.name
            target.mkdir(exist_ok=True)
            for file in folder.iterdir():
                name = f"{folder.name}{file.name}"
                if name in refused:
                    continue
                if not has_valid_hash(file, name):
                    raise OSError(f"object {name} is not what its name says")
                file.rename(target / file.name)

    def admit_packs(self) -> None:
        """Move the packs, whose indexes `git index-pack` has written here, into the hub. Safe to repeat. Blocks."""
        packs = self.hub / "pack"
        packs.mkdir(exist_ok=True)
        # git looks for the .idx: the pack must be there first.
        for suffix in (".pack", ".rev", ".idx"):
            for part in (self.objects / "pack").glob(f"pack-*{suffix}"):
                part.rename(packs / part.name)
