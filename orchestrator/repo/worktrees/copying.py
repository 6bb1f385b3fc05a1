"""Copying folders as they are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.errors import GitError
from orchestrator.system.process import run


async def copy_tree(
    source: str, target: Path, environ: Mapping[str, str], keep_fds: Sequence[int] = (), *, times: bool = False
) -> None:
    """Copy a file, or a folder with all that is in it, links as links; if it can't, a GitError with what `cp` said.

    With `times` modes, owners and times stay, too. The locks `keep_fds` are held until it has ended, also where we are
    killed.
    """
    argv = ["cp", "-RPp" if times else "-RP", "--", source, str(target)]
    env = {"PATH": environ.get("PATH", os.defpath), "LC_ALL": "C"}
    done = await run(argv, env=env, keep_fds=keep_fds)
    if done.returncode:
        raise GitError(argv, done.returncode, done.stderr.decode(errors="replace"))
