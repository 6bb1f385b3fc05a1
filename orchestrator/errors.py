"""What can go wrong, each error made of facts and ending with what to do.

    CouncilError
      ConfigError          the YAML file is wrong, all problems at once        exit 2
      RefusedError         the request can't be served as things stand         exit 2
        FileHeld           another session has locked the file
        LockRefused        a lock was not free in time, or its owners wait in a circle
        UnreadableDocument a document of ours has a shape that is none of its kind
      PluginError          a plugin broke its contract: it is named and left out
      StateError
        InvalidDocument    a value that the store can't hold
        InvalidTransition  a row that the lifecycle tables do not have
        VersionConflict    somebody else wrote the document first
        LeaseLost          the guard's epoch is no longer the current one
        HandoffBroken      what a phase is to be given is not what was handed over
      StoreUnavailable     the store can't be read or written now               exit 1
        StoreFull          its disk is full
        StateLost          what was recorded is not there any more              exit 3
      LockHeld             a file lock was not free in time
      RequestUnanswered    a run's process did not perform a request in time       exit 1
      GitError             a git command failed that should not
        GitKilled          it was killed from outside, time and again         exit 1
        TargetGone         the target branch was deleted or renamed
      SessionError         a supervisor ended without its report

Expected endings (a task that fails, a merge that conflicts) are values, not errors.
"""

from __future__ import annotations

import errno
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pydantic import ValidationError


class CouncilError(Exception):
    """The root of all errors that this package raises on purpose."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a file: where (lines and columns count from 1), what is wrong, what would be right.

    In a run that comes from no file, line and column are 0, and `path` leads to the place, as in `tasks[0].prompt`.
    """

    file: str
    line: int
    column: int
    what: str
    remedy: str
    path: str | None = None

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return ": ".join(filter(None, (place, self.path, self.what, self.remedy)))


class ConfigError(CouncilError):
    """The file can't be run; `problems` has every mistake that was found, in the file's order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class RefusedError(CouncilError):
    """What was asked for can't be done as things stand; nothing was started."""

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = what, remedy
        super().__init__(f"{what}: {remedy}")


class NothingToMerge(RefusedError):
    """All work of a run is where it is to land."""


class RunActive(RefusedError):
    """Another process coordinates a run."""

    def __init__(self, run: str, pid: int, host: str) -> None:
        self.pid, self.host = pid, host
        what = f"run {run} is at work under process {pid} on {host}"
        super().__init__(what, "wait for it, stop it with SIGINT, or join it by `council work`")


class FileLocked(RefusedError):
    """A file that a session wants to lock was not free in time."""

    def __init__(self, path: str, holder: str, since: float | None) -> None:
        """`holder` is who has locked the file, in words, and `since` when it did (wall-clock seconds), if known."""
        self.path, self.holder, self.since = path, holder, since
        when = "" if since is None else f" (since {datetime.fromtimestamp(since, UTC):%Y-%m-%d %H:%M:%S} UTC)"
        super().__init__(f"{path} is locked by {holder}{when}", "wait for it, or work at something else")


class LockUnavailable(RefusedError):
    """A lock was not free in time, or waiting for it would never end."""

    def __init__(self, name: str, why: str, remedy: str) -> None:
        self.name = name
        super().__init__(f"lock {name!r}: {why}", remedy)


class UnreadableDocument(RefusedError):
    """A document of ours has a shape that is none of its kind."""

    def __init__(self, key: str, flaw: str) -> None:
        self.key, self.reason = key, flaw
        remedy = "`council state verify --repair` restores its last readable version"
        super().__init__(f"{key} can't be read: {flaw}", remedy)


def describe_validation_error(error: ValidationError) -> str:
    """Return the first mistake that a model has found, in one line."""
    wrong = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, wrong["loc"]))
    return ": ".join(filter(None, (place, f"{wrong['msg'][:1].lower()}{wrong['msg'][1:]}")))


def raise_combined_refusal(found: Sequence[tuple[str, str]], remedy: str) -> None:
    """Raise RefusedError if anything was found, each a fact and its own remedy; `remedy` is for several at once."""
    if len(found) == 1:
        raise RefusedError(*found[0])
    if found:
        raise RefusedError("; ".join(f"{what} ({own})" for what, own in found), remedy)


class PluginError(CouncilError):
    """A plugin broke its contract."""

    def __init__(self, plugin: str, why: str) -> None:
        self.plugin, self.why = plugin, why
        super().__init__(f"plugin {plugin!r}: {why}: update it or remove it from this environment")


class StateError(CouncilError):
    """The store refused a change."""


class InvalidDocument(StateError):
    """A value that is not plain JSON (NaN, lone surrogates, too deep) or is too large."""

    def __init__(self, subject: str, why: str) -> None:
        super().__init__(f"{subject} can't be stored: {why}: store plain JSON objects within the size limit")


def format_author(by: str, time: float) -> str:
    """Return a process and an instant (wall-clock seconds) as the sentences of errors name them."""
    return f"{by}, {datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S} UTC"


class InvalidTransition(StateError):
    """The lifecycle has no such row."""

    def __init__(self, subject: str, state: str, trigger: str) -> None:
        self.state, self.trigger = state, trigger
        super().__init__(f"{subject} is {state!r}, {trigger!r} leads nowhere from it: reload and decide anew")


class VersionConflict(StateError):
    """The document is not at the version that the writer had read."""

    def __init__(self, subject: str, expected: int, found: int, *, by: str = "", time: float = 0.0) -> None:
        """`by` wrote the version that was `found`, at `time` (wall-clock seconds)."""
        self.expected, self.found, self.by, self.time = expected, found, by, time
        written = f" (written by {format_author(by, time)})" if by else ""
        super().__init__(f"{subject} is at version {found}{written}, not {expected}: read it and try again")


class HistoryCompacted(StateError):
    """What was asked for is older than what the store keeps."""

    def __init__(self, position: int, first: int) -> None:
        """Nothing is known of the time before `first`, the position of the oldest state that can still be told."""
        self.position, self.first = position, first
        super().__init__(
            f"the state log does not go back to position {position}, only to {first}: ask for a later one; "
            "`state: {retention: …}` says how long it is kept"
        )


class LeaseLost(StateError):
    """Somebody else holds the lease now; whatever this process still wants to write is refused."""

    def __init__(self, subject: str, held: int, current: int | None) -> None:
        self.subject, self.held, self.current = subject, held, current
        remedy = "what this one had goes on there, and `council work` joins the run again"
        super().__init__(f"{subject} is at epoch {current}, not {held}: another process took over: {remedy}")


class ClaimLost(LeaseLost):
    """Another orchestrator has the claim on a task now; this one's work on it does not count any more."""

    def __init__(self, task: str, held: int, current: int, by: str) -> None:
        """`by` is the name of the orchestrator that has it."""
        self.task, self.by = task, by
        super().__init__(f"the claim on task {task!r}, which {by} has taken over,", held, current)


class HandoffCorrupted(StateError):
    """What a phase is to be given is not what was handed over."""

    def __init__(self, handoff: str, why: str) -> None:
        self.handoff, self.why = handoff, why
        remedy = "`council check` says what else is wrong, `council retry TASK --from PHASE` makes it anew"
        super().__init__(f"handoff {handoff}: {why}: {remedy}")


class OrchestratorFenced(LeaseLost):
    """This process was taken for gone, and another has taken over all that it was at."""

    def __init__(self, run: str, orchestrator: str, why: str) -> None:
        what = f"this process ({orchestrator}) has lost its part in run {run}: {why}"
        remedy = "what it had goes on elsewhere, and `council work` joins the run again"
        super().__init__(f"orchestrator {orchestrator}", 1, None)
        self.args = (f"{what}: {remedy}",)


class StoreUnavailable(CouncilError):
    """The store can't be read or written now; nothing that was acknowledged is lost."""

    def __init__(self, place: Path | str, why: str, remedy: str) -> None:
        self.what, self.remedy = f"{place}: {why}", remedy
        super().__init__(f"{self.what}: {remedy}")


class StoreFull(StoreUnavailable):
    """The store's disk is full, which passes when there is room."""


class StateLost(StoreUnavailable):
    """Something that was acknowledged, and read by this process, is not in the store any more."""

    def __init__(self, place: Path | str, why: str) -> None:
        remedy = "`council state verify --repair` settles for what can be read, and `council resume` goes on from there"
        super().__init__(place, why, remedy)


class LockHeld(CouncilError):
    """A file lock was not free in time."""

    def __init__(self, path: Path, holder: str, *, owner_lives: bool = True) -> None:
        self.path, self.holder, self.owner_lives = path, holder, owner_lives
        self.what, self.remedy = f"{path} is locked by {holder}", "wait for it to end or stop it"
        super().__init__(f"{self.what}: {self.remedy}")


class RequestTimeout(CouncilError):
    """A request is recorded, and the process that is to perform it has not done so in time."""

    def __init__(self, holder: str, timeout: float) -> None:
        self.what = f"no answer within {timeout:g} s from {holder}"
        self.remedy = REQUEST_RECORDED
        super().__init__(f"{self.what}: {self.remedy}")


#: What becomes of a request that is not answered.
REQUEST_RECORDED: Final = "the request is recorded, and is done when that process or `council resume` continues"


class GitError(CouncilError):
    """A git command failed that should not have; carries its argv, exit code and messages."""

    def __init__(self, argv: Sequence[str], returncode: int, stderr: str) -> None:
        self.argv, self.returncode, self.stderr = tuple(argv), returncode, " ".join(stderr.split())
        super().__init__(f"`{' '.join(argv)}` ended with {returncode}: {self.stderr or 'no message'}")


class GitKilled(GitError):
    """A git command, or one at its other end, was killed from outside, each time that it was tried."""

    def __init__(self, argv: Sequence[str], returncode: int, stderr: str) -> None:
        super().__init__(argv, returncode, stderr)
        self.what = f"`{' '.join(argv)}` was killed ({self.stderr or f'exit code {returncode}'})"
        self.remedy = "end what kills it, such as a lack of memory, then run the command again, or `council resume`"
        self.args = (f"{self.what}: {self.remedy}",)


class TargetMissing(GitError):
    """The target branch existed and was deleted or renamed since: nothing lands until it exists again."""

    def __init__(self, branch: str, commit: str | None) -> None:
        """Take the branch and the commit that it was last seen at."""
        self.what = f"the target branch {branch!r} was deleted or renamed"
        at = "" if commit is None else f" (`{shlex.join(['git', 'branch', branch, commit])}`)"
        self.remedy = f"create it again{at}, then `council resume`"
        super().__init__(["rev-parse", branch], 1, self.what)
        self.args = (f"{self.what}: {self.remedy}",)


class SessionError(CouncilError):
    """A session's supervisor ended without saying how the session ended."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}: its worktree is kept, `council resume` goes on")


#: The system's codes for a shortage that may pass, each with its message in the C locale and the fix.
_SHORTAGES: Final[Mapping[int, tuple[str, str]]] = {
    errno.ENOSPC: ("No space left on device", "free some space"),
    errno.EDQUOT: ("Disk quota exceeded", "raise the disk quota or free some space"),
    errno.EROFS: ("Read-only file system", "mount it writable"),
    errno.EMFILE: ("Too many open files", "raise the limit of open files (`ulimit -n`)"),
    errno.ENFILE: ("Too many open files in system", "raise the system's limit of open files"),
    errno.ENOMEM: ("Cannot allocate memory", "free some memory"),
    errno.EAGAIN: ("Resource temporarily unavailable", "raise the limit of processes (`ulimit -u`)"),
}
#: The fixes, by errno and by message.
RESOURCE_REMEDIES: Final = {number: fix for number, (_, fix) in _SHORTAGES.items()}
RESOURCE_MESSAGES: Final = dict(_SHORTAGES.values())
#: The errors of ours that are due to something that may pass.
_UNAVAILABLE: Final = GitKilled | LockHeld | RequestTimeout | StoreUnavailable
#: Those of a full disk.
DISK_FULL_ERRNOS: Final = (errno.ENOSPC, errno.EDQUOT)


def find_exhausted_resource(error: OSError | GitError) -> int | None:
    """Return the errno of the resource that this machine lacks now, if an error is due to that."""
    if isinstance(error, GitError):  # it prints the system's messages, in the C locale
        return next((number for number, (text, _) in _SHORTAGES.items() if text in error.stderr), None)
    return error.errno if error.errno in RESOURCE_REMEDIES else None


def is_resource_exhaustion(error: OSError | GitError) -> bool:
    """Whether something failed because this machine has not enough of something now, which may pass."""
    return find_exhausted_resource(error) is not None


def describe_shortage(error: BaseException) -> tuple[str, str] | None:
    """Return what is unavailable now and the fix, where an error is due to that and to nothing else."""
    if isinstance(error, _UNAVAILABLE) and not isinstance(error, StateLost):
        return error.what, error.remedy
    if not isinstance(error, OSError | GitError) or (number := find_exhausted_resource(error)) is None:
        return None
    place = error.filename if isinstance(error, OSError) else " ".join(error.argv[:2])
    return ": ".join(filter(None, (place and str(place), _SHORTAGES[number][0].lower()))), RESOURCE_REMEDIES[number]


def to_unusable_error(error: OSError | GitError, what: str, remedy: str) -> OSError | GitError | RefusedError:
    """Return the refusal of what can't be used ("PATH can't be written"), or a shortage as it is."""
    why = error.stderr if isinstance(error, GitError) else error.strerror or str(error)
    return RefusedError(f"{what}: {why}", remedy) if describe_shortage(error) is None else error


_REFUSALS = {
    errno.EACCES: "give yourself access to it",
    errno.EPERM: "give yourself access to it",
}


def to_permission_refusal(error: OSError) -> RefusedError | None:
    """Return what the machine refuses, with the remedy; None if it may be an internal error."""
    remedy = _REFUSALS.get(error.errno or 0)
    if remedy is None:
        return None
    place = "" if error.filename is None else f"{error.filename}: "
    return RefusedError(f"{place}{(error.strerror or str(error)).lower()}", remedy)
