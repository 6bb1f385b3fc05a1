"""Become a server program that ends with the process that started it: a killed test process leaves no server.

    python -S tests/server_starter.py PARENT SIGNAL USER PROGRAM [ARGUMENT]...

The kernel sends SIGNAL when the thread of PARENT that started this program ends. It forgets this whenever a process
changes its user, so the change to USER (-1: no change) comes first; `exec` keeps both. Elsewhere than on Linux, only
`atexit` of the tests ends the server.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> None:
    """Change the user, and become the program."""
    parent, signal, user = map(int, arguments[:3])
    if user >= 0:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal), 0, 0, 0)
        if os.getppid() != parent:  # it ended before
            return
    os.execv(arguments[3], [*arguments[3:]])


if __name__ == "__main__":
    main(sys.argv[1:])
