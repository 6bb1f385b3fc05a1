"""How a session ended, judged by facts alone: exit, time limit, and what is in the worktree."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Built:
    """The session's work is a commit that can be merged."""

    commit: str


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The program ended well and left everything as it was."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt failed; `failure` is its class, `final` says that another try can't help."""

    failure: str
    reason: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class Interrupted:
    """We ended before the session could."""

    reason: str


Outcome = Built | Unchanged | Failed | Interrupted


@dataclass(frozen=True, slots=True)
class Exit:
    """How the process ended: `ended_by` is exit, timeout, stop or orphaned."""

    ended_by: str
    code: int | None
    signal: int | None
    spawn_error: str | None


def judge(exit_: Exit, commit: str | None, refused: str | None, timeout: float) -> Outcome:
    """Return the outcome.

    `commit` is what the worktree holds beyond its base (None: nothing), `refused` why it can't be taken (None:
    it can), `timeout` the wall-clock limit in seconds. The program's own word counts only against it: a
    non-zero exit fails, a zero exit proves nothing.
    """
    if exit_.spawn_error is not None:
        return Failed("invalid", f"the program did not start: {exit_.spawn_error}", final=True)
    if exit_.ended_by in {"stop", "orphaned"}:
        return Interrupted("the run was stopped")
    if exit_.ended_by == "timeout":
        return Failed("timeout", f"still running after {timeout:g} s, its limit: raise `timeout` or split the task")
    if exit_.signal is not None:
        return Failed("crashed", f"the program was ended by signal {exit_.signal}")
    if exit_.code != 0:
        return Failed("crashed", f"the program ended with exit code {exit_.code}")
    if refused is not None:
        return Failed("invalid", refused)
    return Unchanged() if commit is None else Built(commit)
