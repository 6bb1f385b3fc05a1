"""Update the files of a checkout without overwriting what the user saves meanwhile.

Git compares all files with its index, then writes them: what is saved in between is lost. Here, git writes the new
files to a staging folder. Each old file is then moved there too, and replaced only if it is the one that git compared.

`run_hook` does this during a push. It runs in a process of its own and imports few modules, so that it starts fast.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

TYPE_CHECKING = False  # not that of `typing`, which would slow the start
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

#: The hook's environment variables: the target's commit or empty tree before the push, the ref to move, the content of
#: our index locks, and the file to create after updating a checkout.
OLD_VARIABLE = "COUNCIL_OLD"
TARGET_VARIABLE = "COUNCIL_TARGET"
MARK_VARIABLE = "COUNCIL_MARK"
UPDATED_VARIABLE = "COUNCIL_UPDATED"

#: The type, inode, size and mtime (ns) of a file: any save changes one of them.
Stamp = tuple[int, int, int, int]

#: Errors of file systems without hard links, or for files that are on another file system than the staging folder.
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


def read_stamp(top: str, path: str) -> Stamp | None:
    """Return the stamp of a file of a checkout, or None if there is none.

    A folder is no file, and neither is what a symbolic link to a folder contains.
    """
    parent = os.path.dirname(path)
    while parent:
        if os.path.islink(f"{top}/{parent}"):
            return None
        parent = os.path.dirname(parent)
    try:
        found = os.lstat(f"{top}/{path}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if stat.S_ISDIR(found.st_mode) else (found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns)


def staging_folder(git_dir: str, mark: str) -> str:
    """Return the folder of an update: git writes to `new` in it, and replaced files are moved to `old`."""
    return f"{git_dir}/{mark}"


def replace_files(top: str, staging: str, stamps: Mapping[str, Stamp | None]) -> list[str]:
    """Replace files of a checkout by staged ones, or remove those that are not staged.

    `stamps` are those of the present files. Returns the paths that no longer match, which keep the user's version.
    """
    new, folders = f"{staging}/new", set[str]()
    staged = set(_list_files(new))
    removed = [path for path in stamps if path not in staged]
    # Files of the old commit may be where the new one has folders, and the other way around.
    changed = [path for path in removed if not _take(top, staging, path, stamps[path])]
    for path in removed:
        _remove_empty_parents(top, path)
    return changed + [
        path
        for path, stamp in stamps.items()
        if path in staged and not (_take(top, staging, path, stamp) and _place(f"{new}/{path}", top, path, folders))
    ]


def return_files(top: str, staging: str) -> None:
    """Return the files that an interrupted update has moved away and not replaced."""
    folders: set[str] = set()
    for path in _list_files(f"{staging}/old"):
        if not os.path.lexists(f"{top}/{path}"):
            _place(f"{staging}/old/{path}", top, path, folders)


def remove_folder(folder: str) -> None:
    """Remove a folder with its content, if it exists."""
    for parent, folders, names in os.walk(folder, topdown=False):
        for name in names:
            os.unlink(f"{parent}/{name}")
        for name in folders:
            path = f"{parent}/{name}"
            os.unlink(path) if os.path.islink(path) else os.rmdir(path)
    if os.path.isdir(folder):
        os.rmdir(folder)


def _list_files(folder: str) -> Iterator[str]:
    """Yield the paths of all files and symbolic links in a folder, relative to it."""
    for parent, subfolders, names in os.walk(folder):
        links = [name for name in subfolders if os.path.islink(f"{parent}/{name}")]
        for name in names + links:
            yield f"{parent}/{name}".removeprefix(f"{folder}/")


def _take(top: str, staging: str, path: str, expected: Stamp | None) -> bool:
    """Move a file to the staging folder; return False if it is not as expected."""
    if expected is None:
        return True  # a file that was created since is in the way of the new one
    here, there = f"{top}/{path}", f"{staging}/old/{path}"
    os.makedirs(os.path.dirname(there), exist_ok=True)
    try:
        os.rename(here, there)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        if is_expected := read_stamp(top, path) == expected:
            os.unlink(here)
        return is_expected
    if read_stamp(f"{staging}/old", path) == expected:
        return True
    if _is_folder(there):
        os.rename(there, here)
    else:
        _place(there, top, path, set())
    return False


def _place(source: str, top: str, path: str, folders: set[str]) -> bool:
    """Create a file of a checkout from a staged one; return False if something is in the way.

    `folders` are those of the checkout that are known to exist.
    """
    here = f"{top}/{path}"
    if not _make_folder(top, os.path.dirname(path), folders):
        return False
    if _is_folder(here):
        _remove_empty_folders(here)
    try:
        os.link(source, here, follow_symlinks=False)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _copy(source, here)
    return True


def _copy(source: str, path: str) -> bool:
    try:
        if os.path.islink(source):
            os.symlink(os.readlink(source), path)
            return True
        mode = stat.S_IMODE(os.stat(source).st_mode)
        with (
            open(source, "rb") as content,
            open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file,
        ):
            file.write(content.read())
    except FileExistsError:
        return False
    return True


def _make_folder(top: str, folder: str, known: set[str]) -> bool:
    """Create a folder with its parents; return False if a file or symbolic link is in the way."""
    if not folder or folder in known:
        return True
    if not _make_folder(top, os.path.dirname(folder), known):
        return False
    path = f"{top}/{folder}"
    if not os.path.lexists(path):
        os.mkdir(path)
    elif not _is_folder(path):
        return False
    known.add(folder)
    return True


def _is_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _remove_empty_folders(folder: str) -> None:
    for parent, _, _ in os.walk(folder, topdown=False):
        _remove_if_empty(parent)


def _remove_empty_parents(top: str, path: str) -> None:
    folder = os.path.dirname(path)
    while folder and _remove_if_empty(f"{top}/{folder}"):
        folder = os.path.dirname(folder)


def _remove_if_empty(folder: str) -> bool:
    try:
        os.rmdir(folder)
    except OSError:
        return False
    return True


def run_hook() -> None:
    """Update the checkout of a push to the commit in the first argument (`push-to-checkout` in githooks(5)).

    Like git's built-in update, with three differences. `read-tree` gets both commits and therefore keeps index entries
    and files that are equal in both; git's own update resets everything to the new commit, which reverts the user's
    commits since the push began. The index stays locked until the ref has moved; otherwise uncommitted staged changes
    would become part of the user's next commit or be carried along by a branch switch. And no save of the user's is
    overwritten.
    """
    git_dir, mark = os.environ["GIT_DIR"], os.environ[MARK_VARIABLE]
    index, staging = f"{git_dir}/index.{mark}", staging_folder(git_dir, mark)
    problem = _lock(f"{git_dir}/index.lock", mark)
    if problem is not None:
        sys.exit(problem)
    try:
        stamps = _stage(index, staging, sys.argv[1])
    except OSError as error:
        stamps = _describe(error)
    if isinstance(stamps, str):
        remove_folder(staging)
        _unlink(index, f"{git_dir}/index.lock")
        sys.exit(stamps)
    # From here on, the lock stays on failure: the landing undoes the update before the user can commit part of it.
    try:
        if changed := replace_files(os.environ["GIT_WORK_TREE"], staging, stamps):
            sys.exit(f"files were saved during the update: {', '.join(sorted(changed)[:3])}")
        _git("update-index", "-q", "--ignore-submodules", "--refresh", index=index)
        os.replace(index, f"{git_dir}/index")
        os.close(os.open(os.environ[UPDATED_VARIABLE], os.O_WRONLY | os.O_CREAT))
        remove_folder(staging)
    except OSError as error:
        sys.exit(_describe(error))


def _lock(lock: str, mark: str) -> str | None:
    """Lock an index with our mark; return the problem, if any."""
    try:
        file = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return "its index is locked by another git command"
    except OSError as error:
        return _describe(error)
    try:
        os.write(file, f"{mark}\n".encode())
    except OSError as error:  # without the mark, the lock would look like the user's
        _unlink(lock)
        return f"can't write {lock}: {error.strerror}"
    finally:
        os.close(file)
    return None


def _stage(index: str, staging: str, new: str) -> dict[str, Stamp | None] | str:
    """Write the new index and files; return the stamps of the files to replace, or the problem."""
    git_dir, old, target = (os.environ[name] for name in ("GIT_DIR", OLD_VARIABLE, TARGET_VARIABLE))
    remove_folder(staging)
    os.makedirs(f"{staging}/new")
    output = f"{staging}/output"
    if _read(f"{git_dir}/HEAD") != f"ref: {target}\n".encode():  # it may point to a symbolic ref
        _git("symbolic-ref", "-q", "HEAD", output=output)
        if _read(output) != f"{target}\n".encode():
            return "another branch was checked out in the meantime"
    _unlink(f"{index}.lock")
    if os.path.exists(f"{git_dir}/index"):
        _copy_index(f"{git_dir}/index", index)
    if _git("diff-tree", "-r", "-z", "--name-only", "--no-renames", old, new, output=output):
        return "its changes can't be listed"
    paths: Iterable[str] = map(os.fsdecode, _read(output).split(b"\0")[:-1])
    # Before git compares the files: what is saved later has another stamp.
    stamps = {path: read_stamp(os.environ["GIT_WORK_TREE"], path) for path in paths}
    _git("update-index", "-q", "--ignore-submodules", "--refresh", index=index)
    if _git("diff-files", "--quiet", "--ignore-submodules", "--", index=index) or _git(
        "diff-index", "--quiet", "--cached", "--ignore-submodules", old, "--", index=index
    ):
        return "the checkout has changes"
    if _git("read-tree", "-u", "-m", old, new, index=index, top=f"{staging}/new"):
        return "its new files can't be written"
    return stamps


def _git(*arguments: str, output: str | None = None, index: str | None = None, top: str | None = None) -> int:
    """Run git and return its exit code. `output` gets its output; `index` and `top` replace those of the checkout."""
    env = dict(os.environ)
    env |= {} if index is None else {"GIT_INDEX_FILE": index}
    env |= {} if top is None else {"GIT_WORK_TREE": top}
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    actions = [] if output is None else [(os.POSIX_SPAWN_OPEN, 1, output, flags, 0o600)]
    # `subprocess` would double the time to start.
    process = os.posix_spawnp("git", ("git", *arguments), env, file_actions=actions)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _describe(error: OSError) -> str:
    """Return the cause of an error, with the file relative to the checkout."""
    path = os.fsdecode(error.filename2 or error.filename or "")
    return f"can't write {path.removeprefix(os.environ['GIT_WORK_TREE'] + '/')}: {error.strerror}"


def _copy_index(source: str, index: str) -> None:
    """Copy an index with its mtime, by which git finds files that were saved while it was written."""
    found = os.stat(source)
    with open(source, "rb") as content, open(index, "wb") as file:
        file.write(content.read())
    os.chmod(index, stat.S_IMODE(found.st_mode))
    os.utime(index, ns=(found.st_atime_ns, found.st_mtime_ns))


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _unlink(*paths: str) -> None:
    for path in paths:
        if os.path.lexists(path):
            os.unlink(path)
