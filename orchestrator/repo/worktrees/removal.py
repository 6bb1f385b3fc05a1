"""Deleting folders that agents have filled with anything, and how much of the disk they take."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import GitError
from orchestrator.system.process import run


async def remove_all(places: Sequence[Path], environ: Mapping[str, str], keep_fds: Sequence[int] = ()) -> None:
    """Delete files, and folders with all that is in them; GitError, which says what `rm` said, if that can't be.

    The locks `keep_fds` are held until the deletion has ended, also where we are killed.
    """
    # `rm` rather than shutil: an agent's folders may be nested deeper than Python recurses, or closed to us.
    named = list(map(str, places))
    argv = ["rm", "-rf", "--", *named]
    env = {"PATH": environ.get("PATH", os.defpath), "LC_ALL": "C"}
    if (await run(argv, env=env, keep_fds=keep_fds)).returncode:
        await run(["chmod", "-R", "u+rwx", "--", *named], env=env, keep_fds=keep_fds)
        done = await run(argv, env=env, keep_fds=keep_fds)
        if done.returncode:
            raise GitError(argv, done.returncode, done.stderr.decode(errors="replace"))


def disk_usage(place: Path) -> int:
    """Return the bytes on disk of a file or of all that is in a folder, as far as it can be read. Blocks.

    What has several names is counted once; links are not followed.
    """
    waiting, seen, total = [str(place)], set[tuple[int, int]](), 0
    while waiting:
        path = waiting.pop()
        with suppress(OSError):  # closed to us, deeper than paths can be, or gone meanwhile
            status = os.lstat(path)
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_blocks * 512  # stat(2): whatever the block size
            if stat.S_ISDIR(status.st_mode):
                with os.scandir(path) as entries:
                    waiting.extend(entry.path for entry in entries)
    return total
