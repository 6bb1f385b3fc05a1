"""What places and the sessions in them have beside the files of a commit: setup, files of the user's, ports, hooks."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from orchestrator.config.model import PathAccess, WorktreesConfig
from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.outcome import Failed, Misconfigured, Outcome, ResourcesExhausted
from orchestrator.domain.security.secrets import Redactor
from orchestrator.errors import LockHeld, RefusedError
from orchestrator.protocols import JsonObject
from orchestrator.repo.git.command import Git
from orchestrator.repo.worktrees.pool import HeldSlot, SetupError
from orchestrator.repo.worktrees.provisions import ProvisionFailure, Provisions
from orchestrator.repo.worktrees.setup_keys import first_step_to_run, read_setup_keys
from orchestrator.repo.worktrees.slots import WorktreeSlot
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.sandbox.policy import SandboxKind
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox, SandboxScope
from orchestrator.sessions.setup import hooks
from orchestrator.sessions.setup.environment import attempt_variables, build_base_environment
from orchestrator.sessions.setup.shell import (
    CommandFailed,
    CommandNotRun,
    CommandSucceeded,
    Shell,
    ShellResult,
    describe_unrunnable,
)
from orchestrator.sessions.supervision.supervisor_client import stop_supervised
from orchestrator.system import untrusted_files

#: Seconds within which the commands of a killed orchestrator have ended.
_REAP_LIMIT = 30.0


#: How a mistake in the setup itself is fixed.
SETUP_REMEDY: Final = "correct `worktrees.setup` in the file, then start a new run"


class SetupFailed(SetupError):
    """A step of the setup did not end as it should; `ended` says how."""

    def __init__(self, ended: ShellResult) -> None:
        super().__init__(
            ended.describe(f"in the setup (log: {ended.log})") if isinstance(ended, CommandFailed) else str(ended)
        )
        self.ended = ended

    def outcome(self, *, at_base: bool) -> Outcome:
        """Return what it makes of an attempt; `at_base`: one whose worktree has nothing yet of its task."""
        if isinstance(self.ended, CommandFailed):
            if at_base and self.ended.unrunnable is not None:
                return Misconfigured(describe_unrunnable([self.ended], SETUP_REMEDY))
            return Failed(FailureClass.SETUP_FAILED, str(self))
        return hooks.hook_outcome(self.ended) or Failed(FailureClass.TRANSIENT, str(self))


@dataclass(frozen=True, slots=True)
class PreparedWorktree:
    """What a session gets in its place: what more it may reach, and variables that tell it what it has."""

    reach: PathAccess
    variables: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class WorktreeSetup:
    """What a run's places are equipped with; `git` runs in the trusted repository.

    `lease` gives a place its name and ports, as variables; `tell` records an event of the run's.
    """

    git: Git
    config: WorktreesConfig
    provisions: Provisions
    lease: Callable[[Path], Awaitable[Mapping[str, str]]]
    tell: Callable[[str, JsonObject], Awaitable[None]]
    sandbox: RunSandbox
    redactor: Redactor
    logs: Path
    environ: Mapping[str, str]
    _failed: dict[tuple[str, str], SetupFailed] = field(default_factory=dict, init=False)
    """Steps that failed, by their keys: they would fail in the next place, too.

    For checks also by the commit, so that what has not landed does not fail the check of another commit; else that is
    empty.
    """

    async def keys(self, commit: str) -> tuple[str, ...]:
        """Return the keys of the steps of the setup at a commit."""
        config = self.config
        return await read_setup_keys(self.git, commit, config.setup, sparse=config.sparse, env=config.env)

    async def set_up(self, checkout: HeldSlot, commit: str) -> tuple[str, ...]:
        """Run the steps of the setup that a place has not run yet; return their keys. Raises SetupFailed."""
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
        place = checkout.slot
        variables = await self.lease(place.root)
        facts: JsonObject = {"place": str(place.root), "commands": [step.run for step in steps[first:]]}
        await self.tell("slot.setup_started", facts)
        began = anyio.current_time()
        async with _temporary_git(place, commit):
            commands = hooks.setup_commands(steps, first, self.logs, place.number)
            ended = await hooks.run_until_failure(self._shell_of(place, variables), commands)
        if not isinstance(ended.last, CommandSucceeded):
            failure = SetupFailed(self._with_network(ended.last))
            if isinstance(ended.last, CommandFailed):
                self._failed[wanted[first + ended.done], at] = failure
            raise failure
        seconds = round(anyio.current_time() - began, 3)
        await self.tell("slot.setup_finished", {"place": str(place.root), "seconds": seconds})
        return wanted

    def _with_network(self, ended: ShellResult) -> ShellResult:
        """Return how a step ended, with the network as a possible cause where it had none."""
        reaches = self.sandbox.config.network or self.sandbox.config.hosts or self.sandbox.kind is SandboxKind.OFF
        if reaches or not isinstance(ended, CommandFailed) or ended.unrunnable is not None:
            return ended
        return replace(ended, ended=f"{ended.ended} (`network: off` may be the cause)")

    async def strip(self, place: WorktreeSlot) -> None:
        """Do what is to be done before a place is thrown away, also one that a killed process left."""
        shell = self._shell_of(place, {})
        with suppress(LockHeld):
            await stop_supervised(_lock_of(place), shell.marker, _REAP_LIMIT)
        if self.config.teardown and await anyio.Path(place.tree).is_dir():
            with suppress(RefusedError):
                shell = self._shell_of(place, await self.lease(place.root))
            lines, timeout = self.config.teardown, self.config.hooks_timeout
            failed = await hooks.run_all(shell, hooks.teardown_commands(lines, timeout, self.logs, place.number))
            for reason in _describe_failures(failed, "before its place was deleted"):
                await self.tell("slot.teardown_failed", {"place": str(place.root), "reason": reason})

    async def prepare(self, checkout: HeldSlot) -> PreparedWorktree | Failed | ResourcesExhausted:
        """Give a session's place what it is to have; or say why it can't have it."""
        commit, place = checkout.contents.record.commit, checkout.slot
        try:
            variables = await self.lease(place.root)
        except RefusedError as error:
            return ResourcesExhausted(str(error))
        found = await self.provisions.install_into(place.tree, commit, self.git)
        if isinstance(found, ProvisionFailure):
            text = f"{found.what}: {found.remedy}"
            return ResourcesExhausted(text) if found.exhausted else Failed(FailureClass.SETUP_FAILED, text)
        return PreparedWorktree(found, variables)

    async def before(self, worktree: Worktree, provided: PreparedWorktree) -> Outcome | None:
        """Run what is to run before each session; return why it can't begin, if so."""
        config = self.config
        commands = hooks.before_commands(config.before_run, config.hooks_timeout, self.logs, worktree)
        if not commands:
            return None
        return hooks.hook_outcome((await hooks.run_until_failure(self._shell_in(worktree, provided), commands)).last)

    async def after(self, worktree: Worktree, provided: PreparedWorktree) -> Sequence[str]:
        """Run what is to run after each session; return what went wrong, in words."""
        config = self.config
        commands = hooks.after_commands(config.after_run, config.hooks_timeout, self.logs, worktree)
        failed = await hooks.run_all(self._shell_in(worktree, provided), commands) if commands else []
        return _describe_failures(failed, "after the session")

    def _shell_in(self, worktree: Worktree, provided: PreparedWorktree) -> Shell:
        variables = {**provided.variables, **attempt_variables(worktree)}
        environment = build_base_environment(self.config.env, self.environ, worktree.tree, variables)
        ground = SandboxScope.of(worktree)
        return Shell(self.sandbox, ground, worktree.tree, worktree.lock, environment, self.redactor, provided.reach)

    def _shell_of(self, place: WorktreeSlot, variables: Mapping[str, str]) -> Shell:
        environment = build_base_environment(self.config.env, self.environ, place.tree, variables)
        ground = SandboxScope((place.tree, place.scratch), (place.hub.objects,), place.scratch)
        return Shell(self.sandbox, ground, place.tree, _lock_of(place), environment, self.redactor)


def _describe_failures(failed: Sequence[CommandFailed | CommandNotRun], where: str) -> list[str]:
    return [one.describe(where) if isinstance(one, CommandFailed) else one.reason for one in failed]


def _lock_of(place: WorktreeSlot) -> Path:
    """Return the file that is locked while a command of the setup lives."""
    return place.root / "setup.lock"


@asynccontextmanager
async def _temporary_git(place: WorktreeSlot, commit: str) -> AsyncIterator[None]:
    """Let commands ask git about a place where no session is; what they write there is gone afterwards."""
    await anyio.to_thread.run_sync(_add_git, place, commit)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(_remove_git, place)


def _add_git(place: WorktreeSlot, commit: str) -> None:
    folder = place.scratch / "git"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place.hub.session_template, folder)
    (folder / "HEAD").write_text(f"{commit}\n")
    shutil.copyfile(place.index, folder / "index")
    untrusted_files.write_file(place.tree, ".git", os.fsencode(f"gitdir: {folder}\n"), 0o644)


def _remove_git(place: WorktreeSlot) -> None:
    (place.tree / ".git").unlink(missing_ok=True)
    shutil.rmtree(place.scratch, ignore_errors=True)
    place.scratch.mkdir(exist_ok=True)
