"""The only door to git: one sealed way to run it, and reads through GitPython where no process is needed.

Two environments, both made from nothing:

- `sealed`: for our own repositories and for agents' trees. No system, global or user configuration, no hooks,
  no fsmonitor, no signing, no pager, a fixed identity, plain English messages.
- `users`: for talking to the user's repository or remote. Their configuration, credentials and proxies apply
  (they own that side), but nothing that would point git at another repository is handed on.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from orchestrator.errors import GitError, GitKilled, RefusedError
from orchestrator.repo.git.stale_files import list_index_locks, list_locks, remove_unowned
from orchestrator.sandbox.confinement import Confinement
from orchestrator.system.failpoints import failpoint, is_triggered
from orchestrator.system.process import CompletedCommand, run
from orchestrator.system.resources import is_disk_full

MINIMUM_VERSION: Final = (2, 38)  # the first with `merge-tree --write-tree`
_INSTALL: Final = f"install git {'.'.join(map(str, MINIMUM_VERSION))} or newer"
RECOMMENDED_VERSION: Final = (2, 39)  # the oldest that the tests run with
IDENTITY: Final = ("CLI Council", "council@localhost")
GITLINK_MODE: Final = "160000"  # the mode of a link to a commit of another repository

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
#: Bytes that git may take while it reads what an agent made, which may be small and mean terabytes.
_MAX_MEMORY: Final = 2 << 30
#: How often a command is tried that is killed, and for how long between two trials, in seconds.
_MAX_ATTEMPTS: Final = 5
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0
#: Seconds to wait for other commands that may own a lock in the way.
_STALE_LOCK_TIMEOUT: Final = 1.0
_KILLS: Final = frozenset({signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGPIPE})
# What git says of children, of a server of its own on this machine, and of locks (in the C locale).
_DIED: Final = re.compile(r"died of signal (\d+)")
# What the shell says, by which git starts such a server.
_SHELL_REPORT: Final = re.compile(r"^(?:\S+: line \d+: +\d+ )?(?:Killed|Terminated)\b", re.MULTILINE)
_FATAL: Final = re.compile(r"^(?:remote: )?fatal: (.+)", re.MULTILINE)
_LOST_OTHER_END: Final = re.compile(r"the remote end hung up unexpectedly|early EOF|invalid index-pack output")
_SILENT_SERVER: Final = re.compile(
    r"fatal: Could not read from remote repository\. Please make sure you have the correct access rights"
    r" and the repository exists\."
)
_LOCKED: Final = re.compile(r"(?:Unable to create '|could not lock config file )(.+?)(?:'|): File exists")
_CONFIG_FLAGS: Final = tuple(flag for item in _HARMLESS_CONFIG for flag in ("-c", item))

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
# What a user sets to reach a server or to choose a configuration; everything else named GIT_* relocates a
# repository or changes what commands mean (https://git-scm.com/docs/git#_environment_variables).
_PASSED_USER_VARIABLES: Final = re.compile(
    r"GIT_(?:SSH(?:_COMMAND|_VARIANT)?|ASKPASS|SSL_[A-Z_]+|PROXY_[A-Z_]+|HTTP_[A-Z_]+|CONFIG_(?:GLOBAL|SYSTEM|NOSYSTEM)"
    r"|EXEC_PATH|ALLOW_PROTOCOL)"
)


def sealed_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for git on our own repositories and on agents' trees."""
    return {"PATH": environ.get("PATH", os.defpath), **_SEALED_ENV}


def user_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for git at the user's side: theirs, less what relocates a repository."""
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith("GIT_") or _PASSED_USER_VARIABLES.fullmatch(name)
    }
    return {**kept, **_COMMON_ENV}


@dataclass(frozen=True, slots=True)
class FileChange:
    """One file that differs between two commits; where it is not there its mode is 000000."""

    path: str
    old_mode: str
    new_mode: str
    old_id: str
    new_id: str


@dataclass(frozen=True, slots=True)
class ConfinedPaths:
    """The files and folders, with all beneath, that a confined git command may read, and those that it may write."""

    readable: tuple[Path, ...]
    writable: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Git:
    """Runs git in one repository; `keep_fds` are locks that each command holds until it has ended.

    Without a `git_dir` git finds the repository of the folder that each call names as `cwd`.
    """

    git_dir: Path | None
    as_user: bool = False
    keep_fds: tuple[int, ...] = ()
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    flags: tuple[str, ...] = ()
    """Options of git itself that each command is given."""
    scope: ConfinedPaths | None = None
    """What it may touch, in a sandbox of its own; None: whatever the user may."""

    def confined(self, *, readable: Iterable[Path] = (), writable: Iterable[Path] = ()) -> Git:
        """Return a Git whose commands run in a sandbox: no network, no home, no other program, only these paths.

        Every command that looks at what an agent can write runs in one, so that no feature of git that obeys what it
        finds there can do harm.
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
        """Run `git ARGS` to its end; GitError if the exit code is not in `ok`. Never cut off by cancellation.

        One that is killed from outside is run again, a few times, and so is one that finds a lock in our repository
        that a killed one left; then it is GitKilled. With `limit`, for what an agent made, it has so many seconds, and
        2 GiB of memory.
        """
        trials = AsyncRetrying(
            retry=retry_if_exception(self._is_retryable),
            stop=stop_after_attempt(_MAX_ATTEMPTS),
            wait=wait_random_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE),
            sleep=anyio.sleep,
            reraise=True,
        )
        async for trial in trials:
            with trial:
                if trial.retry_state.attempt_number > 1:
                    await self._remove_stale_locks(env or {})
                return await self._run(args, env, input_, cwd, ok, keep_fds, limit)
        raise AssertionError("the last trial returns or raises")

    def _is_retryable(self, error: BaseException) -> bool:
        """Whether a command may succeed if it is run again."""
        if isinstance(error, GitKilled):
            return True
        found = _LOCKED.search(error.stderr) if isinstance(error, GitError) and self.git_dir is not None else None
        # Of all repositories that it deals with only our own is cleaned.
        return found is not None and self.git_dir is not None and Path(found[1]).is_relative_to(self.git_dir.parent)

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
        run_it = run(
            ["git", *_CONFIG_FLAGS, *self.flags, *args],
            env={**base, **({"GIT_DIR": str(self.git_dir)} if self.git_dir else {}), **(env or {})},
            cwd=cwd or self.git_dir,
            input=input_,
            keep_fds=(*self.keep_fds, *keep_fds),
            timeout=limit,
            memory=None if limit is None else _MAX_MEMORY,
            confinement=None if self.scope is None else await self._confinement(self.scope, base["PATH"]),
        )
        try:
            done = await run_it
        except TimeoutError as error:
            raise GitError(["git", *args], -9, str(error)) from None
        except (FileNotFoundError, NotADirectoryError):
            folder = cwd or self.git_dir
            if folder is None or folder.is_dir():
                raise RefusedError("git is not on PATH", _INSTALL) from None
            raise GitError(["git", *args], 128, f"there is no folder {folder}") from None
        except PermissionError as error:
            remedy = "install the git of your system, and have it first on PATH"
            raise RefusedError(f"git can't be started in its sandbox: {error}", remedy) from None
        if is_triggered("git.ended"):
            done = CompletedCommand(-signal.SIGKILL, b"", b"")
        if done.returncode not in ok:
            said = done.stderr.decode(errors="replace")
            if await anyio.to_thread.run_sync(is_disk_full, cwd, self.git_dir):  # which git often leaves out
                said = f"{said}: {os.strerror(errno.ENOSPC)}"
            elif was_killed(done.returncode, said):
                raise GitKilled(["git", *args], done.returncode, said)
            raise GitError(["git", *args], done.returncode, said)
        return done

    async def _confinement(self, scope: ConfinedPaths, path: str) -> Confinement:
        if path not in _INSTALLATIONS:
            _INSTALLATIONS[path] = await _find_installation(self.environ, path)
        program, libraries = _INSTALLATIONS[path]
        own = () if self.git_dir is None else (self.git_dir,)
        return Confinement(program, libraries, (*own, *scope.readable), scope.writable)

    async def line(self, *args: str, env: Mapping[str, str] | None = None, input_: bytes | None = None) -> str:
        """Run git and return what it printed, without the newline."""
        return (await self(*args, env=env, input_=input_)).stdout.decode().rstrip("\n")

    async def changes(self, old: str, new: str, cwd: Path | None = None) -> list[FileChange]:
        """Return what differs between two commits, file by file; a rename is a removal and an addition."""
        return parse_raw_diff((await self("diff-tree", "-r", "--raw", "-z", "--no-renames", old, new, cwd=cwd)).stdout)

    async def merge_tree(
        self, ours: str, theirs: str, env: Mapping[str, str] | None = None
    ) -> tuple[str, tuple[str, ...]]:
        """Return the tree of a merge, and the paths in conflict; there its files carry both names as markers."""
        arguments = ("merge-tree", "--write-tree", "-z", "--name-only", "--no-messages", ours, theirs)
        merged = await self(*arguments, ok=(0, 1), env=env)
        tree, *paths = merged.stdout.decode(errors="surrogateescape").split("\0")
        return tree, tuple(dict.fromkeys(printable_name(path) for path in paths if path))

    async def entries(self, commit: str, paths: Collection[str], cwd: Path | None = None) -> dict[str, str]:
        """Return what a commit has at those of the paths that it has: mode, kind and id, with a space between them."""
        if not paths:
            return {}
        # The names are no patterns (gitglossary(7), pathspec); what is not there is not listed.
        literal = {"GIT_LITERAL_PATHSPECS": "1"}
        listed = await self("ls-tree", "-z", commit, "--", *sorted(paths), env=literal, cwd=cwd)
        rows = (row.partition("\t") for row in split_nul(listed.stdout))
        return {path: meta for meta, _, path in rows}

    async def ignored(self, paths: Iterable[str], cwd: Path, env: Mapping[str, str] | None = None) -> set[str]:
        """Return those of the paths that git ignores, by the files in `cwd`."""
        done = await self("check-ignore", "-z", "--stdin", env=env or {}, cwd=cwd, input_=join_nul(paths), ok=(0, 1))
        return set(split_nul(done.stdout))

    async def is_ancestor(
        self, earlier: str, commit: str, *, cwd: Path | None = None, may_be_missing: bool = False
    ) -> bool:
        """Whether a commit is the other one or before it; with `may_be_missing` also False if one is not there."""
        ok = (0, 1, 128) if may_be_missing else (0, 1)
        done = await self("merge-base", "--is-ancestor", earlier, commit, cwd=cwd, ok=ok)
        return done.returncode == 0

    async def has_branch(self, name: str) -> bool:
        """Whether the repository has this branch."""
        done = await self("show-ref", "--verify", "--quiet", f"refs/heads/{name}", ok=(0, 1))
        return done.returncode == 0


def was_killed(returncode: int, said: str) -> bool:
    """Whether a command, or one that it had started, was ended from outside; one that crashes would do so again."""
    if -returncode in _KILLS or returncode - 128 in _KILLS:
        return True
    # A server that ends by itself says why, in a line of its own.
    if _SILENT_SERVER.fullmatch(" ".join(said.split())):
        return True
    if (fatal := _FATAL.findall(said)) and all(_LOST_OTHER_END.match(line) for line in fatal):
        return True
    return _SHELL_REPORT.search(said) is not None or any(int(number) in _KILLS for number in _DIED.findall(said))


def split_nul(output: bytes) -> list[str]:
    """Return what a command printed with `-z`; bytes that are no UTF-8 are kept as os.fsdecode does."""
    return output.decode(errors="surrogateescape").split("\0")[:-1]


def join_nul(entries: Iterable[str]) -> bytes:
    """Return what a command reads with `-z`: the reverse of `split_nul`."""
    return "".join(f"{entry}\0" for entry in entries).encode(errors="surrogateescape")


def parse_raw_diff(output: bytes) -> list[FileChange]:
    """Return the changes that a diff command printed with `--raw -z --no-renames`."""
    fields = output.decode(errors="surrogateescape").split("\0")
    return [
        FileChange(path, *meta.lstrip(":").split()[:4]) for meta, path in zip(fields[::2], fields[1::2], strict=False)
    ]


#: For each PATH the program that git is, and the folders with the rest of it.
_INSTALLATIONS: Final[dict[str, tuple[Path, tuple[Path, ...]]]] = {}


async def _find_installation(environ: Mapping[str, str], path: str) -> tuple[Path, tuple[Path, ...]]:
    found = await anyio.to_thread.run_sync(partial(shutil.which, "git", path=path))
    if found is None:
        raise RefusedError("git is not on PATH", _INSTALL)
    done = await Git(None, environ=environ)("--exec-path")
    # What it was built with may be in a folder of its own, such as that of a package manager.
    own = (await anyio.Path(found).resolve()).parent.parent / "lib"
    return Path(found), (Path(os.fsdecode(done.stdout).rstrip("\n")), Path(own))


async def read_version(environ: Mapping[str, str]) -> str | None:
    """Return what git says of its version, as in 2.39.5; None if there is no git on PATH."""
    try:
        done = await Git(None, environ=environ)("--version", ok=range(128))
    except RefusedError:
        return None
    return done.stdout.decode(errors="replace").strip().removeprefix("git version ")


def is_at_least(version: str, wanted: tuple[int, int]) -> bool:
    """Whether a version, as `read_version` returns it, is one of these first two numbers or a newer one."""
    match = re.search(r"(\d+)\.(\d+)", version)
    return match is not None and (int(match[1]), int(match[2])) >= wanted


async def check_version(environ: Mapping[str, str]) -> None:
    """Refuse a git that is missing or too old, with the remedy."""
    version = await read_version(environ)
    if version is None:
        raise RefusedError("git is not on PATH", _INSTALL)
    if not is_at_least(version, MINIMUM_VERSION):
        raise RefusedError(f"git {version} is too old", _INSTALL)


def printable_name(name: str) -> str:
    """Return a file's name as text that can be stored and printed; bytes that are not UTF-8 become escapes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


_OBJECT_ID: Final = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


def is_object_id(text: str) -> bool:
    """Whether this is a full object name, SHA-1 or SHA-256."""
    return _OBJECT_ID.fullmatch(text) is not None


async def read_ref(repository: Path, ref: str) -> str | None:
    """Return the object id that a ref of the user's repository holds, read without running git; None if none.

    `repository` is a git directory or the top of a checkout. GitError where it can't be read.
    """
    return await anyio.to_thread.run_sync(_read_ref, repository, ref)


def _read_ref(repository: Path, ref: str) -> str | None:
    own = repository / ".git"
    with suppress(OSError):  # packed, in another format, or there is none: GitPython finds that out
        value = ((own if own.exists() else repository) / ref).read_text(errors="replace").rstrip("\n")
        if is_object_id(value):
            return value
    return _read_any_ref(repository, ref)


def _read_any_ref(repository: Path, ref: str) -> str | None:
    # GitPython's import costs as much as all our other imports together.
    import git
    from git.exc import GitError as GitPythonError

    try:
        with git.Repo(repository) as opened:
            return git.SymbolicReference.dereference_recursive(opened, ref)
    except ValueError:  # GitPython's word for a ref that does not exist
        return None
    except (GitPythonError, OSError) as error:
        raise GitError(["rev-parse", ref], 128, f"{repository}: {error}") from error
