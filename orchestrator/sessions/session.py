"""Run one session: a CLI in a worktree, whose work is then collected."""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
import anyio.to_thread
from tenacity import AsyncRetrying, retry_if_exception, wait_exponential

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
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.settings.run_settings import PathAccess
from orchestrator.errors import (
    GitError,
    LeaseLost,
    PluginFailed,
    RefusedError,
    SessionError,
    is_resource_exhaustion,
    plugin_code,
)
from orchestrator.protocols import Adapter, Capability, McpServer, SessionCommand, SessionEnd, SessionRequest
from orchestrator.repo.git.command import Git, printable_name
from orchestrator.repo.intake.collect import CollectedWork, collect_work
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.change_detection import TreeDiff
from orchestrator.repo.worktrees.checkouts import HeldSlot
from orchestrator.repo.worktrees.pool import SlotPool
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

_STOPPED = ProcessExit("stop", None, None, None)
#: Caches of test runners and linters, as .gitignore patterns. A read-only session may write them.
_CACHES = (
    *("__pycache__/", ".pytest_cache/", ".mypy_cache/", ".ruff_cache/", ".hypothesis/", ".tox/", ".nox/"),
    *(".coverage", ".nyc_output/", ".eslintcache", ".gradle/"),
)
#: Maximum seconds between attempts to collect work while the machine lacks a resource such as disk space.
_MAX_RETRY_WAIT = 10.0


@dataclass(frozen=True, slots=True)
class SessionResult:
    """The outcome of a session and the branch with its work, if any.

    `collected` is false if some files could not be committed; the worktree is then the only copy and must be
    preserved. `salvaged` lists the refs that preserve the branches that the session created.
    """

    outcome: Outcome
    branch: str | None = None
    collected: bool = True
    salvaged: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """The parts of the worktree that were not collected, with reasons."""
    faults: tuple[str, ...] = ()
    """Errors of the `after_run` commands."""
    session_api_faults: tuple[str, ...] = ()
    """Internal errors of the session API."""
    denied_hosts: tuple[str, ...] = ()
    """The hosts that the proxy denied, as `host:port`."""
    transcript: Transcript = EMPTY_TRANSCRIPT
    folder: Path | None = None
    """The folder in which the program ran."""
    answer: str = ""
    """The program's complete final answer."""
    discarded: tuple[str, ...] = ()
    """The paths that a session without write permission changed."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that a CLI can resume: its id, and the only folder in which the id is valid."""

    id: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Assignment:
    """The work of one session: `base` is the commit that its changes are compared with.

    `start` is the first commit of the worktree if it is not the base; `context` follows the prompt. If possible, the
    session resumes an `earlier_conversation` with only the `follow_up` as its prompt. Unless `writes` is set, its
    changes are discarded. `task_prompt` is the prompt of the task, `phase` the name of the workflow's phase.
    """

    worktree: Worktree
    base: str
    start: str | None
    prompt: str
    context: str | None
    adapter: Adapter
    adapter_name: str
    reach: PathAccess
    limits: SessionLimits
    max_file: int
    instructions: str | None = None
    mcp_servers: tuple[McpServer, ...] = ()
    max_cost: float | None = None
    earlier_conversation: Conversation | None = None
    follow_up: str | None = None
    task_prompt: str = ""
    phase: str | None = None
    writes: bool = True

    @property
    def text(self) -> str:
        """The whole prompt of the program."""
        if self.earlier_conversation is not None and self.follow_up is not None:
            return self.follow_up
        before = self.instructions if Capability.INSTRUCTIONS not in self.adapter.capabilities() else None
        return "\n\n".join(part for part in (before, self.prompt, self.context) if part is not None)


@dataclass(frozen=True, slots=True)
class SessionResources:
    """Resources shared by all sessions of a run."""

    git: Git
    sandbox: RunSandbox
    redactor: Redactor
    logs: Path
    environ: Mapping[str, str]
    clock: Clock
    worktree_setup: WorktreeSetup
    session_service: SessionApi | None = None
    """Answers session requests; None means that sessions have no session socket."""
    has_server: bool = True
    """Whether sessions get the MCP server of the session API if their CLI supports it."""

    def admission(self, max_file: int, unignored: Iterable[str] = ()) -> IntakeRules:
        """Return the rules for committed files; `unignored` lists setup files that git does not ignore."""
        return IntakeRules(self.redactor, max_file, withheld=(*self.worktree_setup.provisions.paths, *unignored))


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
    _prepared: PreparedWorktree | None = field(default=None, init=False)
    _stopped_for: Failed | None = field(default=None, init=False)
    _socket: SessionSocket | None = field(default=None, init=False)
    _denied: tuple[str, ...] = field(default=(), init=False)
    _running: anyio.CancelScope = field(default_factory=anyio.CancelScope, init=False)
    _stopping: anyio.Event = field(default_factory=anyio.Event, init=False)

    def stop(self, failure: Failed | None = None) -> None:
        """Stop the CLI and its processes; `run` then collects the work.

        The outcome is `failure` if given, otherwise Interrupted.
        """
        self._stopped_for = self._stopped_for or failure
        self._running.cancel()
        self._stopping.set()

    async def run(self) -> SessionResult:
        """Set up the worktree, run the CLI in it, and collect its work. Call `release` afterwards."""
        assignment, worktree = self.assignment, self.assignment.worktree
        exit_ = _STOPPED
        try:
            with self._running:
                obstacle = await self._set_up()
                if obstacle is not None:
                    return SessionResult(obstacle)
                exit_ = await self._supervise()
        except SetupFailed as failed:
            return SessionResult(failed.outcome(worktree.run, at_base=assignment.start is None))
        except (GitError, OSError, RefusedError, LeaseLost) as error:
            return SessionResult(_setup_outcome(error))
        except SessionError as error:
            await anyio.to_thread.run_sync(kill_by_environment, worktree.marker)
            # Unsupervised processes may still be writing to the worktree, so it can only be preserved.
            return SessionResult(Failed(FailureClass.TRANSIENT, str(error)), collected=False)
        if self._checkout is None:
            return SessionResult(self._stopped_for or Interrupted("stopped before it started"))
        failpoint("session.ended")
        is_full = await anyio.to_thread.run_sync(is_disk_full, self.assignment.worktree.tree, self.tools.logs)
        if (home := self._adapter_command().home) is not None:
            await adapter_homes.write_back_logins(self._home, home, self.tools.environ)
        assignment, worktree = self.assignment, self.assignment.worktree
        after = () if self._prepared is None else await self.tools.worktree_setup.run_after(worktree, self._prepared)
        try:
            work, discarded = await self._collect(self._checkout)
        except (GitError, OSError) as error:
            reason = f"the work in {worktree.tree} could not be collected: {error}"
            return SessionResult(Failed(FailureClass.TRANSIENT, reason), collected=False)
        stdout, stderr = [await read_tail(self._log(name)) for name in ("stdout", "stderr")]
        transcript, verdict, admitted, answer = await self._read_output(exit_, stdout, stderr)
        outcome = judge_outcome(
            exit_,
            assignment.limits,
            work.commit,
            work.refused,
            verdict,
            admitted=admitted,
            writes=assignment.writes,
            errors=stderr,
            denials=transcript.denials,
        )
        if isinstance(outcome, Interrupted) and self._stopped_for is not None:
            outcome = self._stopped_for
        if isinstance(outcome, Failed) and is_full:
            outcome = ResourcesExhausted(f"the disk is full; the session failed: {outcome.reason}")
        return SessionResult(
            outcome,
            branch=worktree.branch if work.commit and assignment.writes else None,
            collected=work.complete or not assignment.writes,
            salvaged=work.salvaged,
            notes=work.notes,
            faults=tuple(after),
            session_api_faults=() if self._socket is None else tuple(self._socket.faults),
            denied_hosts=self._denied,
            transcript=transcript,
            folder=worktree.tree,
            answer=answer,
            discarded=discarded,
        )

    async def release(self, *, saved: bool) -> None:
        """Release the worktree slot, or leave it to the session's folder unless its contents are `saved`."""
        checkout, self._checkout = self._checkout, None
        if checkout is None:
            return
        if saved:
            await worktrees.remove_session_folder(self.assignment.worktree)
            self.pool.release(checkout, self._tree_diff)
        else:
            await self.pool.slots.detach(checkout)

    async def _set_up(self) -> Outcome | None:
        """Create and set up the worktree; return an outcome if the program can't start, else None."""
        assignment, worktree = self.assignment, self.assignment.worktree
        await anyio.to_thread.run_sync(lambda: self.tools.logs.mkdir(mode=0o700, exist_ok=True))
        earlier = assignment.earlier_conversation
        folder = None if earlier is None else earlier.folder
        commit = assignment.start or assignment.base
        checkout = await self.pool.acquire(commit, worktree.root, assignment.adapter_name, folder)
        with anyio.CancelScope(shield=True):
            self._checkout = checkout
            if folder != checkout.slot.tree:
                assignment = replace(assignment, earlier_conversation=None)
            worktree = await worktrees.create_worktree(worktree, checkout, assignment.text)
            self.assignment = replace(assignment, worktree=worktree)
        prepared = await self.tools.worktree_setup.prepare(checkout)
        if not isinstance(prepared, PreparedWorktree):
            return prepared
        self._prepared = prepared
        return await self.tools.worktree_setup.run_before(worktree, prepared)

    async def _supervise(self) -> ProcessExit:
        if self.tools.session_service is None:
            return await self._run_program()
        async with open_session_socket(self.assignment.worktree, self.tools.session_service) as self._socket:
            return await self._run_program()

    async def _run_program(self) -> ProcessExit:
        command, adapter_command = self._command(), self._adapter_command()
        reach = self.assignment.reach | PathAccess(readable=tuple(adapter_command.readable))
        if adapter_command.home is not None:
            try:
                reach |= await adapter_homes.set_up(self._home, adapter_command.home, self.tools.environ)
            except RefusedError as refused:
                return ProcessExit("exit", None, None, str(refused))
        if self._prepared is not None:
            reach |= self._prepared.reach
        if self._socket is not None:
            reach |= self._socket.reach
        async with self.tools.sandbox.apply(SandboxScope.of(self.assignment.worktree), command, reach) as sandboxed:
            try:
                ended = await run_supervised(
                    sandboxed.command, may_start=self.may_start, on_spawned=lambda: failpoint("session.spawned")
                )
            finally:
                self._denied = tuple(sandboxed.denied)
        error, is_missing = ended.spawn_error, False
        if error is not None:
            program = command.argv[0]
            error += self.tools.sandbox.explain_missing_program(program, self.tools.environ, reach)
            is_missing = await anyio.to_thread.run_sync(_is_missing, program, self.tools.environ)
        return ProcessExit(ended.ended_by, ended.exit, ended.signal, error, ended.exhausted, is_missing)

    def secret_names(self) -> tuple[str, ...]:
        """Return the names of the variables passed to the program that contain secrets."""
        passed = self._adapter_command().pass_env
        given = {name: self.tools.environ[name] for name in passed if name in self.tools.environ}
        return tuple(sorted(name for name, value in given.items() if secret_values({name: value})))

    @property
    def _home(self) -> Path:
        return adapter_homes.home_path(self.tools.logs, self.assignment.worktree.task, self.assignment.adapter_name)

    def _adapter_command(self) -> SessionCommand:
        assignment, worktree, socket = self.assignment, self.assignment.worktree, self._socket
        capabilities = assignment.adapter.capabilities()
        own_server = socket.server if socket is not None and self.tools.has_server else None
        servers = assignment.mcp_servers if own_server is None else (*assignment.mcp_servers, own_server)
        earlier = assignment.earlier_conversation
        request = SessionRequest(
            run=worktree.run,
            task=worktree.task,
            attempt=worktree.attempt,
            prompt=assignment.text,
            prompt_file=worktree.prompt_file,
            worktree=worktree.tree,
            home=self._home,
            resume=None if earlier is None else earlier.id,
            instructions=assignment.instructions if Capability.INSTRUCTIONS in capabilities else None,
            mcp_servers=servers if Capability.MCP in capabilities else (),
            max_cost=assignment.max_cost if Capability.COST_LIMIT in capabilities else None,
            read_only=not assignment.writes and Capability.READ_ONLY in capabilities,
            pre_edit=socket.hook if socket is not None and Capability.PRE_EDIT in capabilities else (),
        )
        command = assignment.adapter.command(request)
        needed = [name for server in request.mcp_servers for name in server.env]
        return replace(command, pass_env=(*command.pass_env, *needed)) if needed else command

    @property
    def _variables(self) -> Mapping[str, str]:
        return {} if self._prepared is None else self._prepared.variables

    def _command(self) -> SupervisedCommand:
        assignment, worktree, command = self.assignment, self.assignment.worktree, self._adapter_command()
        env = build_session_environment(command, self.tools.environ, worktree, self._variables)
        if assignment.phase is not None:
            env["COUNCIL_PHASE"] = assignment.phase
        return SupervisedCommand(
            argv=command.argv,
            env=env if self._socket is None else self._socket.extend_environment(env),
            cwd=worktree.tree,
            stdin=command.stdin,
            stdout=self._log("stdout"),
            stderr=self._log("stderr"),
            cap=MAX_OUTPUT_BYTES,
            timeout=assignment.limits.timeout,
            grace=STOP_GRACE,
            interrupt=command.interrupt,
            lock=worktree.lock,
            idle_timeout=assignment.limits.idle_timeout,
            watched=(worktree.tree, worktree.git_dir),
            redact=self.tools.redactor.bytes_pattern,
        )

    async def _collect(self, checkout: HeldSlot) -> tuple[CollectedWork, tuple[str, ...]]:
        """Collect the session's work; return it with the discarded paths.

        Retries while the machine lacks a resource. Raises GitError or OSError if the work can't be collected, or if
        the session is stopped during a retry wait.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception(
                lambda error: isinstance(error, GitError | OSError) and is_resource_exhaustion(error)
            ),
            wait=wait_exponential(max=_MAX_RETRY_WAIT),
            stop=lambda _: self._stopping.is_set(),
            sleep=self._wait,
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                self._tree_diff = await checkout.compare()
                work = await self._commit_work()
                return work, () if self.assignment.writes else await self._discard(work)
        raise AssertionError("an attempt returns or raises")

    async def _wait(self, seconds: float) -> None:
        clock = self.tools.clock
        await clock.wait(self._stopping, clock.monotonic() + seconds)

    async def _commit_work(self) -> CollectedWork:
        assignment = self.assignment
        message = self.tools.redactor.text(format_commit_message(assignment.worktree, assignment.task_prompt))
        unignored = () if self._checkout is None else self._checkout.contents.record.unignored
        scratch = (*self._adapter_command().scratch_patterns, *(() if assignment.writes else _CACHES))
        admit = replace(self.tools.admission(assignment.max_file, unignored), scratch_patterns=scratch)
        base = assignment.base if assignment.writes else assignment.start or assignment.base
        git, worktree = self.tools.git, assignment.worktree
        return await collect_work(git, worktree, base, message, admit=admit, diff=self._tree_diff)

    async def _discard(self, work: CollectedWork) -> tuple[str, ...]:
        """Discard the changes of a session without write permission; return their paths."""
        if work.commit is None:
            return work.left_out
        assignment, git = self.assignment, self.tools.git
        changes = await git.changes(assignment.start or assignment.base, work.commit)
        await git("update-ref", "-d", f"refs/heads/{assignment.worktree.branch}")
        return tuple(dict.fromkeys((*(printable_name(change.path) for change in changes), *work.left_out)))

    async def _read_output(
        self, exit_: ProcessExit, stdout: str, stderr: str
    ) -> tuple[Transcript, Failed | None, bool, str]:
        """Return the transcript, the verdict, whether the program may have reported failure, and the answer."""
        adapter = self.assignment.adapter
        try:
            with plugin_code():
                transcript, events = await anyio.to_thread.run_sync(read_transcript, adapter, self._log("stdout"))
                end = SessionEnd(exit_.code, exit_.signal, self.tools.clock.now(), stdout, stderr, events)
                return transcript, adapter.verdict(end), has_reported_failure(events), extract_answer(events)
        except PluginFailed as failed:
            reason = f"the adapter could not parse the output: {failed}"
            return EMPTY_TRANSCRIPT, Failed(FailureClass.CRASHED, reason), True, ""

    def _log(self, stream: str) -> Path:
        return log_path(self.tools.logs, self.assignment.worktree.task, self.assignment.worktree.attempt, stream)


def _setup_outcome(error: GitError | OSError | RefusedError | LeaseLost) -> Outcome:
    if isinstance(error, LeaseLost):
        return Interrupted(str(error))
    reason = f"the session could not be set up: {error}"
    is_ours = isinstance(error, RefusedError) or is_resource_exhaustion(error)
    return ResourcesExhausted(reason) if is_ours else Failed(FailureClass.TRANSIENT, reason)


async def salvage_session(git: Git, worktree: Worktree, base: str, prompt: str, admit: IntakeRules) -> CollectedWork:
    """Collect the work of an interrupted session.

    No process of the session and none of our git commands on its worktree may be alive.
    """
    if not worktrees.unlock_index(worktree):
        return CollectedWork(None)  # the checkout is incomplete, so no CLI has run in it
    message = admit.redactor.text(format_commit_message(worktree, prompt))
    return await collect_work(git, worktree, base, message, admit=admit)


def format_commit_message(worktree: Worktree, prompt: str) -> str:
    """Return the commit message for an attempt's work: the task and the first line of its prompt."""
    first = next((line.strip() for line in prompt.splitlines() if line.strip()), "")
    subject = "".join(char for char in f"{worktree.task}: {first}" if char.isprintable())
    return f"{subject if len(subject) <= 72 else subject[:71] + '…'}\n\nCouncil-Attempt: {worktree.attempt}\n"


def _is_missing(program: str, environ: Mapping[str, str]) -> bool:
    """Return whether a program is missing on this machine; False for programs in the worktree. Blocks."""
    if os.sep in program and not Path(program).is_absolute():
        return False
    return shutil.which(program, path=environ.get("PATH")) is None
