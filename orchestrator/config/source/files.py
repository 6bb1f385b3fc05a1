"""Open and read files specified by a user or a repository."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

from orchestrator.errors import InvalidValue

#: The size limit of a config file in bytes.
MAX_FILE_BYTES: Final = 8 << 20
#: The size limit of a prompt or schema file in bytes.
MAX_PROMPT_BYTES: Final = 1 << 20


def open_regular_file(path: Path) -> BinaryIO:
    """Open a regular file for reading; raise OSError for any other file. Blocks.

    Opening a named pipe without a writer, or reading certain devices, would block forever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    file = os.fdopen(descriptor, "rb") if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    if file is None:
        os.close(descriptor)
        raise OSError("not a regular file")
    return file


def read_prompt(path: Path) -> str:
    """Return the text of a prompt file; raise InvalidValue if it is invalid."""
    try:
        data = _read_regular(path)
    except OSError as error:
        raise InvalidValue(f"can't read {path}: {_reason(error)}", "use a readable file") from error
    if len(data) > MAX_PROMPT_BYTES:
        raise InvalidValue(f"{path} is larger than 1 MiB", "shorten it, or refer to files in the prompt")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidValue(f"{path} is not UTF-8 (byte {error.start})", "save it as UTF-8") from error
    if "\0" in text:
        raise InvalidValue(f"{path} contains a NUL character", "remove it")
    if not text.strip():
        raise InvalidValue(f"{path} is empty", "describe the task in it")
    return text


def _read_regular(path: Path) -> bytes:
    with open_regular_file(path) as file:
        return file.read(MAX_PROMPT_BYTES + 1)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
