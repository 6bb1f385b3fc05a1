"""Delete folders that agents have filled, and measure their disk usage."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import GitError
from orchestrator.system.process import run


async def remove_all(paths: Sequence[Path], environ: Mapping[str, str], keep_fds: Sequence[int] = ()) -> None:
    """Delete files, and folders with all contents; GitError with the output of `rm` if that fails.

    The locks `keep_fds` stay held until the deletion ends, also if we are killed.
    """
    # `rm` rather than shutil: an agent's folders may be nested deeper than Python recurses, or unreadable.
    named = list(map(str, paths))
    argv = ["rm", "-rf", "--", *named]
    env = {"PATH": environ.get("PATH", os.defpath), "LC_ALL": "C"}
    if (await run(argv, env=env, keep_fds=keep_fds)).returncode:
        await run(["chmod", "-R", "u+rwx", "--", *named], env=env, keep_fds=keep_fds)
        done = await run(argv, env=env, keep_fds=keep_fds)
        if done.returncode:
            raise GitError(argv, done.returncode, done.stderr.decode(errors="replace"))


def disk_usage(path: Path) -> int:
    """Return the bytes on disk of a file or of all readable contents of a folder. Blocks.

    A file with several names counts once; links are not followed.
    """
    waiting, seen, total = [str(path)], set[tuple[int, int]](), 0
    while waiting:
        current = waiting.pop()
        with suppress(OSError):  # unreadable, deeper than the longest path, or removed meanwhile
            status = os.lstat(current)
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_blocks * 512  # stat(2): the unit does not depend on the block size
            if stat.S_ISDIR(status.st_mode):
                with os.scandir(current) as entries:
                    waiting.extend(entry.path for entry in entries)
    return total
