"""By which name a process signs what it commits."""

from __future__ import annotations

import getpass
import os
import socket


def get_writer_name() -> str:
    """Return `user@host:pid` of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id that has no name here
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}:{os.getpid()}"
