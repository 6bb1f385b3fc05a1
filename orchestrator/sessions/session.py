"""One session: a worktree, a CLI in it, and what came of it as facts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
import anyio.to_thread
from tenacity import AsyncRetrying, retry_if_exception, wait_exponential

from orchestrator.config.model import PathAccess
from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.outcome import (
    Failed,
    Interrupted,
    Outcome,
    ProcessExit,
    ResourcesExhausted,
    SessionLimits,
    judge_outcome,
)
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.errors import GitError, LeaseLost, RefusedError, SessionError, is_resource_exhaustion
from orchestrator.protocols import Adapter, Capability, McpServer, SessionCommand, SessionEnd, SessionRequest
from orchestrator.repo.git.command import Git, printable_name
from orchestrator.repo.intake.collect import CollectedWork, collect_work
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.change_detection import TreeDiff
from orchestrator.repo.worktrees.pool import HeldSlot, SlotPool
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.log_files import MAX_OUTPUT_BYTES, STOP_GRACE, log_path, read_tail
from orchestrator.sessions.output.transcript import (
    EMPTY_TRANSCRIPT,
    Transcript,
    extract_answer,
    has_reported_failure,
    read_transcript,
)
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox, SandboxScope
from orchestrator.sessions.setup import adapter_homes
from orchestrator.sessions.setup.environment import build_session_environment
from orchestrator.sessions.setup.worktree_setup import PreparedWorktree, SetupFailed, WorktreeSetup
from orchestrator.sessions.socket.listener import SessionApi, SessionSocket, open_session_socket
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand, run_supervised
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint
from orchestrator.system.process import kill_by_environment
from orchestrator.system.resources import is_disk_full

_LONGEST_REASON = 500  # characters
_STOPPED = ProcessExit("stop", None, None, None)
#: Caches of test runners and linters, as patterns of a .gitignore: that a reader ran them is no change to report.
_CACHES = (
    *("__pycache__/", ".pytest_cache/", ".mypy_cache/", ".ruff_cache/", ".hypothesis/", ".tox/", ".nox/"),
    *(".coverage", ".nyc_output/", ".eslintcache", ".gradle/"),
)
#: Seconds between two tries to collect work on a machine that lacks something, such as room on its disk.
_LONGEST_WAIT = 10.0


@dataclass(frozen=True, slots=True)
class SessionResult:
    """How a session ended, and the branch that holds what it left, if it left anything.

    `collected` is false where its files could not all be read into a commit: they are all there is, and must
    stay. `salvaged` are the refs that keep what it left on branches of its own making.
    """

    outcome: Outcome
    branch: str | None = None
    collected: bool = True
    salvaged: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What was left in the worktree beside the files, and why."""
    faults: tuple[str, ...] = ()
    """What went wrong in the commands after the session."""
    session_api_faults: tuple[str, ...] = ()
    """What went wrong when the session asked its orchestrator."""
    denied_hosts: tuple[str, ...] = ()
    """The hosts that it was refused, as `host:port`."""
    transcript: Transcript = EMPTY_TRANSCRIPT
    folder: Path | None = None
    """The folder that the program worked in."""
    answer: str = ""
    """All that the program answered at its end."""
    discarded: tuple[str, ...] = ()
    """The paths that it changed though nothing of what it changes counts."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a CLI can go on with: its own id of it, and the folder in which it was, where alone it knows it."""

    id: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one session is to do: `base` is the commit that its work is judged against.

    `start` is the commit that its worktree begins at where that is not the base; `told` is what it gets to read
    beside the prompt. With an `earlier` conversation it goes on with that where it can, and is told only what is new
    (`follow_up`). Unless it `writes`, what it changes is discarded. `about` is what the task was asked to do, `phase`
    what the step of its workflow is called.
    """

    worktree: Worktree
    base: str
    start: str | None
    prompt: str
    told: str | None
    adapter: Adapter
    adapter_name: str
    reach: PathAccess
    limits: SessionLimits
    max_file: int
    instructions: str | None = None
    mcp_servers: tuple[McpServer, ...] = ()
    max_cost: float | None = None
    earlier: Conversation | None = None
    follow_up: str | None = None
    task_prompt: str = ""
    phase: str | None = None
    writes: bool = True

    @property
    def text(self) -> str:
        """All that the program is told in its prompt."""
        if self.earlier is not None and self.follow_up is not None:
            return self.follow_up
        before = self.instructions if Capability.INSTRUCTIONS not in self.adapter.capabilities() else None
        return "\n\n".join(part for part in (before, self.prompt, self.told) if part is not None)


@dataclass(frozen=True, slots=True)
class SessionResources:
    """What all sessions of a run work with."""

    git: Git
    sandbox: RunSandbox
    redactor: Redactor
    logs: Path
    environ: Mapping[str, str]
    clock: Clock
    worktree_setup: WorktreeSetup
    session_service: SessionApi | None = None
    """Who answers what sessions ask; None: nobody, and they are given nothing to ask by."""
    has_server: bool = True
    """Whether those whose CLI can use it get our own server of the Model Context Protocol, to ask by."""

    def admission(self, max_file: int, unignored: Iterable[str] = ()) -> IntakeRules:
        """Return what may become part of a commit; `unignored` is what setup made and git does not ignore."""
        return IntakeRules(self.redactor, max_file, withheld=(*self.worktree_setup.provisions.paths, *unignored))


@dataclass(slots=True)
class Session:
    """One program at work on one assignment."""

    tools: SessionResources
    pool: SlotPool
    assignment: Assignment
    may_start: Callable[[], Awaitable[None]] | None = None
    """Raises LeaseLost where its task is not this orchestrator's any more."""
    _checkout: HeldSlot | None = field(default=None, init=False)
    _found: TreeDiff | None = field(default=None, init=False)
    _provided: PreparedWorktree | None = field(default=None, init=False)
    _stopped_for: Failed | None = field(default=None, init=False)
    _mailbox: SessionSocket | None = field(default=None, init=False)
    _denied: tuple[str, ...] = field(default=(), init=False)
    _running: anyio.CancelScope = field(default_factory=anyio.CancelScope, init=False)
    _stopping: anyio.Event = field(default_factory=anyio.Event, init=False)

    def stop(self, why: Failed | None = None) -> None:
        """End the CLI and all that it started; `run` then collects what it left and says so.

        The attempt is interrupted, or has failed where `why` says so.
        """
        self._stopped_for = self._stopped_for or why
        self._running.cancel()
        self._stopping.set()

    async def run(self) -> SessionResult:
        """Set up the worktree, run the CLI in it, collect what it left; `release` is to follow."""
        what, worktree = self.assignment, self.assignment.worktree
        exit_ = _STOPPED
        try:
            with self._running:
                obstacle = await self._set_up()
                if obstacle is not None:
                    return SessionResult(obstacle)
                exit_ = await self._supervise()
        except SetupFailed as failed:
            return SessionResult(failed.outcome(at_base=what.start is None))
        except (GitError, OSError, RefusedError, LeaseLost) as error:
            return SessionResult(_setup_outcome(error))
        except SessionError as error:
            await anyio.to_thread.run_sync(kill_by_environment, worktree.marker)
            # What no supervisor vouches for may still live and write: what is there can only be kept.
            return SessionResult(Failed(FailureClass.TRANSIENT, str(error)), collected=False)
        if self._checkout is None:
            return SessionResult(self._stopped_for or Interrupted("it was stopped before it began"))
        failpoint("session.ended")
        is_full = await anyio.to_thread.run_sync(is_disk_full, self.assignment.worktree.tree, self.tools.logs)
        if (home := self._adapter_command().home) is not None:
            await adapter_homes.write_back_logins(self._home, home, self.tools.environ)
        what, worktree = self.assignment, self.assignment.worktree
        after = () if self._provided is None else await self.tools.worktree_setup.after(worktree, self._provided)
        try:
            left, discarded = await self._collect(self._checkout)
        except (GitError, OSError) as error:
            reason = f"what it left in {worktree.tree} could not be collected: {error}"
            return SessionResult(Failed(FailureClass.TRANSIENT, reason), collected=False)
        stdout, stderr = [await read_tail(self._log(name)) for name in ("stdout", "stderr")]
        transcript, verdict, admitted, answer = await self._read_output(exit_, stdout, stderr)
        outcome = judge_outcome(
            exit_,
            what.limits,
            left.commit,
            left.refused,
            verdict,
            admitted=admitted,
            writes=what.writes,
            errors=stderr,
            denials=transcript.denials,
        )
        if isinstance(outcome, Interrupted) and self._stopped_for is not None:
            outcome = self._stopped_for
        if isinstance(outcome, Failed) and is_full:
            outcome = ResourcesExhausted(f"the disk is full, on which its session failed: {outcome.reason}")
        return SessionResult(
            outcome,
            branch=worktree.branch if left.commit and what.writes else None,
            collected=left.complete or not what.writes,
            salvaged=left.salvaged,
            notes=left.notes,
            faults=tuple(after),
            session_api_faults=() if self._mailbox is None else tuple(self._mailbox.faults),
            denied_hosts=self._denied,
            transcript=transcript,
            folder=worktree.tree,
            answer=answer,
            discarded=discarded,
        )

    async def release(self, *, saved: bool) -> None:
        """Give the place back; unless all that it holds is `saved`, it stays with the session's folder."""
        checkout, self._checkout = self._checkout, None
        if checkout is None:
            return
        if saved:
            await worktrees.remove_session_folder(self.assignment.worktree)
            self.pool.give_back(checkout, self._found)
        else:
            await self.pool.lose(checkout)

    async def _set_up(self) -> Outcome | None:
        """Make the worktree, and put into it what it is to have; return why the program can't be started, if so."""
        what, worktree = self.assignment, self.assignment.worktree
        await anyio.to_thread.run_sync(lambda: self.tools.logs.mkdir(mode=0o700, exist_ok=True))
        folder = None if what.earlier is None else what.earlier.folder
        checkout = await self.pool.take(what.start or what.base, worktree.root, what.adapter_name, folder)
        with anyio.CancelScope(shield=True):
            self._checkout = checkout
            if folder != checkout.place.tree:
                what = replace(what, earlier=None)
            worktree = await worktrees.create_worktree(worktree, checkout, what.text)
            self.assignment = replace(what, worktree=worktree)
        provided = await self.tools.worktree_setup.prepare(checkout)
        if not isinstance(provided, PreparedWorktree):
            return provided
        self._provided = provided
        return await self.tools.worktree_setup.before(worktree, provided)

    async def _supervise(self) -> ProcessExit:
        if self.tools.session_service is None:
            return await self._run_program()
        async with open_session_socket(self.assignment.worktree, self.tools.session_service) as self._mailbox:
            return await self._run_program()

    async def _run_program(self) -> ProcessExit:
        command, adapters = self._command(), self._adapter_command()
        reach = self.assignment.reach | PathAccess(readable=tuple(adapters.readable))
        if adapters.home is not None:
            try:
                reach |= await adapter_homes.set_up(self._home, adapters.home, self.tools.environ)
            except RefusedError as refused:
                return ProcessExit("exit", None, None, str(refused))
        if self._provided is not None:
            reach |= self._provided.reach
        if self._mailbox is not None:
            reach |= self._mailbox.reach
        async with self.tools.sandbox.around(SandboxScope.of(self.assignment.worktree), command, reach) as fenced:
            try:
                ended = await run_supervised(
                    fenced.command, may_start=self.may_start, on_spawned=lambda: failpoint("session.spawned")
                )
            finally:
                self._denied = tuple(fenced.denied)
        error, is_missing = ended.spawn_error, False
        if error is not None:
            program = command.argv[0]
            error += self.tools.sandbox.explain_missing_program(program, self.tools.environ, reach)
            is_missing = await anyio.to_thread.run_sync(_is_missing, program, self.tools.environ)
        return ProcessExit(ended.ended_by, ended.exit, ended.signal, error, ended.exhausted, is_missing)

    def secret_names(self) -> tuple[str, ...]:
        """Return the names of the variables with secrets that the program is given."""
        passed = self._adapter_command().pass_env
        given = {name: self.tools.environ[name] for name in passed if name in self.tools.environ}
        return tuple(sorted(name for name, value in given.items() if secret_values({name: value})))

    @property
    def _home(self) -> Path:
        return adapter_homes.home_path(self.tools.logs, self.assignment.worktree.task, self.assignment.adapter_name)

    def _adapter_command(self) -> SessionCommand:
        what, place = self.assignment, self.assignment.worktree
        can, box = what.adapter.capabilities(), self._mailbox
        own = box.server if box is not None and self.tools.has_server else None
        servers = what.mcp_servers if own is None else (*what.mcp_servers, own)
        request = SessionRequest(
            run=place.run,
            task=place.task,
            attempt=place.attempt,
            prompt=what.text,
            prompt_file=place.prompt_file,
            worktree=place.tree,
            home=self._home,
            resume=None if what.earlier is None else what.earlier.id,
            instructions=what.instructions if Capability.INSTRUCTIONS in can else None,
            mcp_servers=servers if Capability.MCP in can else (),
            max_cost=what.max_cost if Capability.COST_LIMIT in can else None,
            read_only=not what.writes and Capability.READ_ONLY in can,
            pre_edit=box.hook if box is not None and Capability.PRE_EDIT in can else (),
        )
        command = what.adapter.command(request)
        needed = [name for one in request.mcp_servers for name in one.env]
        return replace(command, pass_env=(*command.pass_env, *needed)) if needed else command

    @property
    def _variables(self) -> Mapping[str, str]:
        return {} if self._provided is None else self._provided.variables

    def _command(self) -> SupervisedCommand:
        what, place, command = self.assignment, self.assignment.worktree, self._adapter_command()
        env = build_session_environment(command, self.tools.environ, place, self._variables)
        if what.phase is not None:
            env["COUNCIL_PHASE"] = what.phase
        return SupervisedCommand(
            argv=command.argv,
            env=env if self._mailbox is None else self._mailbox.extend_environment(env),
            cwd=place.tree,
            stdin=command.stdin,
            stdout=self._log("stdout"),
            stderr=self._log("stderr"),
            cap=MAX_OUTPUT_BYTES,
            timeout=what.limits.timeout,
            grace=STOP_GRACE,
            interrupt=command.interrupt,
            lock=place.lock,
            idle_timeout=what.limits.idle_timeout,
            watched=(place.tree, place.git_dir),
            redact=self.tools.redactor.bytes_pattern,
        )

    async def _collect(self, checkout: HeldSlot) -> tuple[CollectedWork, tuple[str, ...]]:
        """Collect what a session left, and the paths that were discarded; waits while this machine lacks something.

        Raises GitError or OSError where it can't be collected, or the session is stopped while this waits.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception(
                lambda error: isinstance(error, GitError | OSError) and is_resource_exhaustion(error)
            ),
            wait=wait_exponential(max=_LONGEST_WAIT),
            stop=lambda _: self._stopping.is_set(),
            sleep=self._wait,
            reraise=True,
        )
        async for trial in retrying:
            with trial:
                self._found = await checkout.compare()
                left = await self._commit_work()
                return left, () if self.assignment.writes else await self._discard(left)
        raise AssertionError("a trial returns or raises")

    async def _wait(self, seconds: float) -> None:
        clock = self.tools.clock
        await clock.wait(self._stopping, clock.monotonic() + seconds)

    async def _commit_work(self) -> CollectedWork:
        what = self.assignment
        message = self.tools.redactor.text(format_commit_message(what.worktree, what.task_prompt))
        made = () if self._checkout is None else self._checkout.contents.record.unignored
        leavings = (*self._adapter_command().scratch_patterns, *(() if what.writes else _CACHES))
        admit = replace(self.tools.admission(what.max_file, made), scratch_patterns=leavings)
        base = what.base if what.writes else what.start or what.base
        return await collect_work(self.tools.git, what.worktree, base, message, admit=admit, found=self._found)

    async def _discard(self, left: CollectedWork) -> tuple[str, ...]:
        """Forget what a session changed that was to change nothing; return the paths."""
        if left.commit is None:
            return left.left_out
        what, git = self.assignment, self.tools.git
        changes = await git.changes(what.start or what.base, left.commit)
        await git("update-ref", "-d", f"refs/heads/{what.worktree.branch}")
        return tuple(dict.fromkeys((*(printable_name(change.path) for change in changes), *left.left_out)))

    async def _read_output(
        self, exit_: ProcessExit, stdout: str, stderr: str
    ) -> tuple[Transcript, Failed | None, bool, str]:
        """Return what the program said, the adapter's verdict, whether it may have said that it failed, its answer."""
        adapter = self.assignment.adapter
        try:
            transcript, events = await anyio.to_thread.run_sync(read_transcript, adapter, self._log("stdout"))
            end = SessionEnd(exit_.code, exit_.signal, self.tools.clock.now(), stdout, stderr, events)
            return transcript, adapter.verdict(end), has_reported_failure(events), extract_answer(events)
        except Exception as error:
            reason = f"its adapter could not make sense of its output, {type(error).__name__}: {error}"
            return EMPTY_TRANSCRIPT, Failed(FailureClass.CRASHED, " ".join(reason.split())[:_LONGEST_REASON]), True, ""

    def _log(self, stream: str) -> Path:
        return log_path(self.tools.logs, self.assignment.worktree.task, self.assignment.worktree.attempt, stream)


def _setup_outcome(error: GitError | OSError | RefusedError | LeaseLost) -> Outcome:
    if isinstance(error, LeaseLost):
        return Interrupted(str(error))
    reason = f"the session could not be set up: {error}"
    is_ours = isinstance(error, RefusedError) or is_resource_exhaustion(error)
    return ResourcesExhausted(reason) if is_ours else Failed(FailureClass.TRANSIENT, reason)


async def salvage_session(git: Git, worktree: Worktree, base: str, prompt: str, admit: IntakeRules) -> CollectedWork:
    """Collect what a cut-off session left.

    The caller has waited until nothing of the session lives, and holds proof that no git command of ours does.
    """
    if not worktrees.unlock_index(worktree):
        return CollectedWork(None)  # the checkout was never finished: no CLI has run in it
    message = admit.redactor.text(format_commit_message(worktree, prompt))
    return await collect_work(git, worktree, base, message, admit=admit)


def format_commit_message(worktree: Worktree, prompt: str) -> str:
    """Return the message of the commit that holds an attempt's work: the task, and its prompt's first line."""
    first = next((line.strip() for line in prompt.splitlines() if line.strip()), "")
    subject = "".join(char for char in f"{worktree.task}: {first}" if char.isprintable())
    return f"{subject if len(subject) <= 72 else subject[:71] + '…'}\n\nCouncil-Attempt: {worktree.attempt}\n"


def _is_missing(program: str, environ: Mapping[str, str]) -> bool:
    """Whether a program is not on the machine; one named within the worktree is a matter of its task alone. Blocks."""
    if os.sep in program and not Path(program).is_absolute():
        return False
    return shutil.which(program, path=environ.get("PATH")) is None
