"""Determine the outcome of a session from its exit, limits, output and worktree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from orchestrator.domain.settings.failures import FailureClass

#: The note for the next session after a user attached.
PAUSE_NOTE: Final = (
    "A user paused the previous session and continued its conversation directly. This worktree contains the work so "
    "far. Continue the task from there."
)
#: The maximum length of a standard error line in a reason, in characters.
_LONGEST_LINE = 300
#: The maximum number of denied tools per session and per message, and their maximum length in characters.
_DENIALS, _SHOWN, _LONGEST_DENIAL = 20, 3, 80


@dataclass(frozen=True, slots=True)
class Built:
    """The session's work is a commit that can be merged."""

    commit: str


@dataclass(frozen=True, slots=True)
class ReadOnlySuccess:
    """The session succeeded without being allowed to change files."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt failed.

    `until` is when a rate-limited account may be used again (wall-clock seconds). `unfinished` means that the work is
    incomplete although the program succeeded.
    """

    failure: FailureClass
    reason: str
    until: float | None = None
    unfinished: bool = False


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The orchestrator stopped before the session ended."""

    reason: str


@dataclass(frozen=True, slots=True)
class Paused:
    """The session was stopped for a user who attaches, or for landed work: the next one continues its conversation."""

    reason: str
    note: str = PAUSE_NOTE
    """The note for the next session."""


@dataclass(frozen=True, slots=True)
class ResourcesExhausted:
    """The machine lacked a resource to start the session; others would fail as well."""

    reason: str


@dataclass(frozen=True, slots=True)
class ToolDenials:
    """Denied tool calls: their number, the first ones as text, and how to allow them."""

    count: int = 0
    tools: tuple[str, ...] = ()
    remedy: str = ""

    @classmethod
    def of(cls, calls: Sequence[tuple[str, str]]) -> ToolDenials:
        """Return denials from pairs of a call as text and its remedy."""
        tools = tuple(dict.fromkeys(text for text, _ in calls))[:_DENIALS]
        return cls(len(calls), tools, next((remedy for _, remedy in calls if remedy), ""))

    def __str__(self) -> str:
        """Return one line; empty if nothing was denied."""
        if not self.count:
            return ""
        shown = ", ".join(tool[:_LONGEST_DENIAL] for tool in self.tools[:_SHOWN])
        more = ", …" if self.count > len(self.tools[:_SHOWN]) else ""
        line = f"{self.count} {'tool' if self.count == 1 else 'tools'} denied: {shown}{more}"
        return f"{line}: {self.remedy}" if self.remedy else line


@dataclass(frozen=True, slots=True)
class Misconfigured:
    """A configured command can't run on this machine, so no session was started."""

    reason: str


Outcome = Built | ReadOnlySuccess | Failed | Interrupted | Paused | ResourcesExhausted | Misconfigured


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """The exit of a CLI, reported when none of its processes is alive.

    `exit` or `signal` is the CLI's own status. Both are None if it never ran; then `spawn_error` has the reason, unless
    it was stopped before. The byte counts are of the written output, not of the kept one. `killed` counts killed
    processes except the CLI; those in a bubblewrap that the kernel kills are not counted. `output_error` is the reason
    why output could not be written. `exhausted` means that `spawn_error` is a possibly temporary lack of memory, disk
    space, processes or file descriptors, not an error of the program; `missing` that the program does not exist. In a
    bubblewrap, a CLI that signal N ended appears as `exit` 128 + N, as in a shell.
    """

    exit: int | None
    signal: int | None
    ended_by: Literal["exit", "timeout", "idle_timeout", "stop", "orphaned"]
    spawn_error: str | None
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    killed: int = 0
    output_error: str | None = None
    exhausted: bool = False
    missing: bool = False


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """A session's time limits in seconds, in total and when idle (None: no limit)."""

    timeout: float
    idle_timeout: float | None = None


_NONE_DENIED = ToolDenials()


def classify_outcome(
    exit_: ProcessExit,
    limits: SessionLimits,
    commit: str | None,
    refused: str | None,
    verdict: Failed | None,
    *,
    reported_failure: bool = False,
    writes: bool = True,
    errors: str = "",
    denials: ToolDenials = _NONE_DENIED,
) -> Outcome:
    """Return the outcome of a session.

    `commit` has the changes in the worktree (None: no changes), `refused` is the reason to reject them (None:
    accepted), `verdict` is the failure that the adapter found in the program's output. The verdict applies only if the
    program failed, changed nothing, reported its own failure at the end (`reported_failure`), or did not print its
    usual end (`unfinished`). Exit code 0 does not prove success, and neither does partial work. Without `writes`, the
    session was not allowed to change files. `errors` is the tail of standard error: its last line is part of the reason
    for an unexplained exit code. `denials` are part of the reason if nothing changed.
    """
    if exit_.spawn_error is not None:
        return _not_started(exit_)
    if exit_.ended_by in {"stop", "orphaned"}:
        return Interrupted("the run was stopped")
    if exit_.ended_by in {"timeout", "idle_timeout"}:
        return _limit_failure(exit_.ended_by, limits)
    if exit_.exit != 0:
        how = f"got signal {exit_.signal}" if exit_.exit is None else f"ended with exit code {exit_.exit}"
        return verdict or Failed(FailureClass.CRASHED, f"the program {how}{_last_line(errors)}")
    if verdict is not None and (reported_failure or verdict.unfinished):
        return verdict
    return _ended_well(commit, refused, verdict, denials) if writes else ReadOnlySuccess()


def _ended_well(commit: str | None, refused: str | None, verdict: Failed | None, denials: ToolDenials) -> Outcome:
    if refused is not None:
        return Failed(FailureClass.REFUSED, refused)
    if commit is None:
        denied = f": {denials}" if denials.count else ""
        return verdict or Failed(FailureClass.NO_CHANGE, f"the program succeeded but changed nothing{denied}")
    return Built(commit)


def _last_line(errors: str) -> str:
    # Skip lines without text, such as the rule at the end of an exception group traceback.
    lines = [line.strip() for line in errors.splitlines() if any(map(str.isalnum, line))]
    return f": {lines[-1][:_LONGEST_LINE]}" if lines else ""


def _not_started(exit_: ProcessExit) -> Outcome:
    if exit_.exhausted:
        return ResourcesExhausted(f"the program could not be started: {exit_.spawn_error}")
    if exit_.missing:
        return Failed(FailureClass.MISSING, f"the program was not found: {exit_.spawn_error}")
    return Failed(FailureClass.INVALID, f"the program did not start: {exit_.spawn_error}")


def _limit_failure(ended_by: str, limits: SessionLimits) -> Failed:
    if ended_by == "timeout":
        reason = f"still running after its limit of {limits.timeout:g} s: raise `timeout`, or split the task"
        return Failed(FailureClass.TIMEOUT, reason)
    reason = f"no output and no file changes for {limits.idle_timeout:g} s: raise `idle_timeout`, or see its log"
    return Failed(FailureClass.IDLE_TIMEOUT, reason)
