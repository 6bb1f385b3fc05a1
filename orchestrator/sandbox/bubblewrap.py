"""Find the installed bubblewrap (bwrap(1)) and its features."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

from tenacity import retry, retry_if_exception_type, stop_after_attempt

#: Attempts to run a probe that is killed by a signal.
ATTEMPTS: Final = 3
_TIMEOUT: Final = 20.0  # seconds; a probe takes milliseconds


def find_bwrap(environ: Mapping[str, str] | None = None) -> str | None:
    """Return the absolute path of bubblewrap on PATH, or None if not installed."""
    found = shutil.which("bwrap", path=None if environ is None else environ.get("PATH"))
    return None if found is None else str(Path(found).absolute())


@retry(retry=retry_if_exception_type(InterruptedError), stop=stop_after_attempt(ATTEMPTS), reraise=True)
def _run_version(program: str) -> subprocess.CompletedProcess[bytes]:
    argv = [program, "--version"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT, check=False)
    if done.returncode < 0:
        raise InterruptedError(f"`{program} --version` was killed by signal {-done.returncode}")
    return done


@cache
def can_disable_userns(program: str) -> bool:
    """Return whether bubblewrap supports `--disable-userns` (version 0.8). Blocks.

    The option prevents user namespaces. Raises OSError if every probe is killed.
    """
    try:
        done = _run_version(program)
    except (FileNotFoundError, PermissionError, subprocess.SubprocessError):
        return False
    version = re.search(rb"(\d+)\.(\d+)", done.stdout)
    return version is not None and (int(version[1]), int(version[2])) >= (0, 8)
