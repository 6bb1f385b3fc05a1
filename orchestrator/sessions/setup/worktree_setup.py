"""Set up worktree slots and sessions: setup steps, user files, ports and hooks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Final, Literal, assert_never

import anyio
import anyio.to_thread

from orchestrator.domain.events.base import RunEvent
from orchestrator.domain.events.coordination import SlotSetupFinished, SlotSetupStarted, SlotTeardownFailed
from orchestrator.domain.runs.outcome import Failed, Interrupted, Misconfigured, Outcome, ResourcesExhausted
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.settings.run_settings import PathAccess, SetupStep, WorktreeSettings
from orchestrator.errors import LockHeld, RefusedError
from orchestrator.repo.git.command import Git
from orchestrator.repo.worktrees.checkouts import HeldSlot, SetupError
from orchestrator.repo.worktrees.provisions import ProvisionFailure, Provisions
from orchestrator.repo.worktrees.slots import WorktreeSlot
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.log_files import log_path, slot_log_path
from orchestrator.sessions.sandbox.policy import SandboxKind
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox, SandboxScope
from orchestrator.sessions.setup.environment import attempt_variables, build_base_environment
from orchestrator.sessions.setup.shell import (
    CommandFailed,
    CommandNotRun,
    CommandStopped,
    CommandSucceeded,
    Shell,
    ShellCommand,
    ShellResult,
    describe_unrunnable,
)
from orchestrator.sessions.supervision.supervisor_client import stop_supervised
from orchestrator.system import untrusted_files
from orchestrator.system.files import copy_folder

#: Seconds to wait for the commands of a killed orchestrator to end.
_REAP_LIMIT = 30.0


#: The remedy for an error in the setup itself.
SETUP_REMEDY: Final = "correct `worktrees.setup` in the configuration file, then start a new run"
#: Part of each key. Increase it when the meaning of the hashed data or the steps' environment changes.
_VERSION: Final = 1
_HOOKS_TIMEOUT = "worktrees.hooks_timeout"


class SetupFailed(SetupError):
    """A setup step did not succeed; `result` has the details."""

    def __init__(self, result: ShellResult) -> None:
        super().__init__(
            result.describe(f"in the setup (log: {result.log})") if isinstance(result, CommandFailed) else str(result)
        )
        self.result = result

    def outcome(self, run: str, *, at_base: bool) -> Outcome:
        """Return the outcome of an attempt in `run`; `at_base`: without task work yet."""
        if isinstance(self.result, CommandFailed):
            if at_base and self.result.unrunnable is not None:
                return Misconfigured(describe_unrunnable([self.result], SETUP_REMEDY, run))
            return Failed(FailureClass.SETUP_FAILED, str(self))
        return hook_outcome(self.result) or Failed(FailureClass.TRANSIENT, str(self))


@dataclass(frozen=True, slots=True)
class PreparedWorktree:
    """The path access and variables that a session gets from its worktree slot."""

    reach: PathAccess
    variables: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class WorktreeSetup:
    """Sets up the worktree slots of a run; `git` runs in the trusted repository.

    `lease` assigns a slot its name and ports and returns them as variables; `record_event` records an event of the run.
    """

    git: Git
    config: WorktreeSettings
    provisions: Provisions
    lease: Callable[[Path], Awaitable[Mapping[str, str]]]
    record_event: Callable[[RunEvent], Awaitable[None]]
    sandbox: RunSandbox
    redactor: Redactor
    logs: Path
    environ: Mapping[str, str]
    _failed: dict[tuple[str, str], SetupFailed] = field(default_factory=dict, init=False)
    """Failed steps, keyed by step key and commit: they would also fail in the next slot.

    The commit is empty except for checks, so that unlanded work can't fail the checks of another commit.
    """

    async def keys(self, commit: str) -> tuple[str, ...]:
        """Return the keys of the setup steps at a commit."""
        config = self.config
        return await read_setup_keys(self.git, commit, config.setup, sparse=config.sparse, env=config.env)

    async def set_up(self, checkout: HeldSlot, commit: str) -> tuple[str, ...]:
        """Run the setup steps that a slot still needs; return the keys of all steps.

        Raises SetupFailed if a step fails.
        """
        steps, done = self.config.setup, checkout.contents.record.setup
        if not steps:
            return ()
        wanted = await self.keys(commit)
        first = first_step_to_run(done, wanted)
        if first == len(steps):
            return wanted
        at = commit if checkout.contents.record.is_check else ""
        known = next((self._failed[key, at] for key in wanted if (key, at) in self._failed), None)
        if known is not None:
            raise known
        slot = checkout.slot
        variables = await self.lease(slot.root)
        lines = [step.run for step in steps[first:]]
        await self.record_event(SlotSetupStarted(slot=str(slot.root), commands=lines))
        began = anyio.current_time()
        async with _temporary_git(slot, commit):
            commands = setup_commands(steps, first, self.logs, slot.number)
            succeeded, result = await run_until_failure(self._shell_of(slot, variables), commands)
        if not isinstance(result, CommandSucceeded):
            failure = SetupFailed(self._with_network_hint(result))
            if isinstance(result, CommandFailed):
                self._failed[wanted[first + succeeded], at] = failure
            raise failure
        seconds = round(anyio.current_time() - began, 3)
        await self.record_event(SlotSetupFinished(slot=str(slot.root), seconds=seconds))
        return wanted

    def _with_network_hint(self, result: ShellResult) -> ShellResult:
        """Add the missing network to a step's result as a possible cause of a failure."""
        has_network = (
            self.sandbox.config.has_network or self.sandbox.config.hosts or self.sandbox.kind is SandboxKind.OFF
        )
        if has_network or not isinstance(result, CommandFailed) or result.unrunnable is not None:
            return result
        return replace(result, how_it_ended=f"{result.how_it_ended} (`network: off` may be the cause)")

    async def tear_down(self, slot: WorktreeSlot) -> None:
        """Tear down a slot before it is deleted, even if a killed process left it."""
        shell = self._shell_of(slot, {})
        with suppress(LockHeld):
            await stop_supervised(_lock_of(slot), shell.marker, _REAP_LIMIT)
        if self.config.teardown and await anyio.Path(slot.tree).is_dir():
            with suppress(RefusedError):
                shell = self._shell_of(slot, await self.lease(slot.root))
            lines, timeout = self.config.teardown, self.config.hooks_timeout
            failed = await run_all(shell, teardown_commands(lines, timeout, self.logs, slot.number))
            for reason in _describe_failures(failed, "before its worktree slot was deleted"):
                await self.record_event(SlotTeardownFailed(slot=str(slot.root), reason=reason))

    async def prepare(self, checkout: HeldSlot) -> PreparedWorktree | Failed | ResourcesExhausted:
        """Give a session's slot its ports and user files, or return a failure."""
        commit, slot = checkout.contents.record.commit, checkout.slot
        try:
            variables = await self.lease(slot.root)
        except RefusedError as error:
            return ResourcesExhausted(str(error))
        installed = await self.provisions.install_into(slot.tree, commit, self.git)
        if isinstance(installed, ProvisionFailure):
            text = f"{installed.message}: {installed.remedy}"
            return ResourcesExhausted(text) if installed.exhausted else Failed(FailureClass.SETUP_FAILED, text)
        return PreparedWorktree(installed, variables)

    async def run_before(self, worktree: Worktree, prepared: PreparedWorktree) -> Outcome | None:
        """Run the `before_run` commands; return an outcome if one prevents the session."""
        config = self.config
        commands = session_commands("before", config.before_run, config.hooks_timeout, self.logs, worktree)
        if not commands:
            return None
        _, result = await run_until_failure(self._shell_in(worktree, prepared), commands)
        return hook_outcome(result)

    async def run_after(self, worktree: Worktree, prepared: PreparedWorktree) -> Sequence[str]:
        """Run the `after_run` commands; return descriptions of the failures."""
        config = self.config
        commands = session_commands("after", config.after_run, config.hooks_timeout, self.logs, worktree)
        failed = await run_all(self._shell_in(worktree, prepared), commands) if commands else []
        return _describe_failures(failed, "after the session")

    def _shell_in(self, worktree: Worktree, prepared: PreparedWorktree) -> Shell:
        variables = {**prepared.variables, **attempt_variables(worktree)}
        environment = build_base_environment(self.config.env, self.environ, worktree.tree, variables)
        scope = SandboxScope.of(worktree)
        return Shell(self.sandbox, scope, worktree.tree, worktree.lock, environment, self.redactor, prepared.reach)

    def _shell_of(self, slot: WorktreeSlot, variables: Mapping[str, str]) -> Shell:
        environment = build_base_environment(self.config.env, self.environ, slot.tree, variables)
        scope = SandboxScope((slot.tree, slot.scratch), (slot.hub.objects,), slot.scratch)
        return Shell(self.sandbox, scope, slot.tree, _lock_of(slot), environment, self.redactor)


def _describe_failures(failed: Sequence[CommandFailed | CommandNotRun], where: str) -> list[str]:
    return [result.describe(where) if isinstance(result, CommandFailed) else result.reason for result in failed]


def _lock_of(slot: WorktreeSlot) -> Path:
    """Return the file that is locked while a setup command is alive."""
    return slot.root / "setup.lock"


@asynccontextmanager
async def _temporary_git(slot: WorktreeSlot, commit: str) -> AsyncIterator[None]:
    """Provide a temporary git directory in a slot, so that commands can use git."""
    await anyio.to_thread.run_sync(_add_git, slot, commit)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(_remove_git, slot)


def _add_git(slot: WorktreeSlot, commit: str) -> None:
    folder = slot.scratch / "git"
    shutil.rmtree(folder, ignore_errors=True)
    copy_folder(slot.hub.session_template, folder)
    (folder / "HEAD").write_text(f"{commit}\n")
    shutil.copyfile(slot.index, folder / "index")
    untrusted_files.write_file(slot.tree, ".git", os.fsencode(f"gitdir: {folder}\n"), 0o644)


def _remove_git(slot: WorktreeSlot) -> None:
    (slot.tree / ".git").unlink(missing_ok=True)
    shutil.rmtree(slot.scratch, ignore_errors=True)
    slot.scratch.mkdir(exist_ok=True)


async def read_setup_keys(
    git: Git, commit: str, steps: Sequence[SetupStep], *, sparse: Sequence[str] = (), env: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the key (hex) of each step at a commit of the trusted repository."""
    entries = await git.entries(commit, {path for step in steps for path in step.inputs})
    return compute_setup_keys(steps, entries, sparse=sparse, env=env)


def compute_setup_keys(
    steps: Sequence[SetupStep], entries: Mapping[str, str], *, sparse: Sequence[str], env: Sequence[str]
) -> tuple[str, ...]:
    """Return a key (hex) per step, which depends on the keys of earlier steps.

    `entries` has git's entry (mode, kind and id) for each existing input, `sparse` the folders that are checked out,
    `env` the names of the variables passed to steps. A step's timeout is not part of its key.
    """
    keys: list[str] = []
    previous = _digest([_VERSION, sorted(sparse), sorted(env)])
    for step in steps:
        inputs = [[path, entries.get(path)] for path in sorted(set(step.inputs))]
        previous = _digest([previous, step.run, inputs])
        keys.append(previous)
    return tuple(keys)


def first_step_to_run(done: Sequence[str], wanted: Sequence[str]) -> int:
    """Return the index of the first step to run, given the keys of the steps run."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(done, wanted, strict=False))))


def _digest(inputs: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


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


async def run_until_failure(shell: Shell, commands: Sequence[ShellCommand]) -> tuple[int, ShellResult]:
    """Run commands in order until one fails; return how many succeeded, and the last result."""
    for done, command in enumerate(commands):
        result = await shell.run(command)
        if not isinstance(result, CommandSucceeded):
            return done, result
    return len(commands), CommandSucceeded()


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
