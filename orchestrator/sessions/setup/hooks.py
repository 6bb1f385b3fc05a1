"""What the user has run in a worktree around sessions: setup, before and after each session, teardown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from orchestrator.config.model import SetupStep
from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.outcome import Failed, Interrupted, Outcome, ResourcesExhausted
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.log_files import log_path, slot_log_path
from orchestrator.sessions.setup.shell import (
    CommandFailed,
    CommandNotRun,
    CommandStopped,
    CommandSucceeded,
    Shell,
    ShellCommand,
    ShellResult,
)

_HOOKS_TIMEOUT = "worktrees.hooks_timeout"


@dataclass(frozen=True, slots=True)
class HooksResult:
    """How a row of commands ended: `done` is how many of them ended with zero before `last`, which did not.

    `last` is Done where all of them did.
    """

    done: int
    last: ShellResult


def setup_commands(steps: Sequence[SetupStep], first: int, logs: Path, place: int) -> list[ShellCommand]:
    """Return the commands that set a place up, from the step with the index `first` on."""
    made = [
        ShellCommand(step.run, slot_log_path(logs, place, f"setup{number}"), step.timeout, "timeout")
        for number, step in enumerate(steps, start=1)
    ]
    return made[first:]


def teardown_commands(lines: Sequence[str], timeout: float, logs: Path, place: int) -> list[ShellCommand]:
    """Return the commands that run before a place is deleted."""
    return [
        ShellCommand(line, slot_log_path(logs, place, f"teardown{number}"), timeout, _HOOKS_TIMEOUT)
        for number, line in enumerate(lines, start=1)
    ]


def before_commands(lines: Sequence[str], timeout: float, logs: Path, worktree: Worktree) -> list[ShellCommand]:
    """Return the commands that run before an attempt's session."""
    return _around(lines, timeout, logs, worktree, "before")


def after_commands(lines: Sequence[str], timeout: float, logs: Path, worktree: Worktree) -> list[ShellCommand]:
    """Return the commands that run after an attempt's session, before its work is collected."""
    return _around(lines, timeout, logs, worktree, "after")


def _around(lines: Sequence[str], timeout: float, logs: Path, worktree: Worktree, moment: str) -> list[ShellCommand]:
    logged = [log_path(logs, worktree.task, worktree.attempt, f"{moment}{number + 1}") for number in range(len(lines))]
    return [ShellCommand(line, log, timeout, _HOOKS_TIMEOUT) for line, log in zip(lines, logged, strict=True)]


async def run_until_failure(shell: Shell, commands: Sequence[ShellCommand]) -> HooksResult:
    """Run commands one after the other, up to the first that does not end with zero."""
    for done, command in enumerate(commands):
        ended = await shell.run(command)
        if not isinstance(ended, CommandSucceeded):
            return HooksResult(done, ended)
    return HooksResult(len(commands), CommandSucceeded())


async def run_all(shell: Shell, commands: Sequence[ShellCommand]) -> list[CommandFailed | CommandNotRun]:
    """Run all commands one after the other, whatever becomes of the earlier ones; return what went wrong."""
    ended = [await shell.run(command) for command in commands]
    return [one for one in ended if isinstance(one, CommandFailed | CommandNotRun)]


def hook_outcome(ended: ShellResult) -> Outcome | None:
    """Return what a hook that an attempt depends on makes of it; None where nothing keeps it from going on."""
    match ended:
        case CommandSucceeded():
            return None
        case CommandFailed():
            return Failed(FailureClass.SETUP_FAILED, ended.describe("before the session"))
        case CommandStopped():
            return Interrupted("the run was stopped")
        case CommandNotRun(reason, exhausted):
            what = f"a command before the session was not run: {reason}"
            return ResourcesExhausted(what) if exhausted else Failed(FailureClass.TRANSIENT, what)
        case _:
            assert_never(ended)
