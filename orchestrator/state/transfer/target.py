"""The folder in which a store is about to be filled: what it may not be, and what stays of it where that fails."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

from orchestrator.errors import RefusedError
from orchestrator.state.log.identity import IDENTITY_FILE, find_log

#: What stands in the folder of a store that nothing was ever committed to.
_EMPTY_STORE: Final = ("lock", "compaction.lock")
_REMEDY: Final = "name a folder that is there or can be made"


class TargetFolder:
    """A folder for a whole store that comes from elsewhere. Its methods block."""

    def __init__(self, folder: Path, source: Path | None) -> None:
        """Take a folder, which need not be there yet; `source` is that of the store to copy, if it has one.

        RefusedError where it is inside the source, where no folder can be, and where there are files that are of no
        store: nobody would find them among those of one, nor dare to remove it.
        """
        self._folder = folder
        try:
            self._is_store = find_log(folder) is not None
            self._check(source)
            self._made = [one for one in (folder, *folder.parents) if not one.exists()]
        except OSError as error:
            raise RefusedError(f"{folder} can't be used: {(error.strerror or str(error)).lower()}", _REMEDY) from None

    def _check(self, source: Path | None) -> None:
        folder = self._folder
        there = (one for one in (folder, *folder.parents) if os.path.lexists(one))
        if not (nearest := next(there)).is_dir():
            raise RefusedError(f"{nearest} is no folder", _REMEDY)
        if source is not None and folder != source and folder.resolve().is_relative_to(source.resolve()):
            raise RefusedError(f"{folder} is inside of the store to copy", "name a folder outside of it")
        if not self._is_store and folder.is_dir() and any(folder.iterdir()):
            raise RefusedError(f"{folder} holds other files, and no store", "name a folder that is new or empty")

    def undo(self) -> None:
        """Leave nothing that was made here, unless something was committed to it."""
        if self._is_store or not self._folder.is_dir():
            return
        log = find_log(self._folder)
        if log is not None:
            if log.is_dir() and any(one.name not in _EMPTY_STORE for one in log.iterdir()):
                return
            (self._folder / IDENTITY_FILE).unlink()
            shutil.rmtree(log, ignore_errors=True)
        with suppress(OSError):  # something else has come to it
            for folder in self._made:
                folder.rmdir()
