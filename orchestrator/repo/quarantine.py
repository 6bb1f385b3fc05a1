"""Objects of an agent's that are not admitted yet: a folder of their own beside the hub's, which borrows nothing."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path


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
    def reading(self) -> dict[str, str]:
        """What lets git see these objects too."""
        return {"GIT_ALTERNATE_OBJECT_DIRECTORIES": str(self.objects)}

    @property
    def writing(self) -> dict[str, str]:
        """What makes git write new objects here, and see those of the hub."""
        return {"GIT_OBJECT_DIRECTORY": str(self.objects), "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(self.hub)}

    def adopt(self, refused: Collection[str] = ()) -> None:
        """Move the objects into the hub, but for the refused ones. Safe to repeat. Blocks."""
        for folder in self.objects.glob("[0-9a-f][0-9a-f]"):
            target = self.hub / folder.name
            target.mkdir(exist_ok=True)
            for file in folder.iterdir():
                if f"{folder.name}{file.name}" not in refused:
                    file.rename(target / file.name)
        packs = self.hub / "pack"
        packs.mkdir(exist_ok=True)
        # git looks for the .idx: the pack must be there first.
        for suffix in (".pack", ".rev", ".idx"):
            for part in (self.objects / "pack").glob(f"pack-*{suffix}"):
                part.rename(packs / part.name)
