"""Run one session: a CLI in a worktree, whose work is then collected."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.domain.runs.outcome import (
    Built,
    Failed,
    Interrupted,
    Outcome,
    Paused,
    ProcessExit,
    ResourcesExhausted,
)
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.errors import GitError, LeaseLost, RefusedError, SessionError, is_resource_exhaustion
from orchestrator.protocols import JsonObject
from orchestrator.repo.intake.collect import CollectionResult
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.checkouts import HeldSlot
from orchestrator.repo.worktrees.files.change_detection import TreeDiff
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.sessions.assignment import Assignment, SessionResources
from orchestrator.sessions.collection import WorkCollector
from orchestrator.sessions.output.transcript import EMPTY_TRANSCRIPT, Transcript
from orchestrator.sessions.program import SessionProgram
from orchestrator.sessions.setup import adapter_homes
from orchestrator.sessions.setup.handoff_file import HandoffData, MalformedHandoff
from orchestrator.sessions.setup.shell import CommandFailed
from orchestrator.sessions.setup.worktree_setup import PreparedWorktree, SetupFailed
from orchestrator.sessions.socket.listener import open_session_socket
from orchestrator.system.failpoints import failpoint
from orchestrator.system.process import kill_by_environment
from orchestrator.system.resources import is_disk_full

_STOPPED = ProcessExit(None, None, "stop", None)
_NOTHING, _UNCOLLECTED = CollectionResult(None), CollectionResult(None, complete=False)


@dataclass(frozen=True, slots=True)
class SessionResult:
    """The outcome of a session, its work, and the branch with the work, if any."""

    outcome: Outcome
    work: CollectionResult = _NOTHING
    branch: str | None = None
    faults: tuple[str, ...] = ()
    """Errors of the `after_run` commands."""
    session_api_faults: tuple[str, ...] = ()
    """Internal errors of the session API."""
    denied_hosts: tuple[str, ...] = ()
    """The hosts that the proxy denied, as `host:port`."""
    transcript: Transcript = EMPTY_TRANSCRIPT
    folder: Path | None = None
    """The folder in which the program ran."""
    message: str = ""
    """The program's complete final message."""
    failed_command: CommandFailed | None = None
    """The `until` command that failed on its work."""
    handoff_file: HandoffData | MalformedHandoff | None = None
    """The content of its handoff file."""
    submitted: JsonObject | None = None
    """The result submitted by the handoff tool."""

    @property
    def commit(self) -> str | None:
        """The commit that it built, if any."""
        return self.outcome.commit if isinstance(self.outcome, Built) else None


@dataclass(slots=True)
class Session:
    """A program that runs one assignment."""

    tools: SessionResources
    pool: SlotPool
    assignment: Assignment
    may_start: Callable[[], Awaitable[None]] | None = None
    """Raise LeaseLost if another orchestrator owns the task."""
    _checkout: HeldSlot | None = field(default=None, init=False)
    _tree_diff: TreeDiff | None = field(default=None, init=False)
    _program: SessionProgram = field(init=False)
    _stopped_for: Failed | Paused | None = field(default=None, init=False)
    _is_running: bool = field(default=False, init=False)
    _running: anyio.CancelScope = field(default_factory=anyio.CancelScope, init=False)
    _stopping: anyio.Event = field(default_factory=anyio.Event, init=False)

    def stop(self, outcome: Failed | Paused | None = None) -> None:
        """Stop the CLI and its processes; `run` then collects the work.

        The outcome is `outcome` if given, otherwise Interrupted.
        """
        self._stopped_for = self._stopped_for or outcome
        self._running.cancel()
        self._stopping.set()

    @property
    def name(self) -> SessionName:
        """Its name."""
        worktree = self.assignment.worktree
        return SessionName(worktree.run, worktree.task, worktree.attempt)

    @property
    def is_writing(self) -> bool:
        """Whether the program runs, and its changes will be kept."""
        return self._is_running and self.assignment.writes

    def live_work(self) -> WorkCollector | None:
        """Return the work of a session that `is_writing`; None if it has just ended."""
        return self._collector(self._checkout) if self._is_running and self._checkout is not None else None

    def _collector(self, checkout: HeldSlot) -> WorkCollector:
        patterns = self._program.command().scratch_patterns
        return WorkCollector(self.tools, self.assignment, checkout, patterns, self._stopping)

    async def run(self) -> SessionResult:
        """Set up the worktree, run the CLI in it, and collect its work.

        Call `release` afterwards.
        """
        exit_ = _STOPPED
        try:
            with self._running:
                obstacle = await self._set_up()
                if obstacle is not None:
                    return SessionResult(obstacle)
                self._is_running = True
                exit_ = await self._supervise()
        except SetupFailed as failed:
            at_base = self.assignment.start is None
            return SessionResult(failed.outcome(self.assignment.worktree.run, at_base=at_base))
        except (GitError, OSError, RefusedError, LeaseLost) as error:
            return SessionResult(
                _setup_outcome(error) if self.assignment.terminal is None else Paused(f"it could not start: {error}")
            )
        except SessionError as error:
            await anyio.to_thread.run_sync(kill_by_environment, self.assignment.worktree.marker)
            # Unsupervised processes may still be writing to the worktree, so it can only be preserved.
            return SessionResult(Failed(FailureClass.TRANSIENT, str(error)), _UNCOLLECTED)
        finally:
            self._is_running = False
        if self._checkout is None:
            return SessionResult(self._stopped_for or Interrupted("stopped before it started"))
        failpoint("session.ended")
        return await self._finish(exit_, self._checkout)

    async def _finish(self, exit_: ProcessExit, checkout: HeldSlot) -> SessionResult:
        """Collect the work of the ended program and judge its outcome."""
        worktree, program = self.assignment.worktree, self._program
        is_full = await anyio.to_thread.run_sync(is_disk_full, worktree.tree, self.tools.logs)
        command, prepared = program.command(), program.prepared
        if command.home is not None:
            await adapter_homes.write_back_logins(program.home, command.home, self.tools.environ)
        faults = () if prepared is None else await self.tools.worktree_setup.run_after(worktree, prepared)
        try:
            work, self._tree_diff = await self._collector(checkout).collect()
        except (GitError, OSError) as error:
            reason = f"the work in {worktree.tree} could not be collected: {error}"
            return SessionResult(Failed(FailureClass.TRANSIENT, reason), _UNCOLLECTED)
        outcome, transcript, message = await program.judge(exit_, work.commit, work.refused)
        if isinstance(outcome, Interrupted) and self._stopped_for is not None:
            outcome = self._stopped_for
        if isinstance(outcome, Failed) and is_full:
            outcome = ResourcesExhausted(f"the disk is full; the session failed: {outcome.reason}")
        return SessionResult(
            outcome,
            work,
            branch=worktree.branch if work.commit else None,
            faults=tuple(faults),
            session_api_faults=() if program.socket is None else tuple(program.socket.faults),
            denied_hosts=program.denied_hosts,
            transcript=transcript,
            folder=worktree.tree,
            message=message,
        )

    async def release(self, *, saved: bool) -> None:
        """Release the worktree slot, or preserve it if its contents are not `saved`."""
        checkout, self._checkout = self._checkout, None
        if checkout is None:
            return
        if saved:
            await worktrees.remove_session_folder(self.assignment.worktree)
            self.pool.release(checkout, self._tree_diff)
        else:
            await self.pool.slots.detach(checkout)

    async def _set_up(self) -> Outcome | None:
        """Create and set up the worktree; return an outcome if the program can't start."""
        assignment, worktree = self.assignment, self.assignment.worktree
        await anyio.to_thread.run_sync(lambda: self.tools.logs.mkdir(mode=0o700, exist_ok=True))
        earlier = assignment.earlier_conversation
        folder = None if earlier is None else earlier.folder
        commit = assignment.start or assignment.base
        if folder is not None:
            await self.pool.adopt(folder, commit, is_required=assignment.terminal is not None)
        checkout = await self.pool.acquire(commit, worktree.root, assignment.adapter_name, folder)
        with anyio.CancelScope(shield=True):
            self._checkout = checkout
            if folder != checkout.slot.tree:
                if assignment.terminal is not None:
                    raise RefusedError(f"the worktree {folder} of the conversation was removed", "retry the task")
                assignment = replace(assignment, earlier_conversation=None)
            worktree = await worktrees.create_worktree(worktree, checkout, assignment.text)
            self.assignment = replace(assignment, worktree=worktree)
            self._program = SessionProgram(self.tools, self.assignment)
        prepared = await self.tools.worktree_setup.prepare(checkout)
        if not isinstance(prepared, PreparedWorktree):
            return prepared
        self._program.prepared = prepared
        return await self.tools.worktree_setup.run_before(worktree, prepared)

    async def _supervise(self) -> ProcessExit:
        program, service = self._program, self.tools.session_service
        run = partial(program.run, self.may_start, partial(self.stop, Paused("the terminal was closed")))
        if service is None:
            return await run()
        async with open_session_socket(self.assignment.worktree, service) as program.socket:
            return await run()


def _setup_outcome(error: GitError | OSError | RefusedError | LeaseLost) -> Outcome:
    if isinstance(error, LeaseLost):
        return Interrupted(str(error))
    reason = f"the session could not be set up: {error}"
    is_ours = isinstance(error, RefusedError) or is_resource_exhaustion(error)
    return ResourcesExhausted(reason) if is_ours else Failed(FailureClass.TRANSIENT, reason)
