"""Copy folders unchanged."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.errors import GitError
from orchestrator.system.process import run


async def copy_tree(
    source: str, target: Path, environ: Mapping[str, str], keep_fds: Sequence[int] = (), *, times: bool = False
) -> None:
    """Copy a file, or a folder with all contents and links as links; GitError with the output of `cp` if that fails.

    With `times`, modes, owners and times are preserved, too. The locks `keep_fds` stay held until the copy ends, also
    if we are killed.
    """
    argv = ["cp", "-RPp" if times else "-RP", "--", source, str(target)]
    env = {"PATH": environ.get("PATH", os.defpath), "LC_ALL": "C"}
    done = await run(argv, env=env, keep_fds=keep_fds)
    if done.returncode:
        raise GitError(argv, done.returncode, done.stderr.decode(errors="replace"))
