"""Run a session's program: its command, its access, and its output."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import anyio.to_thread

from orchestrator.domain.runs.outcome import (
    Built,
    Failed,
    Outcome,
    Paused,
    ProcessExit,
    ReadOnlySuccess,
    SessionLimits,
    classify_outcome,
)
from orchestrator.domain.security.secrets import secret_values
from orchestrator.domain.sessions.shell_commands import is_in_worktree, make_chmod_hint
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.settings.run_settings import PathAccess
from orchestrator.errors import PluginFailed, RefusedError, plugin_code
from orchestrator.protocols import Capability, SessionCommand, SessionEnd, SessionRequest
from orchestrator.sessions.assignment import Assignment, SessionResources
from orchestrator.sessions.output.log_files import MAX_OUTPUT_BYTES, STOP_GRACE, log_path, read_tail
from orchestrator.sessions.output.transcript import (
    EMPTY_TRANSCRIPT,
    Transcript,
    extract_answer,
    has_reported_failure,
    read_transcript,
)
from orchestrator.sessions.sandbox.run_sandbox import SandboxScope
from orchestrator.sessions.setup import adapter_homes
from orchestrator.sessions.setup.environment import build_session_environment, passed_variables
from orchestrator.sessions.setup.worktree_setup import PreparedWorktree
from orchestrator.sessions.socket.listener import SessionSocket
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand, run_supervised
from orchestrator.sessions.terminal import UserTerminal
from orchestrator.system.failpoints import failpoint

#: The variables of a user's terminal.
_TERMINAL_VARIABLES: Final = ("TERM", "COLORTERM")
#: A user ends an attached conversation; the supervisor can't wait for longer than 24 days.
_ATTACHED_LIMITS: Final = SessionLimits(7 * 24 * 3600.0)


@dataclass(slots=True)
class SessionProgram:
    """The program of a session: an adapter's CLI with its assignment."""

    tools: SessionResources
    assignment: Assignment
    prepared: PreparedWorktree | None = None
    """The setup of the worktree, if it is complete."""
    socket: SessionSocket | None = None
    """The session API, if it is served."""
    denied_hosts: tuple[str, ...] = ()

    def secret_names(self) -> tuple[str, ...]:
        """Return the names of the user's variables passed to the program that contain secrets."""
        command = self.command()
        given = passed_variables(command, self.tools.environ)
        secret = [name for name, value in given.items() if secret_values({name: value})]
        return tuple(sorted({command.renamed_env.get(name, name) for name in secret}))

    @property
    def home(self) -> Path:
        """The CLI's home folder, if it has its own."""
        return adapter_homes.home_path(self.tools.logs, self.assignment.worktree.task, self.assignment.adapter_name)

    async def run(
        self, may_start: Callable[[], Awaitable[None]] | None, on_hangup: Callable[[], None] = lambda: None
    ) -> ProcessExit:
        """Run the program until it ends. `may_start` raises LeaseLost to prevent that.

        `on_hangup` is called when the user's terminal is closed on which it runs.
        """
        command, adapter_command = self._supervised(), self.command()
        reach = self.assignment.reach | PathAccess(readable=tuple(adapter_command.readable))
        if adapter_command.home is not None:
            try:
                reach |= await adapter_homes.set_up(self.home, adapter_command.home, self.tools.environ)
            except RefusedError as refused:
                return ProcessExit(None, None, "exit", str(refused))
        if self.prepared is not None:
            reach |= self.prepared.reach
        if self.socket is not None:
            reach |= self.socket.reach
        async with AsyncExitStack() as stack:
            if (terminal := self.assignment.terminal) is not None:
                command = replace(command, terminal=await stack.enter_async_context(terminal.open(on_hangup)))
            scope = SandboxScope.of(self.assignment.worktree)
            sandboxed = await stack.enter_async_context(self.tools.sandbox.apply(scope, command, reach))
            try:
                ended = await run_supervised(
                    sandboxed.command, may_start=may_start, on_spawned=lambda: failpoint("session.spawned")
                )
            finally:
                self.denied_hosts = tuple(sandboxed.denied)
        error, is_missing = ended.spawn_error, False
        if error is not None:
            program = command.argv[0]
            if is_in_worktree(program) and os.strerror(errno.EACCES) in error:
                error += f": {make_chmod_hint(program)}"
            else:
                error += self.tools.sandbox.explain_missing_program(program, self.tools.environ, reach)
            is_missing = await anyio.to_thread.run_sync(_is_missing, program, self.tools.environ)
        return replace(ended, spawn_error=error, missing=is_missing)

    def command(self) -> SessionCommand:
        """Return the adapter's command for the session."""
        assignment, worktree, socket = self.assignment, self.assignment.worktree, self.socket
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
            home=self.home,
            resume=None if earlier is None else earlier.id,
            interactive=assignment.terminal is not None,
            instructions=assignment.instructions if Capability.INSTRUCTIONS in capabilities else None,
            mcp_servers=servers if Capability.MCP in capabilities else (),
            max_cost=assignment.max_cost if Capability.COST_LIMIT in capabilities else None,
            read_only=not assignment.writes and Capability.READ_ONLY in capabilities,
            pre_edit=socket.hook("pre-edit") if socket is not None and Capability.PRE_EDIT in capabilities else (),
            post_tool=socket.hook("post-tool") if socket is not None and Capability.POST_TOOL in capabilities else (),
            stop_gate=socket.hook("stop") if socket is not None and Capability.STOP_GATE in capabilities else (),
        )
        command = assignment.adapter.command(request)
        needed = [name for server in request.mcp_servers for name in server.env]
        return replace(command, pass_env=(*command.pass_env, *needed)) if needed else command

    def _supervised(self) -> SupervisedCommand:
        assignment, worktree, command = self.assignment, self.assignment.worktree, self.command()
        variables = {} if self.prepared is None else self.prepared.variables
        env = build_session_environment(command, self.tools.environ, worktree, variables)
        limits = assignment.limits
        if assignment.terminal is not None:
            env |= {name: self.tools.environ[name] for name in _TERMINAL_VARIABLES if name in self.tools.environ}
            limits = _ATTACHED_LIMITS
        if assignment.phase is not None:
            env["COUNCIL_PHASE"] = assignment.phase
        return SupervisedCommand(
            argv=command.argv,
            env=env if self.socket is None else self.socket.extend_environment(env),
            cwd=worktree.tree,
            stdin=command.stdin,
            stdout=self._log("stdout"),
            stderr=self._log("stderr"),
            cap=MAX_OUTPUT_BYTES,
            timeout=limits.timeout,
            grace=STOP_GRACE,
            interrupt=command.interrupt,
            lock=worktree.lock,
            idle_timeout=limits.idle_timeout,
            watched=(worktree.tree, worktree.git_dir),
            redact=self.tools.redactor.bytes_pattern,
        )

    async def judge(
        self, exit_: ProcessExit, commit: str | None, refused: str | None
    ) -> tuple[Outcome, Transcript, str]:
        """Return the outcome of the ended program, its transcript, and its final message.

        `commit` and `refused` are its collected work, see `classify_outcome`.
        """
        if self.assignment.terminal is not None:
            return await self._judge_attached(self.assignment.terminal, exit_, commit, refused)
        adapter = self.assignment.adapter
        stdout, stderr = [await read_tail(self._log(name)) for name in ("stdout", "stderr")]
        try:
            with plugin_code():
                transcript, events = await anyio.to_thread.run_sync(read_transcript, adapter, self._log("stdout"))
                end = SessionEnd(exit_.exit, exit_.signal, self.tools.clock.now(), stdout, stderr, events)
                verdict, reported_failure = adapter.verdict(end), has_reported_failure(events)
                answer = extract_answer(events)
        except PluginFailed as failed:
            reason = f"the adapter could not parse the output: {failed}"
            verdict, reported_failure = Failed(FailureClass.CRASHED, reason), True
            transcript, answer = EMPTY_TRANSCRIPT, ""
        outcome = classify_outcome(
            exit_,
            self.assignment.limits,
            commit,
            refused,
            verdict,
            reported_failure=reported_failure,
            writes=self.assignment.writes,
            errors=stderr,
            denials=transcript.denials,
        )
        return outcome, transcript, answer

    async def _judge_attached(
        self, terminal: UserTerminal, exit_: ProcessExit, commit: str | None, refused: str | None
    ) -> tuple[Outcome, Transcript, str]:
        """Judge like `judge`, but whether the work is complete is the user's decision."""
        assignment, earlier = self.assignment, self.assignment.earlier_conversation
        if exit_.exit != 0:
            await terminal.reset()
        outcome: Outcome = Paused("the user left the conversation")
        if exit_.spawn_error is not None:
            outcome = Paused(f"the program did not start: {exit_.spawn_error}")
        elif exit_.ended_by != "exit":
            outcome = Paused("the terminal was closed, or the command was stopped")
        elif exit_.exit != 0:
            outcome = Paused("the program ended with an error")
        elif refused is not None:
            outcome = Paused(refused)
        elif (commit is not None or not assignment.writes) and await terminal.is_complete():
            outcome = ReadOnlySuccess() if commit is None or not assignment.writes else Built(commit)
        return outcome, replace(EMPTY_TRANSCRIPT, session=None if earlier is None else earlier.id), ""

    def _log(self, stream: str) -> Path:
        return log_path(self.tools.logs, self.assignment.worktree.task, self.assignment.worktree.attempt, stream)


def _is_missing(program: str, environ: Mapping[str, str]) -> bool:
    """Return whether a program is missing, unless it is in the worktree. Blocks."""
    if os.sep in program and not Path(program).is_absolute():
        return False
    return shutil.which(program, path=environ.get("PATH")) is None
