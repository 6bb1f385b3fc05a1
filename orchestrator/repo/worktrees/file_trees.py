"""Copy, open, delete and measure folders that agents have filled."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from orchestrator.errors import GitError
from orchestrator.repo.worktrees.change_detection import TreeDiff
from orchestrator.system.process import CompletedCommand, run

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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


def walk_folders(top: Path, visit: Callable[[int, list[str]], Iterable[str]], unread: list[str] | None = None) -> None:
    """Call `visit` for the folder `top` and for each folder that it returns the name of. Blocks.

    `visit` gets a descriptor of the folder and the names of the folders from `top` to it. Follows no link. Folders that
    their owner can't access are made accessible first; one that still can't be opened is added to `unread`, or is an
    OSError without `unread`. The caller knows that no process of the session is running.
    """
    names: list[str] = []
    try:
        _grant(top)
        at = os.open(top, _DIRECTORY)
    except OSError:
        if unread is not None and is_folder(top):
            unread.append(str(top))
        elif is_folder(top):
            raise
        return
    try:
        # Walks with one descriptor, and back by `..`: paths may exceed the system's limit.
        ahead = [list(visit(at, names))]
        while ahead:
            if ahead[-1]:
                name = ahead[-1].pop()
                try:
                    _grant(name, at)
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


def restore_access(tree: Path, diff: TreeDiff | None = None) -> list[str]:
    """Let the owner read all files and folders of a checkout; return the folders that still can't be opened. Blocks.

    Git silently skips a folder that it can't read. With `diff`, the changes in a checkout, only these are examined. The
    caller knows that no process of the session is running.
    """

    def visit(folder: int, _: list[str]) -> list[str]:
        below = []
        with os.scandir(folder) as scan:
            for entry in scan:
                if entry.is_dir(follow_symlinks=False):
                    below.append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    _grant(entry.name, folder)
        return below

    unread: list[str] = []
    starts = [""] if diff is None else [*diff.added, *diff.replaced]
    for path in () if diff is None else sorted((*diff.touched_folders, *diff.changed, *diff.added)):
        _grant(tree / path.strip("/"))
    for start in starts:
        walk_folders(tree / start, visit, unread)
    return unread


def _grant(path: str | Path, folder: int | None = None) -> None:
    """Give a file's owner the right to read it, a folder's owner all rights; all users, if the owner is another one."""
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # opening it reports what remains
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
