"""All errors of this package. Each builds its message from its arguments.

A message ends with the remedy.

    CouncilError
      ConfigError            the config file is invalid; has all of its problems   exit 2
      RefusedError           the request can't be served in the current state      exit 2
        NothingToMerge       a run has no unmerged work
        RunActive            another process leads the run
        FileLocked           another session has locked the file
        LockUnavailable      a lock was not free in time, or waiting would deadlock
        UnreadableDocument   one of council's own documents has an invalid structure
      PluginError            a plugin broke its contract: it is reported and skipped
      StateError
        InvalidDocument      a value can't be stored
        InvalidTransition    the tables of statuses have no such transition
        VersionConflict      another process wrote the document first
        HistoryCompacted     the log no longer contains the requested position
        LeaseLost            the guard's epoch is not the current one
          ClaimLost          another orchestrator has the claim on the task
          OrchestratorFenced another orchestrator has taken over all tasks of this one
        HandoffCorrupted     a phase's input differs from the submitted handoff
      StoreUnavailable       the store can't be read or written at present         exit 1
        StoreFull            its disk is full
        StoreUnreachable     its server does not answer
        StateLost            acknowledged commits are missing from the store       exit 3
      LockHeld               a file lock was not free in time
      RequestTimeout         a run's process did not perform a request in time     exit 1
      GitError               a git command failed unexpectedly
        GitKilled            git was killed externally in every attempt            exit 1
        HubDamaged           one of council's own repositories is damaged          exit 2
        TargetMissing        the target branch was deleted or renamed
      SessionError           a supervisor ended without a report

Expected outcomes (a failed task, a merge conflict) are values, not errors.
"""

from __future__ import annotations

import errno
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pydantic import ValidationError

#: The maximum length of a plugin's error in a message, in characters.
_LONGEST_FAULT: Final = 500


class CouncilError(Exception):
    """The base class of all errors that this package raises on purpose."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem in a file: location (lines, columns from 1), error and remedy.

    For a configuration without a file, line and column are 0, and `path` is the location, such as `tasks[0].prompt`.
    """

    file: str
    line: int
    column: int
    message: str
    remedy: str
    path: str | None = None

    def __str__(self) -> str:
        location = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return ": ".join(filter(None, (location, self.path, self.message, self.remedy)))


class ConfigError(CouncilError):
    """The configuration is invalid; `problems` lists all problems, in file order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class RefusedError(CouncilError):
    """The request can't be served in the current state; nothing was started."""

    def __init__(self, message: str, remedy: str) -> None:
        self.message, self.remedy = message, remedy
        super().__init__(f"{message}: {remedy}")


class InvalidValue(CouncilError, ValueError):
    """A value is invalid for its setting; plugin validators may raise ValueError."""

    def __init__(self, message: str, remedy: str) -> None:
        self.message, self.remedy = message, remedy
        super().__init__(f"{message}: {remedy}")

    @classmethod
    def of(cls, error: ValueError) -> InvalidValue:
        """Return an error as InvalidValue; other errors are split at the first colon."""
        if isinstance(error, cls):
            return error
        message, _, remedy = str(error).partition(": ")
        return cls(message, remedy or "correct it")


class NothingToMerge(RefusedError):
    """A run has no unmerged work."""


class RunActive(RefusedError):
    """Another process leads the run."""

    def __init__(self, run: str, pid: int, host: str) -> None:
        self.pid, self.host = pid, host
        message = f"run {run} is active in process {pid} on {host}"
        stop = f"stop it with `kill {pid}`"
        super().__init__(message, f"wait for it to end, {stop}, or join it with `council work {run}`")


class FileLocked(RefusedError):
    """Another session has locked the file and did not release it in time."""

    def __init__(self, path: str, holder: str, since: float | None) -> None:
        """Describe the owner of the lock by `holder`.

        `since` is when the lock was acquired (wall-clock seconds), if known.
        """
        self.path, self.holder, self.since = path, holder, since
        when = "" if since is None else f" (since {datetime.fromtimestamp(since, UTC):%Y-%m-%d %H:%M:%S} UTC)"
        super().__init__(f"{path} is locked by {holder}{when}", "wait for it, or work on other files")


class LockUnavailable(RefusedError):
    """A lock was not free in time, or waiting for it would deadlock."""

    def __init__(self, name: str, reason: str, remedy: str) -> None:
        self.name = name
        super().__init__(f"lock {name!r}: {reason}", remedy)


class UnreadableDocument(RefusedError):
    """One of council's own documents has an invalid structure for its kind."""

    def __init__(self, key: str, reason: str) -> None:
        self.key, self.reason = key, reason
        remedy = "`council state verify --repair` restores its last readable version"
        super().__init__(f"{key} can't be read: {reason}", remedy)


def describe_validation_error(error: ValidationError) -> str:
    """Return the first validation error of a model, on one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    location = ".".join(map(str, first["loc"]))
    return ": ".join(filter(None, (location, f"{first['msg'][:1].lower()}{first['msg'][1:]}")))


def raise_combined_refusal(refusals: Sequence[tuple[str, str]], remedy: str) -> None:
    """Raise RefusedError for any refusals (problem and remedy).

    `remedy` is used if there are several.
    """
    if len(refusals) == 1:
        raise RefusedError(*refusals[0])
    if refusals:
        raise RefusedError("; ".join(f"{fact} ({own})" for fact, own in refusals), remedy)


class PluginError(CouncilError):
    """A plugin broke its contract."""

    def __init__(self, plugin: str, reason: str) -> None:
        self.plugin, self.reason = plugin, reason
        super().__init__(f"plugin {plugin!r}: {reason}: update it or remove it from this environment")


class PluginFailed(CouncilError):
    """Plugin code raised an exception, which is the cause of this one."""

    def __init__(self, error: BaseException) -> None:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        text = str(error) if isinstance(error, CouncilError) else f"{type(error).__name__}: {error}"
        super().__init__(" ".join(text.split())[:_LONGEST_FAULT])


@contextmanager
def plugin_code(*expected: type[Exception]) -> Iterator[None]:
    """Raise PluginFailed for exceptions of plugin code that are not `expected`."""
    try:
        yield
    except expected:
        raise
    except (Exception, SystemExit, BaseExceptionGroup) as error:
        raise PluginFailed(error) from error


class StateError(CouncilError):
    """The store rejected a change."""


class InvalidDocument(StateError):
    """A value is not plain JSON, such as NaN or deeply nested, or is too large."""

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(f"can't store {subject}: {reason}: store plain JSON objects within the size limit")


def format_writer(writer: str, time: float) -> str:
    """Return a process and a time (wall-clock seconds) as text for error messages."""
    return f"{writer}, {datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S} UTC"


class InvalidTransition(StateError):
    """The tables of statuses have no such transition."""

    def __init__(self, subject: str, state: str, trigger: str) -> None:
        self.state, self.trigger = state, trigger
        super().__init__(f"{subject} is {state!r}, which does not allow {trigger!r}: reload it and try again")


class VersionConflict(StateError):
    """The document is no longer at the version that the writer had read."""

    def __init__(self, subject: str, expected: int, found: int, *, writer: str = "", time: float = 0.0) -> None:
        """`writer` wrote the version `found` at `time` (wall-clock seconds)."""
        self.expected, self.found, self.writer, self.time = expected, found, writer, time
        written = f" (written by {format_writer(writer, time)})" if writer else ""
        super().__init__(f"{subject} is at version {found}{written}, expected {expected}: read it again and retry")


class HistoryCompacted(StateError):
    """The requested position is older than the log."""

    def __init__(self, position: int, first: int) -> None:
        """Name `first`, the oldest position that the log can reconstruct."""
        self.position, self.first = position, first
        super().__init__(
            f"the state log starts at position {first}, after position {position}: use a later position; "
            "`state: {retention: …}` sets how long history is retained"
        )


class LeaseLost(StateError):
    """Another process holds the lease; further writes of this process are rejected."""

    def __init__(
        self, subject: str, held: int, current: int | None, owner: str = "another process", work: str = "its tasks"
    ) -> None:
        """`owner` now holds the lease, and continues `work`."""
        self.subject, self.held, self.current = subject, held, current
        message = f"{owner} took over {subject} (epoch {current}, expected {held}) and continues {work}"
        super().__init__(f"{message}; to rejoin: `council work`")


class ClaimLost(LeaseLost):
    """Another orchestrator has a task's claim; work on it here is discarded."""

    def __init__(self, task: str, held: int, current: int, owner: str) -> None:
        self.task, self.owner = task, owner
        super().__init__(f"the claim on task {task!r}", held, current, owner, "the task")


class HandoffCorrupted(StateError):
    """The input of a phase differs from the submitted handoff."""

    def __init__(self, handoff: str, reason: str) -> None:
        self.handoff, self.reason = handoff, reason
        remedy = "list all errors with `council check`, then repeat the phase with `council retry TASK --from PHASE`"
        super().__init__(f"handoff {handoff}: {reason}: {remedy}")


class OrchestratorFenced(LeaseLost):
    """Another orchestrator considered this one dead and took over all its tasks."""

    def __init__(self, run: str, orchestrator: str, reason: str) -> None:
        message = f"this process ({orchestrator}) was removed from run {run} ({reason})"
        remedy = "other processes continue its tasks; to rejoin: `council work`"
        super().__init__(f"orchestrator {orchestrator}", 1, None)
        self.args = (f"{message}: {remedy}",)


class StoreUnavailable(CouncilError):
    """The store can't be read or written at present; no acknowledged commit is lost."""

    def __init__(self, location: Path | str, reason: str, remedy: str) -> None:
        self.message, self.remedy = f"{location}: {reason}", remedy
        super().__init__(f"{self.message}: {remedy}")


class StoreFull(StoreUnavailable):
    """The disk of the store is full; commits succeed again once there is free space."""


class StoreUnreachable(StoreUnavailable):
    """The server of the store does not answer, for example while it restarts."""


class StateLost(StoreUnavailable):
    """A commit that this process has read or written is missing from the store."""

    def __init__(self, location: Path | str, reason: str) -> None:
        remedy = "restore the readable state with `council state verify --repair`, then `council resume`"
        super().__init__(location, reason, remedy)


class LockHeld(CouncilError):
    """A file lock was not free in time."""

    def __init__(self, path: Path, holder: str, *, pid: int | None = None, owner_lives: bool = True) -> None:
        self.path, self.holder, self.pid, self.owner_lives = path, holder, pid, owner_lives
        self.message, self.remedy = f"{path} is locked by {holder}", "wait for it to end or stop it"
        super().__init__(f"{self.message}: {self.remedy}")


class ResourceShortage(CouncilError):
    """This machine currently lacks a resource, so nothing was started."""

    def __init__(self, message: str, remedy: str) -> None:
        self.message, self.remedy = message, remedy
        super().__init__(f"{message}: {remedy}")


class RequestTimeout(CouncilError):
    """A request is recorded, but the responsible process has not performed it in time."""

    def __init__(self, holder: str, timeout: float) -> None:
        self.message = f"no answer within {timeout:g} s from {holder}"
        self.remedy = REQUEST_RECORDED
        super().__init__(f"{self.message}: {self.remedy}")


#: The remedy of a request without an answer.
REQUEST_RECORDED: Final = (
    "the request is recorded, and will be performed when that process continues, or by `council resume`"
)


class WorkMissing(RefusedError):
    """Recorded work of a task is neither on this machine nor at the remote."""


class GitError(CouncilError):
    """A git command failed unexpectedly; has its argv, exit code and messages."""

    def __init__(self, argv: Sequence[str], returncode: int, stderr: str) -> None:
        self.argv, self.returncode, self.stderr = tuple(argv), returncode, " ".join(stderr.split())
        super().__init__(f"`{' '.join(argv)}` exited with {returncode}: {self.stderr or 'no message'}")


class GitKilled(GitError):
    """A git command, local or remote, was killed externally in every attempt."""

    def __init__(self, argv: Sequence[str], returncode: int, stderr: str) -> None:
        super().__init__(argv, returncode, stderr)
        self.message = f"`{' '.join(argv)}` was killed ({self.stderr or f'exit code {returncode}'})"
        self.remedy = "fix the cause, such as lack of memory, then repeat the command, or run `council resume`"
        self.args = (f"{self.message}: {self.remedy}",)


class HubDamaged(GitError):
    """Council's own repositories in a folder are damaged or incomplete."""

    def __init__(self, argv: Sequence[str], returncode: int, stderr: str, folder: Path) -> None:
        super().__init__(argv, returncode, stderr)
        self.message = f"the internal repository {folder} is damaged: {self.stderr}"
        self.remedy = "move it away and start a new run; landed commits stay on their targets"
        self.args = (f"{self.message}: {self.remedy}",)


class TargetMissing(GitError):
    """The target was deleted or renamed; nothing can land until it exists again."""

    def __init__(self, branch: str, commit: str | None) -> None:
        """`commit` is the last known commit of the branch."""
        self.message = f"the target branch {branch!r} was deleted or renamed"
        at = "" if commit is None else f" (`{shlex.join(['git', 'branch', branch, commit])}`)"
        self.remedy = f"create it again{at}, then `council resume`"
        super().__init__(["rev-parse", branch], 1, self.message)
        self.args = (f"{self.message}: {self.remedy}",)


class SessionError(CouncilError):
    """A supervisor ended without reporting the outcome of its session."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}: its worktree is preserved, see `council salvage list`")


#: Temporary resource shortages by errno: the system's message in the C locale, and the fix.
_SHORTAGES: Final[Mapping[int, tuple[str, str]]] = {
    errno.ENOSPC: ("No space left on device", "free some space"),
    errno.EDQUOT: ("Disk quota exceeded", "raise the disk quota or free some space"),
    errno.EROFS: ("Read-only file system", "mount it writable"),
    errno.EMFILE: ("Too many open files", "raise the limit of open files (`ulimit -n`)"),
    errno.ENFILE: ("Too many open files in system", "raise the system's limit of open files"),
    errno.ENOMEM: ("Cannot allocate memory", "free some memory"),
    errno.EAGAIN: ("Resource temporarily unavailable", "raise the limit of processes (`ulimit -u`)"),
}
#: Hardware faults, in the same format: unlike shortages they may be permanent, so waiting does not help.
_FAULTS: Final[Mapping[int, tuple[str, str]]] = {
    errno.EIO: ("Input/output error", "check the disk and its file system"),
    errno.ENOLCK: ("No locks available", "use a local file system, or start the lock service of this one"),
}
#: The fixes, by errno and by message.
RESOURCE_REMEDIES: Final = {number: fix for number, (_, fix) in _SHORTAGES.items()}
RESOURCE_MESSAGES: Final = dict(_SHORTAGES.values())
#: Errors of this package with a temporary cause.
_UNAVAILABLE: Final = GitKilled | LockHeld | RequestTimeout | ResourceShortage | StoreUnavailable
#: The errnos of a full disk.
DISK_FULL_ERRNOS: Final = (errno.ENOSPC, errno.EDQUOT)


def find_exhausted_resource(error: OSError | GitError) -> int | None:
    """Return the errno of the exhausted resource that caused an error, or None."""
    return _find_errno(error, _SHORTAGES)


def _find_errno(error: BaseException, among: Mapping[int, tuple[str, str]]) -> int | None:
    if isinstance(error, OSError):
        return error.errno if error.errno in among else None
    # Git prints the system's messages, in the C locale; a failed import of a compiled module has no errno.
    message = error.stderr if isinstance(error, GitError) else str(error)
    return next((number for number, (text, _) in among.items() if text in message), None)


def is_resource_exhaustion(error: OSError | GitError) -> bool:
    """Return True if an error is due to a temporary resource shortage on this machine."""
    return find_exhausted_resource(error) is not None


def describe_shortage(error: BaseException) -> tuple[str, str] | None:
    """Return the resource shortage or hardware fault behind an error, with the fix.

    None for other causes.
    """
    if isinstance(error, _UNAVAILABLE) and not isinstance(error, StateLost):
        return error.message, error.remedy
    known = {**_SHORTAGES, **_FAULTS}
    # Compiled modules turn the error of an import within them into a panic, which is no Exception.
    is_system_error = isinstance(error, OSError | GitError | ImportError) or type(error).__name__ == "PanicException"
    if not is_system_error or (number := _find_errno(error, known)) is None:
        return None
    subject = " ".join(error.argv[:2]) if isinstance(error, GitError) else getattr(error, "filename", None)
    return ": ".join(filter(None, (subject and str(subject), known[number][0].lower()))), known[number][1]


def to_unusable_error(error: OSError | GitError, message: str, remedy: str) -> OSError | GitError | RefusedError:
    """Return a refusal with the message `message`, or the error itself for a shortage.

    For example, `message` is "PATH is not writable".
    """
    reason = error.stderr if isinstance(error, GitError) else error.strerror or str(error)
    return RefusedError(f"{message}: {reason}", remedy) if describe_shortage(error) is None else error


def to_path_refusal(error: OSError) -> RefusedError | None:
    """Return a refusal for a denied access, a file in the place of a folder, or a deleted folder; None for others.

    Others are perhaps internal errors. Blocks.
    """
    if error.errno == errno.ENOENT and isinstance(error.filename, str | Path):
        folder = Path(error.filename).parent
        if folder.is_absolute() and not folder.exists():
            return RefusedError(f"{folder} was deleted while it was in use", "start the command again")
    if error.errno == errno.ENOTDIR and isinstance(error.filename, str | Path):
        path = Path(error.filename)
        if (file := next((one for one in (path, *path.parents) if one.is_file()), None)) is not None:
            return RefusedError(f"{file} is a file, and a folder is needed there", "move it to another place")
    if error.errno not in {errno.EACCES, errno.EPERM}:
        return None
    subject = "" if error.filename is None else f"{error.filename}: "
    return RefusedError(f"{subject}{(error.strerror or str(error)).lower()}", "grant yourself access to it")
