"""Copy, delete and measure folders that agents have filled."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import GitError
from orchestrator.system.process import CompletedCommand, run


def is_folder(path: Path) -> bool:
    """Whether a path is a folder, and not a link to one. Blocks."""
    return path.is_dir() and not path.is_symlink()


async def copy_tree(
    source: str, target: Path, environ: Mapping[str, str], keep_fds: Sequence[int] = (), *, times: bool = False
) -> None:
    """Copy a file, or a folder with all contents and links as links; GitError with the output of `cp` if that fails.

    With `times`, modes, owners and times are preserved, too. The locks `keep_fds` stay held until the copy ends, also
    if we are killed.
    """
    argv = ["cp", "-RPp" if times else "-RP", "--", source, str(target)]
    _check(argv, await run(argv, env=_env(environ), keep_fds=keep_fds))


async def remove_all(paths: Sequence[Path], environ: Mapping[str, str], keep_fds: Sequence[int] = ()) -> None:
    """Delete files, and folders with all contents; GitError with the output of `rm` if that fails.

    The locks `keep_fds` stay held until the deletion ends, also if we are killed.
    """
    # `rm` rather than shutil: an agent's folders may be nested deeper than Python recurses, or unreadable.
    named = list(map(str, paths))
    argv = ["rm", "-rf", "--", *named]
    env = _env(environ)
    if (await run(argv, env=env, keep_fds=keep_fds)).returncode:
        await run(["chmod", "-R", "u+rwx", "--", *named], env=env, keep_fds=keep_fds)
        _check(argv, await run(argv, env=env, keep_fds=keep_fds))


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


def _env(environ: Mapping[str, str]) -> dict[str, str]:
    return {"PATH": environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _check(argv: Sequence[str], done: CompletedCommand) -> None:
    if done.returncode:
        raise GitError(argv, done.returncode, done.stderr.decode(errors="replace"))
