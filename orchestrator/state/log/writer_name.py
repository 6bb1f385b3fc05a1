"""The name with which a process signs its commits."""

from __future__ import annotations

import getpass
import os
import socket


def get_writer_name() -> str:
    """Return `user@host:pid` of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}:{os.getpid()}"
