"""Open files named by a user or a repository."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

#: The size limit of a config file in bytes.
MAX_FILE_BYTES: Final = 8 << 20


def open_regular_file(path: Path) -> BinaryIO:
    """Open a regular file for reading; raise OSError for any other file. Blocks.

    Opening a named pipe without a writer, or reading some devices, would block forever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    file = os.fdopen(descriptor, "rb") if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    if file is None:
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return file
