"""Python programs that run concurrently with tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def run_python(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """Run a program with our code, which is killed at the end of the block at the latest."""
    argv = [sys.executable, "-c", code, *map(str, args)]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, env={"PYTHONPATH": str(Path.cwd())}) as child:
        try:
            yield child
        finally:
            child.kill()
