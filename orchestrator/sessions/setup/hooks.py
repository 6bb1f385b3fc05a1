"""Run user commands around sessions: setup, hooks and teardown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

from orchestrator.domain.runs.outcome import Failed, Interrupted, Outcome, ResourcesExhausted
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.settings.run_settings import SetupStep
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
    """The result of commands: `done` succeeded, and `last` failed.

    If all of them succeeded, `last` is CommandSucceeded.
    """

    done: int
    last: ShellResult


def setup_commands(steps: Sequence[SetupStep], first: int, logs: Path, slot: int) -> list[ShellCommand]:
    """Return the commands that set up a slot, from the step with index `first`."""
    commands = [
        ShellCommand(step.run, slot_log_path(logs, slot, f"setup{number}"), step.timeout, "timeout")
        for number, step in enumerate(steps, start=1)
    ]
    return commands[first:]


def teardown_commands(lines: Sequence[str], timeout: float, logs: Path, slot: int) -> list[ShellCommand]:
    """Return the commands that run before a worktree slot is deleted."""
    return [
        ShellCommand(line, slot_log_path(logs, slot, f"teardown{number}"), timeout, _HOOKS_TIMEOUT)
        for number, line in enumerate(lines, start=1)
    ]


def session_commands(
    stage: Literal["before", "after"], lines: Sequence[str], timeout: float, logs: Path, worktree: Worktree
) -> list[ShellCommand]:
    """Return an attempt's hooks: before its session, or before collecting its work."""
    return [
        ShellCommand(line, log_path(logs, worktree.task, worktree.attempt, f"{stage}{number}"), timeout, _HOOKS_TIMEOUT)
        for number, line in enumerate(lines, start=1)
    ]


async def run_until_failure(shell: Shell, commands: Sequence[ShellCommand]) -> HooksResult:
    """Run commands in order until one fails."""
    for done, command in enumerate(commands):
        result = await shell.run(command)
        if not isinstance(result, CommandSucceeded):
            return HooksResult(done, result)
    return HooksResult(len(commands), CommandSucceeded())


async def run_all(shell: Shell, commands: Sequence[ShellCommand]) -> list[CommandFailed | CommandNotRun]:
    """Run all commands in order, regardless of failures; return the failures."""
    results = [await shell.run(command) for command in commands]
    return [result for result in results if isinstance(result, CommandFailed | CommandNotRun)]


def hook_outcome(result: ShellResult) -> Outcome | None:
    """Return the outcome of an attempt after a hook, or None if it can continue."""
    match result:
        case CommandSucceeded():
            return None
        case CommandFailed():
            return Failed(FailureClass.SETUP_FAILED, result.describe("before the session"))
        case CommandStopped():
            return Interrupted("the run was stopped")
        case CommandNotRun(reason, exhausted):
            text = f"a command before the session was not run: {reason}"
            return ResourcesExhausted(text) if exhausted else Failed(FailureClass.TRANSIENT, text)
        case _:
            assert_never(result)
