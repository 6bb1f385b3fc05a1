"""Check the target folder of a copy, and clean it up after a failure."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

from orchestrator.errors import RefusedError
from orchestrator.state.log.identity import IDENTITY_FILE, find_log

#: The files of a store without any commit.
_EMPTY_STORE: Final = ("lock", "compaction.lock")
_REMEDY: Final = "name a folder that exists or can be created"


class TargetFolder:
    """The target folder of a copied store. Its methods block."""

    def __init__(self, folder: Path, source: Path | None) -> None:
        """Check a folder, which need not exist; `source` is the folder of the original, if it has one.

        RefusedError if it is inside the source, can't be a folder, or has files other than those of a store: they would
        be mixed up with the store's files.
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
            raise RefusedError(f"{nearest} is not a folder", _REMEDY)
        if source is not None and folder != source and folder.resolve().is_relative_to(source.resolve()):
            raise RefusedError(f"{folder} is inside of the store to copy", "name a folder outside of it")
        if not self._is_store and folder.is_dir() and any(folder.iterdir()):
            raise RefusedError(f"{folder} has other files, and no store", "name a folder that is new or empty")

    def undo(self) -> None:
        """Remove all created files and folders, unless something was committed."""
        if self._is_store or not self._folder.is_dir():
            return
        log = find_log(self._folder)
        if log is not None:
            if log.is_dir() and any(one.name not in _EMPTY_STORE for one in log.iterdir()):
                return
            (self._folder / IDENTITY_FILE).unlink()
            shutil.rmtree(log, ignore_errors=True)
        with suppress(OSError):  # it is not empty: another program added files
            for folder in self._made:
                folder.rmdir()
