"""Copy, delete, measure and unlock folders with contents written by agents."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from orchestrator.errors import GitError
from orchestrator.system.process import CompletedCommand, run

#: The errors of paths that name no file. A link to a name that is too long has the error of that name.
_MISSING: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder and not a link to one. Blocks.

    Unlike `Path.is_dir`, it accepts a link of an agent to a name that is too long.
    """
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError as error:
        if error.errno in _MISSING:
            return False
        raise


async def copy_tree(
    source: str, target: Path, environ: Mapping[str, str], keep_fds: Sequence[int] = (), *, times: bool = False
) -> None:
    """Copy a file, or a folder recursively without following links.

    With `times`, also preserves modes, owners and times. The locks `keep_fds` are held until the copy ends, even if we
    are killed. Raises GitError with the output of `cp` if that fails.
    """
    argv = ["cp", "-RPp" if times else "-RP", "--", source, str(target)]
    _check(argv, await run(argv, env=_env(environ), keep_fds=keep_fds))


async def remove_all(paths: Sequence[Path], environ: Mapping[str, str], keep_fds: Sequence[int] = ()) -> None:
    """Delete files, and folders recursively.

    The locks `keep_fds` are held until the deletion ends, even if we are killed. Raises GitError with the output of
    `rm` if that fails.
    """
    # `rm` rather than shutil: an agent's folders may be nested deeper than Python recurses, or unreadable.
    named = list(map(str, paths))
    argv = ["rm", "-rf", "--", *named]
    env = _env(environ)
    if (await run(argv, env=env, keep_fds=keep_fds)).returncode:
        await run(["chmod", "-R", "u+rwx", "--", *named], env=env, keep_fds=keep_fds)
        _check(argv, await run(argv, env=env, keep_fds=keep_fds))


def walk_folders(top: Path, visit: Callable[[int, list[str]], Iterable[str]], unread: list[str] | None = None) -> None:
    """Call `visit` for `top` and for each subfolder that a call names. Blocks.

    `visit` gets a descriptor of the folder and the folder names from `top` down, and returns the names of subfolders to
    visit. Links are not followed. Folders that their owner can't access are made accessible first. A folder that still
    can't be opened is added to `unread`; without `unread`, raises OSError. No process of the session may be running.
    """
    names: list[str] = []
    try:
        grant_access(top)
        at = os.open(top, _DIRECTORY)
    except OSError:
        if unread is not None and is_folder(top):
            unread.append(str(top))
        elif is_folder(top):
            raise
        return
    try:
        # Walk with one descriptor, and return by `..`: paths may exceed the system's limit.
        ahead = [list(visit(at, names))]
        while ahead:
            if ahead[-1]:
                name = ahead[-1].pop()
                try:
                    grant_access(name, at)
                    below = os.open(name, _DIRECTORY, dir_fd=at)
                except OSError:
                    if unread is None:
                        raise
                    unread.append("/".join((str(top), *names, name)))
                    continue
                at = _replace_descriptor(at, below)
                names.append(name)
                ahead.append(list(visit(at, names)))
            else:
                ahead.pop()
                if ahead:
                    names.pop()
                    at = _replace_descriptor(at, os.open("..", _DIRECTORY, dir_fd=at))
    finally:
        os.close(at)


def grant_access(path: str | Path, folder: int | None = None) -> None:
    """Give the owner read permission on a file, or all permissions on a folder.

    If the owner is another user, gives the permissions to all users.
    """
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # opening it reports remaining problems
        status = os.stat(path, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            wanted = stat.S_IRWXU if status.st_uid == os.geteuid() else 0o755
        elif stat.S_ISREG(status.st_mode):
            wanted = stat.S_IRUSR if status.st_uid == os.geteuid() else 0o444
        else:
            return
        if wanted & ~status.st_mode:
            os.chmod(path, stat.S_IMODE(status.st_mode) | wanted, dir_fd=folder)


def _replace_descriptor(old: int, new: int) -> int:
    os.close(old)
    return new


def disk_usage(path: Path) -> int:
    """Return the bytes on disk of a file or a folder's readable contents. Blocks.

    A file with several hard links counts once; symbolic links are not followed.
    """
    waiting, seen, total = [str(path)], set[tuple[int, int]](), 0
    while waiting:
        current = waiting.pop()
        with suppress(OSError):  # unreadable, longer than the path limit, or removed in the meantime
            status = os.lstat(current)
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_blocks * 512  # always 512-byte units (stat(2))
            if stat.S_ISDIR(status.st_mode):
                with os.scandir(current) as entries:
                    waiting.extend(entry.path for entry in entries)
    return total


def _env(environ: Mapping[str, str]) -> dict[str, str]:
    return {"PATH": environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _check(argv: Sequence[str], done: CompletedCommand) -> None:
    if done.returncode:
        raise GitError(argv, done.returncode, done.stderr.decode(errors="replace"))
