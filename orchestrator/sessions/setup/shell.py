"""Run user commands in agents' worktrees, sandboxed and supervised like agents.

Only their result and output leave the sandbox.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.runs.outcome import ProcessExit
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.sessions.shell_commands import (
    NOT_EXECUTABLE,
    find_missing_program,
    find_programs,
    is_in_worktree,
    is_not_runnable,
    is_of_environment,
    make_chmod_hint,
    make_lookup_command,
)
from orchestrator.domain.settings.run_settings import PathAccess
from orchestrator.domain.wording import join_names
from orchestrator.errors import SessionError, is_resource_exhaustion
from orchestrator.sessions.output.log_files import MAX_OUTPUT_BYTES, STOP_GRACE, read_tail
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox, SandboxScope
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand, run_supervised
from orchestrator.system.process import kill_by_environment
from orchestrator.system.resources import is_disk_full

#: Characters of a command in messages.
_MAX_COMMAND_CHARS = 80
_GIT_TIMEOUT = 10.0  # seconds
#: Lines and characters of the output tail in messages. Installers print the cause above their last lines.
_TAIL_LINES, _TAIL_CHARS = 15, 2000
#: Lines that programs print below the cause of a failure: notes, the path of npm's own log, durations and zero counts.
_TRAILER = re.compile(
    r"\s*(\[notice\]|npm notice|note:|hint:|npm (error|ERR!)( *$| +A complete log| +/)"
    r"|[#\N{INFORMATION SOURCE}] (duration_ms \S+|\w+ 0)$|$)"
)
_MAX_DENIED_HOSTS = 5  # in messages
_MAX_NAMED_COMMANDS, _MAX_NAMED_TESTS = 5, 3  # in messages


@dataclass(frozen=True, slots=True)
class ShellCommand:
    """A command for `sh`, its log, and its timeout (seconds) from the key `setting`."""

    text: str
    log: Path
    timeout: float
    setting: str


@dataclass(frozen=True, slots=True)
class CommandSucceeded:
    """The command exited with code 0."""


@dataclass(frozen=True, slots=True)
class UnrunnableProgram:
    """A program that is missing or not executable: reason, PATH and remedy."""

    program: str
    reason: str
    search_location: str
    remedy: str
    is_absent: bool = False
    """Whether the program is a file missing from the worktree."""
    needs_new_run: bool = False
    """Whether only a new run's settings can provide the program."""


@dataclass(frozen=True, slots=True)
class CommandFailed:
    """The command failed: how it ended, as text, and the tail of its output.

    `unrunnable`, set for exit codes 126 and 127, is the program that can't be run. `failed_tests` are from its report.
    """

    command: str
    how_it_ended: str
    output: str
    log: Path
    unrunnable: UnrunnableProgram | None = None
    failed_tests: Sequence[str] = ()

    def describe(self, where: str = "") -> str:
        """Return the start of the command, how and `where` it ended, and the output tail."""
        tests = f"; failed tests: {join_names(self.failed_tests, _MAX_NAMED_TESTS)}" if self.failed_tests else ""
        return f"`{self.short}` {self.how_it_ended}{where and f' {where}'}{tests}\n{self.output_tail}".strip()

    @property
    def short(self) -> str:
        """Return the start of the command, on one line."""
        return shorten_command(self.command)

    @property
    def output_tail(self) -> str:
        """Return the end of the output, without what programs print below the cause."""
        lines = self.output.strip().splitlines()
        while len(lines) > 1 and _TRAILER.match(lines[-1]):
            lines.pop()
        return "\n".join(lines[-_TAIL_LINES:])[-_TAIL_CHARS:]


def shorten_command(command: str) -> str:
    """Return the start of a command, on one line."""
    line = " ".join(command.split())
    return line if len(line) <= _MAX_COMMAND_CHARS else f"{line[:_MAX_COMMAND_CHARS]}…"


def describe_unrunnable(failed: Sequence[CommandFailed], correction: str, run: str, merge: str = "") -> str:
    """Return a report of commands with missing programs, and how to resume `run`.

    `correction` describes the fix; `merge` describes the condition for a commit to take effect.
    """
    pairs = [(command, command.unrunnable) for command in failed if command.unrunnable is not None]
    headlines = [
        f"`{command.short}` can't be run: it {command.how_it_ended}: {missing.reason}" for command, missing in pairs
    ]
    output = tuple(dict.fromkeys(missing.search_location for _, missing in pairs if missing.search_location))
    if len(pairs) > 1:
        output = (*headlines, *output)
        names = join_names([f"`{command.short}`" for command, _ in pairs], _MAX_NAMED_COMMANDS)
        headlines = [f"{len(pairs)} commands can't be run: {names}"]
    merge = merge if any(is_in_worktree(missing.program) and not missing.needs_new_run for _, missing in pairs) else ""
    in_order = sorted((missing for _, missing in pairs), key=lambda missing: missing.needs_new_run)
    remedy = ", ".join(dict.fromkeys(missing.remedy for missing in in_order)) + merge
    if not in_order[-1].needs_new_run:
        remedy += f", then `council resume {run}`"
    return str(HaltReason(headlines[0], output, str(failed[-1].log), (remedy, f"or {correction}")))


@dataclass(frozen=True, slots=True)
class CommandStopped:
    """The command was stopped externally before it finished."""


@dataclass(frozen=True, slots=True)
class CommandNotRun:
    """The command could not be started or supervised, so its result is unknown.

    `exhausted` means a possibly temporary lack of memory, disk space, processes or file descriptors.
    """

    reason: str
    exhausted: bool = False


ShellResult = CommandSucceeded | CommandFailed | CommandStopped | CommandNotRun


@dataclass(frozen=True, slots=True)
class Shell:
    """Runs commands in `cwd`, in a sandbox for `scope`, with exactly `environment`.

    HOME is the scope's scratch folder. `lock` is held while any process of a command is alive. `reach` is access in
    addition to that of all sessions.
    """

    sandbox: RunSandbox
    scope: SandboxScope
    cwd: Path
    lock: Path
    environment: Mapping[str, str]
    redactor: Redactor
    reach: PathAccess = field(default_factory=PathAccess)

    @property
    def marker(self) -> bytes:
        """The variable that identifies a command's processes unless they clear it."""
        return b"HOME=" + os.fsencode(self.scope.scratch)

    async def run(self, command: ShellCommand) -> ShellResult:
        """Run a command until none of its processes is alive, also when cancelled."""
        try:
            await anyio.Path(command.log.parent).mkdir(mode=0o700, exist_ok=True)
            async with self.sandbox.apply(self.scope, self._supervised(command), self.reach) as sandboxed:
                exited = await run_supervised(sandboxed.command)
            result = await self._to_result(command, exited, tuple(sandboxed.denied))
        except SessionError as error:
            await anyio.to_thread.run_sync(kill_by_environment, self.marker)
            return CommandNotRun(str(error))
        except OSError as error:
            return CommandNotRun(f"it could not be set up: {error}", is_resource_exhaustion(error))
        if isinstance(result, CommandFailed) and await anyio.to_thread.run_sync(is_disk_full, self.cwd):
            return CommandNotRun(f"the disk is full; it {result.how_it_ended}", exhausted=True)
        return result

    def _supervised(self, command: ShellCommand) -> SupervisedCommand:
        return SupervisedCommand(
            argv=("sh", "-c", f"exec 2>&1\n{command.text}"),
            env={**self.environment, "HOME": str(self.scope.scratch)},
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

    async def _to_result(self, command: ShellCommand, exited: ProcessExit, denied: Sequence[str]) -> ShellResult:
        if exited.spawn_error is not None:
            return CommandNotRun(f"it could not be started: {exited.spawn_error}", exited.exhausted)
        if exited.ended_by in {"stop", "orphaned"}:
            return CommandStopped()
        if exited.ended_by == "timeout":
            how = f"exceeded its timeout of {command.timeout:g} s (`{command.setting}`)"
        elif exited.signal is not None:
            how = f"got signal {exited.signal}"
        elif exited.exit != 0:
            how = f"ended with exit code {exited.exit}"
        else:
            return CommandSucceeded()
        if denied:
            how += f" (`network.allow` does not cover {', '.join(denied[:_MAX_DENIED_HOSTS])})"
        output = await read_tail(command.log)
        unrunnable = await self._unrunnable(command, exited.exit, output) if is_not_runnable(exited.exit) else None
        return CommandFailed(command.text, how, output, command.log, unrunnable)

    async def _unrunnable(self, command: ShellCommand, exit_code: int | None, output: str) -> UnrunnableProgram | None:
        """Return the program that can't be run; None if it is there, and chose the exit code itself."""
        program = find_missing_program(output)
        if program is None:
            program = next(iter(find_programs(command.text)), command.text.strip())
            if await self._succeeds(make_lookup_command(program)):
                return None
        is_there = exit_code == NOT_EXECUTABLE
        reason = f"program {program!r} {'cannot be executed' if is_there else 'was not found'}"
        if is_in_worktree(program):
            where = "the worktree has the committed files and what `setup` creates"
            is_made = is_of_environment(program)
            is_uncommitted = is_made or await self._is_ignored(program)
            setup = "start a new run whose `worktrees.setup` creates"
            if is_uncommitted:
                remedy = f"{setup} {program}{'' if is_made else ', or whose `worktrees.copy` provides it'}"
            else:
                remedy = make_chmod_hint(program) if is_there else f"commit {program} (or {setup} it)"
            return UnrunnableProgram(program, f"{reason} in the worktree", where, remedy, not is_there, is_uncommitted)
        hidden = ", ".join(self.sandbox.find_hidden_folders(program, self.environment, self.reach))
        where = ""
        if not program.startswith("/"):
            reason, where = (
                f"{reason} on PATH",
                f"PATH, as the sandbox shows it: {self.environment.get('PATH', os.defpath)}",
            )
        if hidden:
            reason, remedy = (
                f"{reason} (hidden from sessions: {hidden})",
                f"start a new run with {hidden} in `readable`",
            )
            return UnrunnableProgram(program, reason, where, remedy, needs_new_run=True)
        remedy = f"make {program} executable" if is_there else f"install {program} where sessions see it"
        return UnrunnableProgram(program, reason, where, remedy)

    async def _is_ignored(self, path: str) -> bool:
        """Return whether git ignores a path in the worktree; False if git fails."""
        return await self._succeeds(f"git check-ignore --quiet -- {shlex.quote(path)}")

    async def _succeeds(self, text: str) -> bool:
        command = self._supervised(ShellCommand(text, Path(os.devnull), _GIT_TIMEOUT, ""))
        async with self.sandbox.apply(self.scope, command, self.reach) as sandboxed:
            return (await run_supervised(sandboxed.command)).exit == 0
