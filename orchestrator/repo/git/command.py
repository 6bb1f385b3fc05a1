"""Run git: the only module that starts git commands.

Two environments, both built from scratch:

- `sealed`: for our own repositories and agents' trees. No system, global or user configuration, no hooks,
  no fsmonitor, no signing, no pager, a fixed identity, plain English messages.
- `user`: for the user's repository or remote. The user's configuration, credentials and proxies apply,
  but variables that would point git at another repository are removed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from orchestrator.errors import GitError, GitKilled, HubDamaged, RefusedError
from orchestrator.repo.git.stale_files import list_index_locks, list_locks, remove_unowned
from orchestrator.sandbox.confinement import Confinement
from orchestrator.system.failpoints import failpoint, is_triggered
from orchestrator.system.process import CompletedCommand, run
from orchestrator.system.resources import is_disk_full

MINIMUM_VERSION: Final = (2, 38)  # the first version with `merge-tree --write-tree`
_INSTALL: Final = f"install git {'.'.join(map(str, MINIMUM_VERSION))} or newer"
RECOMMENDED_VERSION: Final = (2, 39)  # the oldest version that the tests run with
IDENTITY: Final = ("CLI Council", "council@localhost")
GITLINK_MODE: Final = "160000"  # a link to a commit of another repository
LINK_MODE: Final = "120000"  # a symbolic link
MISSING_MODE: Final = "000000"  # of a file that a commit does not have

#: The name of our repository in a hub (`repo.worktrees.hub`).
TRUSTED_NAME: Final = "trusted.git"
#: Git's messages about a damaged repository, and about one of our refs with a missing or invalid object.
_DAMAGE: Final = re.compile(r"corrupt|is empty|unable to unpack|not a git repository")
_DAMAGED_REF: Final = re.compile(r"^fatal: bad object refs/(heads/)?council/", re.MULTILINE)

_HARMLESS_CONFIG: Final = (
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.attributesFile=/dev/null",
    "core.excludesFile=/dev/null",
    "commit.gpgSign=false",
    "core.protectHFS=true",
    "core.protectNTFS=true",
    "gc.auto=0",
    "maintenance.auto=false",
    "protocol.ext.allow=never",
)
#: Memory limit in bytes for git on an agent's files: a small file may expand to terabytes.
_MAX_MEMORY: Final = 2 << 30
#: The number of attempts for a killed command, and the seconds between attempts.
_MAX_ATTEMPTS: Final = 5
_MIN_PAUSE: Final = 0.05
_MAX_PAUSE: Final = 1.0
#: Seconds to wait for other commands that may own a lock.
_STALE_LOCK_TIMEOUT: Final = 1.0
_KILLS: Final = frozenset({signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGPIPE})
# Git's messages (C locale) about child processes, its own local server, and locks.
_DIED: Final = re.compile(r"died of signal (\d+)")
# Messages of the shell that git uses to start that server.
_SHELL_REPORT: Final = re.compile(r"^(?:\S+: line \d+: +\d+ )?(?:Killed|Terminated)\b", re.MULTILINE)
_FATAL: Final = re.compile(r"^(?:remote: )?fatal: (.+)", re.MULTILINE)
_LOST_OTHER_END: Final = re.compile(r"the remote end hung up unexpectedly|early EOF|invalid index-pack output")
_SILENT_SERVER: Final = re.compile(
    r"fatal: Could not read from remote repository\. Please make sure you have the correct access rights"
    r" and the repository exists\."
)
_LOCKED: Final = re.compile(r"(?:Unable to create '|could not lock config file )(.+?)(?:'|): File exists")
CONFIG_FLAGS: Final = tuple(flag for item in _HARMLESS_CONFIG for flag in ("-c", item))

_COMMON_ENV: Final = {
    "LC_ALL": "C",
    "GIT_AUTHOR_NAME": IDENTITY[0],
    "GIT_AUTHOR_EMAIL": IDENTITY[1],
    "GIT_COMMITTER_NAME": IDENTITY[0],
    "GIT_COMMITTER_EMAIL": IDENTITY[1],
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_PAGER": "cat",
    "GIT_DEFAULT_REF_FORMAT": "files",
}
_SEALED_ENV: Final = {
    **_COMMON_ENV,
    "HOME": "/nonexistent",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_ATTR_NOSYSTEM": "1",
}
# Variables that users set to reach a server or to choose a configuration; all other GIT_* variables relocate a
# repository or change the meaning of commands (https://git-scm.com/docs/git#_environment_variables).
_PASSED_USER_VARIABLES: Final = re.compile(
    r"GIT_(?:SSH(?:_COMMAND|_VARIANT)?|ASKPASS|SSL_[A-Z_]+|PROXY_[A-Z_]+|HTTP_[A-Z_]+|CONFIG_(?:GLOBAL|SYSTEM|NOSYSTEM)"
    r"|EXEC_PATH|ALLOW_PROTOCOL)"
)
# The password of a store's server, or its file: for the process itself, not for the user's hooks.
_STORE_PASSWORD: Final = re.compile(r"COUNCIL_[A-Z]+_PASSWORD(?:_FILE)?")


def sealed_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for git in our own repositories and agents' trees."""
    return {"PATH": environ.get("PATH", os.defpath), **_SEALED_ENV}


def user_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the user's git environment without variables that locate a repository or open the store's server."""
    kept = {
        name: value
        for name, value in environ.items()
        if (not name.startswith("GIT_") or _PASSED_USER_VARIABLES.fullmatch(name))
        and not _STORE_PASSWORD.fullmatch(name)
    }
    return {**kept, **_COMMON_ENV}


@dataclass(frozen=True, slots=True)
class FileChange:
    """A file that differs between two commits; `MISSING_MODE` if missing."""

    path: str
    old_mode: str
    new_mode: str
    old_id: str
    new_id: str


@dataclass(frozen=True, slots=True)
class ConfinedPaths:
    """The files and folders (recursively) that a confined command may read or write."""

    readable: tuple[Path, ...]
    writable: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Git:
    """Runs git in one repository; commands inherit the lock descriptors `keep_fds`.

    Each command keeps them until it exits. Without a `git_dir`, git finds the repository from the `cwd` of each call.
    """

    git_dir: Path | None
    as_user: bool = False
    keep_fds: tuple[int, ...] = ()
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    flags: tuple[str, ...] = ()
    """Global git options for each command."""
    scope: ConfinedPaths | None = None
    """The paths accessible in the sandbox; None means no sandbox."""

    def confined(self, *, readable: Iterable[Path] = (), writable: Iterable[Path] = ()) -> Git:
        """Return a Git whose commands run in a sandbox that contains only these paths.

        There is no network, no home folder and no other program. Every command that reads agent-writable files runs in
        such a sandbox, so that no git feature that acts on these files can do harm.
        """
        return replace(self, scope=ConfinedPaths(tuple(readable), tuple(writable)))

    async def __call__(
        self,
        *args: str,
        env: Mapping[str, str] | None = None,
        input_: bytes | None = None,
        cwd: Path | None = None,
        ok: Sequence[int] = (0,),
        keep_fds: Sequence[int] = (),
        limit: float | None = None,
    ) -> CompletedCommand:
        """Run `git ARGS` to completion, even when cancelled.

        Raises GitError if the exit code is not in `ok`. A command that is killed externally, or fails on a lock that a
        killed command left in our repository, is retried a few times; if the last attempt is killed, raises GitKilled.
        `limit` (seconds) is for agents' files: it also limits memory to 2 GiB.
        """
        attempts = AsyncRetrying(
            retry=retry_if_exception(self._is_retryable),
            stop=stop_after_attempt(_MAX_ATTEMPTS),
            wait=wait_random_exponential(multiplier=_MIN_PAUSE, max=_MAX_PAUSE),
            sleep=anyio.sleep,
            reraise=True,
        )
        async for attempt in attempts:
            with attempt:
                if attempt.retry_state.attempt_number > 1:
                    await self._remove_stale_locks(env or {})
                return await self._run(args, env, input_, cwd, ok, keep_fds, limit)
        raise AssertionError("the last attempt returns or raises")

    def _is_retryable(self, error: BaseException) -> bool:
        """Return whether a failed command may succeed on retry."""
        if isinstance(error, GitKilled):
            return True
        match = _LOCKED.search(error.stderr) if isinstance(error, GitError) and self.git_dir is not None else None
        # Locks are removed only in our own repository.
        return match is not None and self.git_dir is not None and Path(match[1]).is_relative_to(self.git_dir.parent)

    async def _remove_stale_locks(self, env: Mapping[str, str]) -> None:
        if self.git_dir is None:
            return
        locks = await anyio.to_thread.run_sync(list_locks, self.git_dir)
        if "GIT_INDEX_FILE" in env:
            locks += await anyio.to_thread.run_sync(list_index_locks, Path(env["GIT_INDEX_FILE"]))
        if locks:
            await anyio.to_thread.run_sync(remove_unowned, locks, _STALE_LOCK_TIMEOUT)

    async def _run(
        self,
        args: Sequence[str],
        env: Mapping[str, str] | None,
        input_: bytes | None,
        cwd: Path | None,
        ok: Sequence[int],
        keep_fds: Sequence[int],
        limit: float | None,
    ) -> CompletedCommand:
        failpoint("git.starting")
        base = user_environment(self.environ) if self.as_user else sealed_environment(self.environ)
        command = run(
            ["git", *CONFIG_FLAGS, *self.flags, *args],
            env={**base, **({"GIT_DIR": str(self.git_dir)} if self.git_dir else {}), **(env or {})},
            cwd=cwd or self.git_dir,
            input=input_,
            keep_fds=(*self.keep_fds, *keep_fds),
            timeout=limit,
            memory=None if limit is None else _MAX_MEMORY,
            confinement=None if self.scope is None else await self._confinement(self.scope, base["PATH"]),
        )
        try:
            done = await command
        except TimeoutError as error:  # its message begins with all arguments, which would hide the reason
            reason = str(error).rpartition("` was killed: ")[2]
            raise GitError(["git", *args], -9, f"git was killed: {reason}") from None
        except (FileNotFoundError, NotADirectoryError):
            folder = cwd or self.git_dir
            if folder is None or folder.is_dir():
                raise RefusedError("git is not on PATH", _INSTALL) from None
            raise self._failure(args, 128, f"folder {folder} does not exist") from None
        except PermissionError as error:
            raise self._refused_start(error, args, cwd) from None
        if is_triggered("git.ended"):
            done = CompletedCommand(-signal.SIGKILL, b"", b"")
        if done.returncode not in ok:
            message = done.stderr.decode(errors="replace")
            if await anyio.to_thread.run_sync(is_disk_full, cwd, self.git_dir):  # git's message often omits it
                message = f"{message}: {os.strerror(errno.ENOSPC)}"
            elif was_killed(done.returncode, message):
                raise GitKilled(["git", *args], done.returncode, message)
            raise self._failure(args, done.returncode, message)
        return done

    def _refused_start(self, error: PermissionError, args: Sequence[str], cwd: Path | None) -> Exception:
        """Return the error of a command that could not be started. Without `cwd`, our repository can't be opened."""
        folder = cwd or self.git_dir
        if folder is None or error.filename != folder:  # subprocess names the folder or the program
            remedy = "install your system's git, and put it first on PATH"
            return RefusedError(f"can't start git in its sandbox: {error}", remedy)
        return error if cwd is None else GitError(["git", *args], 128, f"can't open folder {folder}")

    def _failure(self, args: Sequence[str], returncode: int, message: str) -> GitError:
        """Return the error of a failed command: HubDamaged if our repository, not the user's, is damaged.

        Raises PermissionError if it only can't be opened.
        """
        argv, own = ["git", *args], self.git_dir
        if own is None or own.name != TRUSTED_NAME:
            return GitError(argv, returncode, message)
        is_damaged = _DAMAGED_REF.search(message) or (str(own.parent) in message and _DAMAGE.search(message))
        if is_damaged or f"{own} does not exist" in message:
            (own / "objects/pack").exists()  # raises if the access is denied
            return HubDamaged(argv, returncode, message, own.parent)
        return GitError(argv, returncode, message)

    async def _confinement(self, scope: ConfinedPaths, path: str) -> Confinement:
        if path not in _INSTALLATIONS:
            _INSTALLATIONS[path] = await _find_installation(self.environ, path)
        program, libraries = _INSTALLATIONS[path]
        own = () if self.git_dir is None else (self.git_dir,)
        return Confinement(program, libraries, (*own, *scope.readable), scope.writable)

    async def line(self, *args: str, env: Mapping[str, str] | None = None, input_: bytes | None = None) -> str:
        """Run git and return its output without the newline."""
        return (await self(*args, env=env, input_=input_)).stdout.decode().rstrip("\n")

    async def changes(self, old: str, new: str, cwd: Path | None = None) -> list[FileChange]:
        """Return the changed files; a rename is a removal and an addition."""
        return parse_raw_diff((await self("diff-tree", "-r", "--raw", "-z", "--no-renames", old, new, cwd=cwd)).stdout)

    async def merge_tree(
        self, ours: str, theirs: str, env: Mapping[str, str] | None = None
    ) -> tuple[str, tuple[str, ...]]:
        """Return the tree of a merge, with both names at conflicts, and the conflicts."""
        arguments = ("merge-tree", "--write-tree", "-z", "--name-only", "--no-messages", ours, theirs)
        merged = await self(*arguments, ok=(0, 1), env=env)
        tree, *paths = merged.stdout.decode(errors="surrogateescape").split("\0")
        return tree, tuple(dict.fromkeys(printable_name(path) for path in paths if path))

    async def entries(self, commit: str, paths: Collection[str], cwd: Path | None = None) -> dict[str, str]:
        """Return `<mode> <kind> <id>` of a commit's entry at each path that exists."""
        if not paths:
            return {}
        # Paths are literal, not patterns (gitglossary(7), pathspec); missing paths are not listed.
        literal = {"GIT_LITERAL_PATHSPECS": "1"}
        listed = await self("ls-tree", "-z", commit, "--", *sorted(paths), env=literal, cwd=cwd)
        rows = (row.partition("\t") for row in split_nul(listed.stdout))
        return {path: meta for meta, _, path in rows}

    async def ignored(
        self, paths: Iterable[str], cwd: Path, env: Mapping[str, str] | None = None, limit: float | None = None
    ) -> set[str]:
        """Return the paths that git ignores according to the files in `cwd`; for `limit` see `__call__`."""
        command, listed = ("check-ignore", "-z", "--stdin"), join_nul(paths)
        done = await self(*command, env=env or {}, cwd=cwd, input_=listed, ok=(0, 1), limit=limit)
        return set(split_nul(done.stdout))

    async def is_ancestor(
        self, earlier: str, commit: str, *, cwd: Path | None = None, may_be_missing: bool = False
    ) -> bool:
        """Return whether `earlier` is `commit` or one of its ancestors.

        With `may_be_missing`, returns False if either does not exist.
        """
        ok = (0, 1, 128) if may_be_missing else (0, 1)
        done = await self("merge-base", "--is-ancestor", earlier, commit, cwd=cwd, ok=ok)
        return done.returncode == 0

    async def has_branch(self, name: str) -> bool:
        """Return whether the repository has this branch."""
        done = await self("show-ref", "--verify", "--quiet", f"refs/heads/{name}", ok=(0, 1))
        return done.returncode == 0


def was_killed(returncode: int, message: str) -> bool:
    """Return whether another process killed a command or its child."""
    if -returncode in _KILLS or returncode - 128 in _KILLS:
        return True
    # A server that exits by itself prints the reason on a separate line.
    if _SILENT_SERVER.fullmatch(" ".join(message.split())):
        return True
    if (fatal := _FATAL.findall(message)) and all(_LOST_OTHER_END.match(line) for line in fatal):
        return True
    return _SHELL_REPORT.search(message) is not None or any(int(number) in _KILLS for number in _DIED.findall(message))


def split_nul(output: bytes) -> list[str]:
    """Split the output of a `-z` command; invalid UTF-8 is decoded as by os.fsdecode."""
    return output.decode(errors="surrogateescape").split("\0")[:-1]


def join_nul(entries: Iterable[str]) -> bytes:
    """Return the input for a `-z` command: the inverse of `split_nul`."""
    return "".join(f"{entry}\0" for entry in entries).encode(errors="surrogateescape")


def parse_raw_diff(output: bytes) -> list[FileChange]:
    """Parse the output of a diff command with `--raw -z --no-renames`."""
    fields = output.decode(errors="surrogateescape").split("\0")
    return [
        FileChange(path, *meta.lstrip(":").split()[:4]) for meta, path in zip(fields[::2], fields[1::2], strict=False)
    ]


#: The git executable and the folders with the rest of its installation, keyed by PATH.
_INSTALLATIONS: Final[dict[str, tuple[Path, tuple[Path, ...]]]] = {}


async def _find_installation(environ: Mapping[str, str], path: str) -> tuple[Path, tuple[Path, ...]]:
    program = await anyio.to_thread.run_sync(partial(shutil.which, "git", path=path))
    if program is None:
        raise RefusedError("git is not on PATH", _INSTALL)
    done = await Git(None, environ=environ)("--exec-path")
    # Its libraries may be in a separate folder, for example when installed by a package manager.
    libraries = (await anyio.Path(program).resolve()).parent.parent / "lib"
    return Path(program), (Path(os.fsdecode(done.stdout).rstrip("\n")), Path(libraries))


async def read_version(environ: Mapping[str, str]) -> str | None:
    """Return git's version, such as `2.39.5`; None if git is not on PATH."""
    try:
        done = await Git(None, environ=environ)("--version", ok=range(128))
    except RefusedError:
        return None
    return done.stdout.decode(errors="replace").strip().removeprefix("git version ")


def is_at_least(version: str, wanted: tuple[int, int]) -> bool:
    """Return whether a version from `read_version` is at least `wanted`."""
    match = re.search(r"(\d+)\.(\d+)", version)
    return match is not None and (int(match[1]), int(match[2])) >= wanted


async def check_version(environ: Mapping[str, str]) -> None:
    """Raise an error with a remedy if git is missing or too old."""
    version = await read_version(environ)
    if version is None:
        raise RefusedError("git is not on PATH", _INSTALL)
    if not is_at_least(version, MINIMUM_VERSION):
        raise RefusedError(f"git {version} is too old", _INSTALL)


def printable_name(name: str) -> str:
    """Return a file name as printable text; bytes that are not UTF-8 are escaped."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


_OBJECT_ID: Final = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


def is_object_id(text: str) -> bool:
    """Return whether the text is a full object id, SHA-1 or SHA-256."""
    return _OBJECT_ID.fullmatch(text) is not None
