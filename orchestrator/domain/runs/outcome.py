"""How a session ended, judged by facts alone: exit, limits, what it said, and what is in the worktree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.domain.runs.failures import FailureClass

#: Characters of a line of standard error that are told.
_LONGEST_LINE = 300
#: Denied tools that are recorded of a session, and that a line names, each with so many characters.
_DENIALS, _SHOWN, _LONGEST_DENIAL = 20, 3, 80


@dataclass(frozen=True, slots=True)
class Built:
    """The session's work is a commit that can be merged."""

    commit: str


@dataclass(frozen=True, slots=True)
class ReadOnlySuccess:
    """The session ended well, and was not to change anything."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt failed; `until` is when an account that is rate limited may be used again (wall-clock seconds).

    `unfinished`: what has been built by then is half of the work, though the program ended well.
    """

    failure: FailureClass
    reason: str
    until: float | None = None
    unfinished: bool = False


@dataclass(frozen=True, slots=True)
class Interrupted:
    """We ended before the session could."""

    reason: str


@dataclass(frozen=True, slots=True)
class ResourcesExhausted:
    """This machine had not enough of something to start the session; another one would fare no better now."""

    reason: str


@dataclass(frozen=True, slots=True)
class ToolDenials:
    """The tools that a session was denied: how many calls, the first of them in words, and what allows them."""

    count: int = 0
    tools: tuple[str, ...] = ()
    remedy: str = ""

    @classmethod
    def of(cls, calls: Sequence[tuple[str, str]]) -> ToolDenials:
        """Return denials from what was called, in words, and the remedy of each."""
        tools = tuple(dict.fromkeys(text for text, _ in calls))[:_DENIALS]
        return cls(len(calls), tools, next((remedy for _, remedy in calls if remedy), ""))

    def __str__(self) -> str:
        """Return it as a line; empty where nothing was denied."""
        if not self.count:
            return ""
        shown = ", ".join(one[:_LONGEST_DENIAL] for one in self.tools[:_SHOWN])
        more = ", …" if self.count > len(self.tools[:_SHOWN]) else ""
        line = f"{self.count} {'tool' if self.count == 1 else 'tools'} denied: {shown}{more}"
        return f"{line}: {self.remedy}" if self.remedy else line


@dataclass(frozen=True, slots=True)
class Misconfigured:
    """A command of the user's can't be run here, whatever the task: no session was started."""

    reason: str


Outcome = Built | ReadOnlySuccess | Failed | Interrupted | ResourcesExhausted | Misconfigured


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How the process ended: `ended_by` is exit, timeout, idle_timeout, stop or orphaned.

    `parse_spawn_error` says why it never ran; `exhausted` that this was for lack of descriptors, memory or space, `missing`
    that there is no such program.
    """

    ended_by: str
    code: int | None
    signal: int | None
    spawn_error: str | None
    exhausted: bool = False
    missing: bool = False


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What a session may take, in seconds: in all, and without a sign of life (None: no limit)."""

    timeout: float
    idle_timeout: float | None = None


_NONE_DENIED = ToolDenials()


def judge_outcome(
    exit_: ProcessExit,
    limits: SessionLimits,
    commit: str | None,
    refused: str | None,
    verdict: Failed | None,
    *,
    admitted: bool = False,
    writes: bool = True,
    errors: str = "",
    denials: ToolDenials = _NONE_DENIED,
) -> Outcome:
    """Return the outcome.

    `commit` is what the worktree holds beyond its base (None: nothing), `refused` why it can't be taken (None:
    it can), `verdict` what the adapter reads from the program's words. Those count only against it: they are
    heard where it failed, left everything as it was, or has itself `admitted` at its end that it failed, and where
    they lack what it always says at its end (`unfinished`). A zero exit proves nothing, and neither does half of the
    work. Unless it `writes`, it was not to change anything. `errors` is the end of its standard error: the last line is
    told with an exit code that nobody can explain. `denials` are part of the reason where it changed nothing.
    """
    if exit_.spawn_error is not None:
        return _not_started(exit_)
    if exit_.ended_by in {"stop", "orphaned"}:
        return Interrupted("the run was stopped")
    if exit_.ended_by in {"timeout", "idle_timeout"}:
        return _limit_failure(exit_.ended_by, limits)
    if exit_.code != 0:
        how = f"got signal {exit_.signal}" if exit_.code is None else f"ended with exit code {exit_.code}"
        return verdict or Failed(FailureClass.CRASHED, f"the program {how}{_last_line(errors)}")
    if verdict is not None and (admitted or verdict.unfinished):
        return verdict
    return _ended_well(commit, refused, verdict, denials) if writes else ReadOnlySuccess()


def _ended_well(commit: str | None, refused: str | None, verdict: Failed | None, denials: ToolDenials) -> Outcome:
    if refused is not None:
        return Failed(FailureClass.REFUSED, refused)
    if commit is None:
        why = f": {denials}" if denials.count else ""
        return verdict or Failed(FailureClass.NO_CHANGE, f"the program ended well but changed nothing{why}")
    return Built(commit)


def _last_line(errors: str) -> str:
    # A rule, such as ends a traceback of several errors, says nothing.
    lines = [line.strip() for line in errors.splitlines() if any(map(str.isalnum, line))]
    return f": {lines[-1][:_LONGEST_LINE]}" if lines else ""


def _not_started(exit_: ProcessExit) -> Outcome:
    if exit_.exhausted:
        return ResourcesExhausted(f"the program could not be started: {exit_.spawn_error}")
    if exit_.missing:
        return Failed(FailureClass.MISSING, f"the program is gone: {exit_.spawn_error}")
    return Failed(FailureClass.INVALID, f"the program did not start: {exit_.spawn_error}")


def _limit_failure(ended_by: str, limits: SessionLimits) -> Failed:
    if ended_by == "timeout":
        reason = f"still running after {limits.timeout:g} s, its limit: raise `timeout` or split the task"
        return Failed(FailureClass.TIMEOUT, reason)
    reason = (
        f"neither output nor a change for {limits.idle_timeout:g} s, its limit: raise `idle_timeout`, or see its log"
    )
    return Failed(FailureClass.IDLE_TIMEOUT, reason)
