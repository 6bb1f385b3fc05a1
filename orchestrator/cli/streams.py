"""Standard streams that may be closed, full or broken, or have a limited encoding."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TextIO

import click

#: The errors of a pipe without a reader and of a terminal that has hung up.
_READER_GONE_ERRORS = frozenset({errno.EPIPE, errno.EIO})


@contextmanager
def usable_streams() -> Iterator[None]:
    """Provide three standard streams that accept any text.

    Exits with 1 if click's own output can't be written.
    """
    _open_missing()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except OSError as error:
        redirect_to_null(sys.stdout)
        click.echo(f"council: {write_error_message(error)}", err=True)
        sys.exit(1)


def _open_missing() -> None:
    """Connect closed streams to /dev/null, so that no opened file takes their place."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # uses the lowest free descriptor, see open(2)
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))


def redirect_to_null(stream: TextIO) -> None:
    """Discard further output to a stream."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_reader_gone(error: OSError) -> bool:
    """Return True if an error means that the reader of a stream has exited."""
    return error.errno in _READER_GONE_ERRORS


def write_error_message(error: OSError) -> str:
    """Return the message for incomplete output."""
    return f"can't write to standard output: {error.strerror}"
