"""Shell commands of the user's where agents were or will be, so fenced in and supervised as agents are.

Only how they ended and what they print crosses back.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.config.model import PathAccess
from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.sessions.shell_commands import (
    NOT_EXECUTABLE,
    find_missing_program,
    is_in_worktree,
    is_not_runnable,
    is_of_environment,
    make_chmod_hint,
)
from orchestrator.errors import SessionError, is_resource_exhaustion
from orchestrator.sessions.output.log_files import MAX_OUTPUT_BYTES, STOP_GRACE, read_tail
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox, SandboxScope
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand, SupervisedExit, run_supervised
from orchestrator.system.process import kill_by_environment
from orchestrator.system.resources import is_disk_full

#: Characters of a command, and of the end of what it printed, that are told.
_LONGEST_COMMAND = 80
#: Seconds for a question to git.
_PATIENCE = 10.0
#: Lines and characters of the end of its output: installers name a cause above their last lines.
_SHOWN_LINES, _SHOWN = 15, 2000
_NOTES = ("[notice]", "note:", "hint:")
_MOST_DENIED = 5  # hosts that are named


@dataclass(frozen=True, slots=True)
class ShellCommand:
    """What `sh` is to run: `log` gets what it prints, `timeout` (seconds) is what the config says at `setting`."""

    text: str
    log: Path
    timeout: float
    setting: str


@dataclass(frozen=True, slots=True)
class CommandSucceeded:
    """It ended with zero."""


@dataclass(frozen=True, slots=True)
class UnrunnableProgram:
    """A program that was not found or can't be executed: why, where it was looked for, and what to do."""

    program: str
    why: str
    search_location: str
    remedy: str
    is_absent: bool = False
    """Whether it is a file of the worktree that is not there."""
    is_uncommitted: bool = False
    """Whether nobody commits it: only the settings of a new run provide it."""


@dataclass(frozen=True, slots=True)
class CommandFailed:
    """It did not end with zero: how it ended in words, and the end of what it printed.

    `unrunnable` is set where it ended with 126 or 127: the program that can't be run, and where it was looked for.
    """

    command: str
    ended: str
    said: str
    log: Path
    unrunnable: UnrunnableProgram | None = None

    def describe(self, where: str = "") -> str:
        """Return what happened, for people: the command's beginning, how and `where` it ended, its last words."""
        return f"`{self.short}` {self.ended}{where and f' {where}'}\n{self.output_tail}".strip()

    @property
    def short(self) -> str:
        """Return the command's beginning, on one line."""
        line = " ".join(self.command.split())
        return line if len(line) <= _LONGEST_COMMAND else f"{line[:_LONGEST_COMMAND]}…"

    @property
    def output_tail(self) -> str:
        """Return the end of what the command printed, without the notes that installers print below a cause."""
        lines = self.said.strip().splitlines()
        while len(lines) > 1 and (not lines[-1].strip() or lines[-1].lstrip().startswith(_NOTES)):
            lines.pop()
        return "\n".join(lines[-_SHOWN_LINES:])[-_SHOWN:]


def describe_unrunnable(failed: Sequence[CommandFailed], correction: str, merge: str = "") -> str:
    """Return why commands can't be run and what to do, where their programs are not there.

    `correction` is of the commands; `merge` is what else a commit needs to have an effect.
    """
    found = [(one, one.unrunnable) for one in failed if one.unrunnable is not None]
    headlines = [f"`{one.short}` can't be run: it {one.ended}: {missing.why}" for one, missing in found]
    output = tuple(dict.fromkeys(missing.search_location for _, missing in found))
    if len(found) > 1:
        output = (*headlines, *output)
        headlines = [f"{len(found)} commands can't be run: {', '.join(f'`{one.short}`' for one, _ in found)}"]
    merge = merge if any(is_in_worktree(one.program) and not one.is_uncommitted for _, one in found) else ""
    in_order = sorted((missing for _, missing in found), key=lambda one: one.is_uncommitted)
    remedy = ", ".join(dict.fromkeys(missing.remedy for missing in in_order)) + merge
    if not in_order[-1].is_uncommitted:
        remedy += ", then `council resume`"
    return str(HaltReason(headlines[0], output, str(failed[-1].log), (remedy, f"or {correction}")))


@dataclass(frozen=True, slots=True)
class CommandStopped:
    """It was ended from outside before it had come to its own end."""


@dataclass(frozen=True, slots=True)
class CommandNotRun:
    """It could not be started, or not be watched to its end: nothing is known of what it would have done.

    `exhausted` means a lack of memory, disk, processes or descriptors, which may pass.
    """

    reason: str
    exhausted: bool = False


ShellResult = CommandSucceeded | CommandFailed | CommandStopped | CommandNotRun


@dataclass(frozen=True, slots=True)
class Shell:
    """What commands run in: the folder `cwd`, in a fence around `ground`, with no more than `environment`.

    HOME is the ground's own scratch folder. `lock` is held while anything of a command lives. `reach` is what they
    may reach beside what all sessions may.
    """

    sandbox: RunSandbox
    ground: SandboxScope
    cwd: Path
    lock: Path
    environment: Mapping[str, str]
    redactor: Redactor
    reach: PathAccess = field(default_factory=PathAccess)

    @property
    def marker(self) -> bytes:
        """What every process of a command has in its environment, unless it cleared that."""
        return b"HOME=" + os.fsencode(self.ground.scratch)

    async def run(self, command: ShellCommand) -> ShellResult:
        """Run a command to its end; nothing that it started is alive then. A cancellation ends it and goes on."""
        try:
            await anyio.Path(command.log.parent).mkdir(mode=0o700, exist_ok=True)
            async with self.sandbox.around(self.ground, self._supervised(command), self.reach) as fenced:
                ended = await run_supervised(fenced.command)
            judged = await self._judge(command, ended, tuple(fenced.denied))
        except SessionError as error:
            await anyio.to_thread.run_sync(kill_by_environment, self.marker)
            return CommandNotRun(str(error))
        except OSError as error:
            return CommandNotRun(f"it could not be set up: {error}", is_resource_exhaustion(error))
        if isinstance(judged, CommandFailed) and await anyio.to_thread.run_sync(is_disk_full, self.cwd):
            return CommandNotRun(f"the disk is full, on which it {judged.ended}", exhausted=True)
        return judged

    def _supervised(self, command: ShellCommand) -> SupervisedCommand:
        return SupervisedCommand(
            argv=("sh", "-c", f"exec 2>&1\n{command.text}"),
            env={**self.environment, "HOME": str(self.ground.scratch)},
            cwd=self.cwd,
            stdin=None,
            stdout=command.log,
            stderr=Path(os.devnull),
            cap=MAX_OUTPUT_BYTES,
            timeout=command.timeout,
            grace=STOP_GRACE,
            lock=self.lock,
            redact=self.redactor.bytes_pattern,
        )

    async def _judge(self, command: ShellCommand, ended: SupervisedExit, denied: Sequence[str]) -> ShellResult:
        if ended.spawn_error is not None:
            return CommandNotRun(f"it could not be started: {ended.spawn_error}", ended.exhausted)
        if ended.ended_by in {"stop", "orphaned"}:
            return CommandStopped()
        if ended.ended_by == "timeout":
            told = f"ran for longer than {command.timeout:g} s, its limit (`{command.setting}`)"
        elif ended.signal is not None:
            told = f"got signal {ended.signal}"
        elif ended.exit != 0:
            told = f"ended with exit code {ended.exit}"
        else:
            return CommandSucceeded()
        if denied:
            told += f" (`network.allow` does not cover {', '.join(denied[:_MOST_DENIED])})"
        said = await read_tail(command.log)
        unrunnable = await self._unrunnable(command, ended.exit, said) if is_not_runnable(ended.exit) else None
        return CommandFailed(command.text, told, said, command.log, unrunnable)

    async def _unrunnable(self, command: ShellCommand, exit_code: int | None, said: str) -> UnrunnableProgram:
        program = find_missing_program(command.text, said)
        is_there = exit_code == NOT_EXECUTABLE
        why = f"program {program!r} {'can not be executed' if is_there else 'was not found'}"
        if is_in_worktree(program):
            where = "the worktree has the committed files and what `setup` creates"
            is_made = is_of_environment(program)
            is_uncommitted = is_made or await self._is_ignored(program)
            setup = "start a new run whose `worktrees.setup` creates"
            if is_uncommitted:
                remedy = f"{setup} {program}{'' if is_made else ', or whose `worktrees.copy` provides it'}"
            else:
                remedy = make_chmod_hint(program) if is_there else f"commit {program} (or {setup} it)"
            return UnrunnableProgram(program, f"{why} in the worktree", where, remedy, not is_there, is_uncommitted)
        hidden = self.sandbox.explain_missing_program(program, self.environment, self.reach)
        where = f"PATH, as the sandbox shows it: {self.environment.get('PATH', os.defpath)}"
        remedy = f"make {program} executable" if is_there else f"install {program} where sessions see it"
        return UnrunnableProgram(program, f"{why} on PATH{hidden}", where, remedy)

    async def _is_ignored(self, path: str) -> bool:
        """Return whether git ignores a path in the worktree, as far as its commands can find out."""
        text = f"git check-ignore --quiet -- {shlex.quote(path)}"
        question = self._supervised(ShellCommand(text, Path(os.devnull), _PATIENCE, ""))
        async with self.sandbox.around(self.ground, question, self.reach) as fenced:
            return (await run_supervised(fenced.command)).exit == 0
