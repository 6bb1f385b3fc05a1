"""Does what looks at each file of a checkout for another process: a program of its own (`orchestrator.repo.worktrees.scan_process`).

It reads functions without arguments, and writes what they return, as `pickle` has both; it ends with its input. Only
the standard library can be imported, by those functions too.
"""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import suppress


def serve() -> None:
    """Answer one after another; an error in a function ends it."""
    # What Python says of that is not to be taken for an answer: both streams are the same pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    with suppress(EOFError, BrokenPipeError):
        while True:
            function = pickle.load(sys.stdin.buffer)
            pickle.dump(function(), sys.stdout.buffer)
            sys.stdout.buffer.flush()
