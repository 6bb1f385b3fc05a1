"""What the user has run in a worktree around sessions: setup, before and after each session, teardown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from orchestrator.config.model import SetupStep
from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.outcome import Exhausted, Failed, Interrupted, Outcome
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.files import log_file, place_log
from orchestrator.sessions.setup.shell import CommandFailed, Done, NotRun, Shell, ShellCommand, ShellResult, Stopped

_HOOKS_TIMEOUT = "worktrees.hooks_timeout"


@dataclass(frozen=True, slots=True)
class HooksEnded:
    """How a row of commands ended: `done` is how many of them ended with zero before `last`, which did not.

    `last` is Done where all of them did.
    """

    done: int
    last: ShellResult


def setup_commands(steps: Sequence[SetupStep], first: int, logs: Path, place: int) -> list[ShellCommand]:
    """Return the commands that set a place up, from the step with the index `first` on."""
    made = [
        ShellCommand(step.run, place_log(logs, place, f"setup{number}"), step.timeout, "timeout")
        for number, step in enumerate(steps, start=1)
    ]
    return made[first:]


def teardown_commands(lines: Sequence[str], timeout: float, logs: Path, place: int) -> list[ShellCommand]:
    """Return the commands that run before a place is deleted."""
    return [
        ShellCommand(line, place_log(logs, place, f"teardown{number}"), timeout, _HOOKS_TIMEOUT)
        for number, line in enumerate(lines, start=1)
    ]


def before_commands(lines: Sequence[str], timeout: float, logs: Path, worktree: Worktree) -> list[ShellCommand]:
    """Return the commands that run before an attempt's session."""
    return _around(lines, timeout, logs, worktree, "before")


def after_commands(lines: Sequence[str], timeout: float, logs: Path, worktree: Worktree) -> list[ShellCommand]:
    """Return the commands that run after an attempt's session, before its work is collected."""
    return _around(lines, timeout, logs, worktree, "after")


def _around(lines: Sequence[str], timeout: float, logs: Path, worktree: Worktree, moment: str) -> list[ShellCommand]:
    logged = [log_file(logs, worktree.task, worktree.attempt, f"{moment}{number + 1}") for number in range(len(lines))]
    return [ShellCommand(line, log, timeout, _HOOKS_TIMEOUT) for line, log in zip(lines, logged, strict=True)]


async def run_in_turn(shell: Shell, commands: Sequence[ShellCommand]) -> HooksEnded:
    """Run commands one after the other, up to the first that does not end with zero."""
    for done, command in enumerate(commands):
        ended = await shell.run(command)
        if not isinstance(ended, Done):
            return HooksEnded(done, ended)
    return HooksEnded(len(commands), Done())


async def run_each(shell: Shell, commands: Sequence[ShellCommand]) -> list[CommandFailed | NotRun]:
    """Run all commands one after the other, whatever becomes of the earlier ones; return what went wrong."""
    ended = [await shell.run(command) for command in commands]
    return [one for one in ended if isinstance(one, CommandFailed | NotRun)]


def outcome_of(ended: ShellResult) -> Outcome | None:
    """Return what a hook that an attempt depends on makes of it; None where nothing keeps it from going on."""
    match ended:
        case Done():
            return None
        case CommandFailed():
            return Failed(FailureClass.SETUP_FAILED, ended.describe("before the session"))
        case Stopped():
            return Interrupted("the run was stopped")
        case NotRun(reason, exhausted):
            what = f"a command before the session was not run: {reason}"
            return Exhausted(what) if exhausted else Failed(FailureClass.TRANSIENT, what)
        case _:
            assert_never(ended)
