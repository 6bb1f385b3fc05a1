"""Run functions that scan a checkout in the process of `FileScanner`.

Reads pickled functions without arguments from stdin, and writes their pickled results to stdout; exits at end of input.
Only the standard library can be imported, even by those functions.
"""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import suppress


def serve() -> None:
    """Answer requests in order; an error in a function ends the process."""
    # Python's error output must not be mistaken for an answer: stdout and stderr are the same pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    with suppress(EOFError, BrokenPipeError):
        while True:
            function = pickle.load(sys.stdin.buffer)  # noqa: S301  from the process that started this one
            pickle.dump(function(), sys.stdout.buffer)
            sys.stdout.buffer.flush()
