"""Opens files that a user, or a repository, names."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

#: Bytes of a file of a run.
MAX_FILE_BYTES: Final = 8 << 20


def open_regular_file(path: Path) -> BinaryIO:
    """Open a file for reading; OSError for what is no regular file. Blocks.

    Opening a named pipe that nobody writes to would never return, nor reading some devices.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    file = os.fdopen(descriptor, "rb") if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    if file is None:
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return file
