"""Run an Agent Client Protocol agent for a prompt; print events as JSON lines.

    python3 -P acp.py --prompt-file FILE --worktree FOLDER [OPTION]... -- AGENT [ARGUMENT]...
    python3 -P acp.py --ready

Permission requests that contain a path outside the worktree are denied; only files in the worktree are read or written
for the agent. `--ready` checks that the SDK is installed.

--model M             a model that the agent offers
--resume ID           resume this conversation, which the agent loads
--auth ID             log in by this method of the agent, which must not need a user
--permissions WHAT    allow all other requests, or only those for edits
--read-only           deny edits
--pre-edit JSON       a command, as a list, that may deny an edit
--stop-gate JSON      a command, as a list, to run after each turn; the reason that it prints is the next prompt
--mcp-server JSON     an MCP server for the agent (`conversations.ConversationRequest`), repeatable
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import anyio
import anyio.to_thread

from adapters.bridges.lines import BridgeExit, MessageBuffer, write_line
from adapters.bridges.permissions import Permissions
from adapters.bridges.tool_text import plan_text
from adapters.bridges.worktree import ConfinedWorktree, OutsideWorktreeError

try:
    import acp
    from acp import schema

    from adapters.bridges.agent_errors import AUTH_REQUIRED, error_text, make_exit
    from adapters.bridges.agent_tools import ToolCalls
    from adapters.bridges.conversations import (
        ConversationRequest,
        check_can_resume,
        choose_model,
        find_key_method,
        log_in,
        mcp_servers_for,
    )
except ImportError:
    _MISSING = BridgeExit("the SDK of the Agent Client Protocol is missing: pip install 'cli-council[acp]'", "invalid")
    sys.exit(_MISSING.report(plain="--ready" in sys.argv))

_LONGEST_MESSAGE: Final = 50 << 20  # bytes of one message
_PATIENCE: Final = 5.0  # seconds for an agent to exit after it closes its output, or to replay a conversation
_QUIET: Final = 0.3  # seconds without updates after which a replay is considered complete
#: Seconds for an agent to end its turn after a signal.
_CANCEL_PATIENCE: Final = 2.0
_STOPS: Final = (signal.SIGINT, signal.SIGTERM)
_STOP_REASONS: Final[Mapping[str, tuple[str, str]]] = {
    "refusal": ("refused", "the agent refused to continue"),
    "max_tokens": ("limit", "the agent reached its token limit"),
    "max_turn_requests": ("limit", "the agent reached its request limit for one turn"),
    "cancelled": ("crashed", "the agent reported a cancellation, although none was requested"),
}


class _OneLineFormatter(logging.Formatter):
    """Formats the SDK's errors without a traceback."""

    def formatException(self, ei: Any) -> str:  # noqa: N802  (logging's)
        return " ".join(str(ei[1]).split())


class _Client:
    """The client side of the protocol (`acp.interfaces.Client`)."""

    def __init__(self, permissions: Permissions) -> None:
        self._permissions = permissions
        self.words = MessageBuffer()
        self.refused = ""
        """The last denied permission request, until the agent continues."""
        self.session: str | None = None
        """The id of the conversation, once it has begun."""
        self.stopped_by: signal.Signals | None = None
        self._cost: float | None = None
        self._cost_before = 0.0
        self._tools = ToolCalls()
        self._tokens = [0, 0]
        self._is_listening = False
        self._last_replayed = 0.0

    @property
    def cost(self) -> float | None:
        """US dollars spent since the conversation was loaded, or None if unknown."""
        return None if self._cost is None else max(self._cost - self._cost_before, 0.0)

    def add_usage(self, usage: schema.Usage | None) -> None:
        """Print the usage so far, with that of another turn."""
        if usage is not None:
            self._tokens[0] += usage.input_tokens + (usage.cached_read_tokens or 0) + (usage.cached_write_tokens or 0)
            self._tokens[1] += usage.output_tokens
        if usage is not None or self.cost is not None:
            write_line("spent", input_tokens=self._tokens[0], output_tokens=self._tokens[1], cost=self.cost)

    async def wait_for_replay(self) -> None:
        """Wait until a conversation is replayed, which may be after it is loaded."""
        with anyio.move_on_after(_PATIENCE):
            rest = _QUIET
            while rest > 0:
                await anyio.sleep(rest)
                rest = self._last_replayed + _QUIET - anyio.current_time()

    def listen(self) -> None:
        """Print and count updates from now on, because they belong to the prompt."""
        self._is_listening = True

    async def session_update(self, session_id: str, update: Any, **_: Any) -> None:  # noqa: ARG002  (the protocol's)
        """Print the agent's messages and tool calls."""
        if not self._is_listening:
            self._note_replayed(update)
            return
        match update:
            case schema.AgentMessageChunk(content=schema.TextContentBlock(text=text)):
                self.words.add(text)
                self.refused = ""
            case schema.ToolCallStart() | schema.ToolCallProgress():
                self.refused = "" if isinstance(update, schema.ToolCallStart) else self.refused
                self.words.flush()
                if not self._tools.report(update, is_new=isinstance(update, schema.ToolCallStart)):
                    self.words.write_keepalive()
            case schema.AgentPlanUpdate(entries=steps):
                self.words.flush()
                write_line("planned", text=plan_text((step.content, step.status) for step in steps))
            case schema.UsageUpdate(cost=schema.Cost(amount=amount, currency=currency)) if currency.upper() == "USD":
                self._cost = amount
            case _:
                self.words.write_keepalive()

    def _note_replayed(self, update: Any) -> None:
        self._last_replayed = anyio.current_time()
        match update:
            case schema.UsageUpdate(cost=schema.Cost(amount=amount, currency=currency)) if currency.upper() == "USD":
                self._cost_before = amount
        self.words.write_keepalive()

    async def request_permission(
        self,
        session_id: str,  # noqa: ARG002  (the protocol's)
        tool_call: schema.ToolCallUpdate,
        options: Sequence[schema.PermissionOption],
        **_: Any,
    ) -> schema.RequestPermissionResponse:
        """Allow a request once, or deny it by the rules."""
        kind, title, paths = self._tools.describe(tool_call)
        reason = await self._permissions.denial_reason(kind, title, paths)
        wanted = ("allow_once", "allow_always") if reason is None else ("reject_once", "reject_always")
        if reason is not None:
            self.refused = f"not allowed: {title}: {reason}"
            write_line("denied", tool=title, detail=reason, call=tool_call.tool_call_id)
        chosen = next((option for kind in wanted for option in options if option.kind == kind), None)
        if chosen is None:
            return schema.RequestPermissionResponse(outcome=schema.DeniedOutcome(outcome="cancelled"))
        outcome = schema.AllowedOutcome(outcome="selected", option_id=chosen.option_id)
        return schema.RequestPermissionResponse(outcome=outcome)

    async def read_text_file(
        self,
        session_id: str,  # noqa: ARG002  (the protocol's)
        path: str,
        line: int | None = None,
        limit: int | None = None,
        **_: Any,
    ) -> schema.ReadTextFileResponse:
        """Return a file in the worktree, or `limit` lines starting at `line` (from 1)."""
        file = self._locate(path)
        try:
            text = await anyio.to_thread.run_sync(partial(file.read_text, encoding="utf-8", errors="replace"))
        except FileNotFoundError:
            raise acp.RequestError.resource_not_found(path) from None
        except OSError as error:
            raise acp.RequestError.invalid_params({"details": str(error)}) from None
        if line is not None or limit is not None:
            first = max((line or 1) - 1, 0)
            lines = text.splitlines(keepends=True)[first:]
            text = "".join(lines if limit is None else lines[:limit])
        return schema.ReadTextFileResponse(content=text)

    async def write_text_file(
        self,
        session_id: str,  # noqa: ARG002  (the protocol's)
        path: str,
        content: str,
        **_: Any,
    ) -> schema.WriteTextFileResponse:
        """Write a file in the worktree, creating parent folders."""
        file = self._locate(path)
        if (reason := await self._permissions.edit_denial_reason([file])) is not None:
            raise _denied(f"{path}: {reason}")
        try:
            await anyio.to_thread.run_sync(_write, file, content)
        except OSError as error:
            raise acp.RequestError.invalid_params({"details": str(error)}) from None
        return schema.WriteTextFileResponse()

    def _locate(self, path: str) -> Path:
        try:
            return self._permissions.worktree.locate(path)
        except OutsideWorktreeError as error:
            raise _denied(str(error)) from None


def _denied(reason: str) -> acp.RequestError:
    """Report a denied request for a file; return the agent's error."""
    write_line("denied", tool="file", detail=reason, call="")
    return acp.RequestError.invalid_params({"details": reason})


def _write(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")


async def _run_conversation(
    agent: Any, client: _Client, top: Path, prompt: str, asked: ConversationRequest
) -> BridgeExit:
    """Run a conversation and return its end, or raise the error that interrupted it."""
    # No read capability: Gemini CLI does not understand our response for missing files, and then can't create them.
    ability = schema.FileSystemCapabilities(read_text_file=False, write_text_file=True)
    known = await agent.initialize(
        protocol_version=acp.PROTOCOL_VERSION,
        client_capabilities=schema.ClientCapabilities(fs=ability),
        client_info=schema.Implementation(name="cli-council", title="CLI Council", version="1"),
    )
    if known.protocol_version != acp.PROTOCOL_VERSION:
        message = f"the agent uses version {known.protocol_version} of the protocol, not {acp.PROTOCOL_VERSION}"
        raise BridgeExit(f"{message}: install another version of it", "invalid")
    try:
        if asked.auth is not None:
            await log_in(agent, known, asked.auth)
        session = await _start_conversation(agent, known, client, top, asked)
        client.listen()
        next_prompt, message = prompt, ""
        while next_prompt:
            response = await agent.prompt(session_id=session, prompt=[acp.text_block(next_prompt)])
            message = client.words.flush()
            client.add_usage(response.usage or _usage_in_metadata(response))
            if response.stop_reason in _STOP_REASONS:
                failure, reason = _STOP_REASONS[response.stop_reason]
                return BridgeExit(reason, failure)
            if client.refused:
                return BridgeExit(f"the agent stopped: {client.refused}", "refused")
            next_prompt = await _continuation(asked.stop_gate, top)
    except acp.RequestError as error:
        raise make_exit(error, known.auth_methods or ()) from error
    return BridgeExit(message[-2_000:])


async def _continuation(stop_gate: Sequence[str], top: Path) -> str:
    """Return why the agent must continue, according to the command; empty if it may end."""
    if not stop_gate:
        return ""
    call = json.dumps({"hook_event_name": "Stop", "cwd": str(top)}).encode()
    try:
        done = await anyio.run_process(stop_gate, input=call, stderr=None, cwd=top, check=False)
        answer = json.loads(done.stdout)
    except (OSError, ValueError):  # it prints nothing if the agent may end
        return ""
    is_blocked = isinstance(answer, dict) and answer.get("decision") == "block"
    return str(answer.get("reason", "")) if is_blocked else ""


async def _start_conversation(
    agent: Any, known: schema.InitializeResponse, client: _Client, top: Path, asked: ConversationRequest
) -> str:
    """Start or resume a conversation; return its id."""
    started: schema.NewSessionResponse | schema.LoadSessionResponse
    if asked.resume is None:
        started = await _new_session(agent, known, top, asked)
        session = started.session_id
    else:
        check_can_resume(known)
        session = asked.resume
        started = await _load(agent, session, top, mcp_servers_for(known, asked.servers))
        await client.wait_for_replay()
    client.session = session
    write_line("session", id=session)
    if asked.model is not None:
        await choose_model(agent, session, started, asked.model)
    return session


async def _new_session(
    agent: Any, known: schema.InitializeResponse, top: Path, asked: ConversationRequest
) -> schema.NewSessionResponse:
    """Start a conversation; log in first if the agent requires it and a key is enough."""
    servers = mcp_servers_for(known, asked.servers)
    try:
        return cast("schema.NewSessionResponse", await agent.new_session(cwd=str(top), mcp_servers=servers))
    except acp.RequestError as error:
        method = find_key_method(known) if error.code == AUTH_REQUIRED and asked.auth is None else None
        if method is None:
            raise
    await log_in(agent, known, method)
    return cast("schema.NewSessionResponse", await agent.new_session(cwd=str(top), mcp_servers=servers))


async def _load(agent: Any, session: str, top: Path, servers: Sequence[Any]) -> schema.LoadSessionResponse:
    try:
        return cast(
            "schema.LoadSessionResponse",
            await agent.load_session(cwd=str(top), session_id=session, mcp_servers=servers),
        )
    except acp.RequestError as error:
        if error.code == AUTH_REQUIRED:
            raise
        # The next session starts a new conversation, which may work.
        raise BridgeExit(
            f"the agent can't load the conversation {session}: {error_text(error)}", "transient"
        ) from error


def _usage_in_metadata(response: schema.PromptResponse) -> schema.Usage | None:
    """Return the tokens in Gemini CLI's protocol extension, or None."""
    try:
        count = (response.field_meta or {})["quota"]["token_count"]
        sent, received = count["input_tokens"], count["output_tokens"]
        return schema.Usage(input_tokens=sent, output_tokens=received, total_tokens=sent + received)
    except (LookupError, TypeError, ValueError):
        return None


async def _run(
    argv: Sequence[str], permissions: Permissions, prompt: str, asked: ConversationRequest
) -> BridgeExit | signal.Signals:
    """Run an agent; return the end of the conversation, or the signal that stopped it."""
    client, top = _Client(permissions), permissions.worktree.top
    # It inherits our standard error, because an unread pipe would block it.
    streams = {"stderr": None, "limit": _LONGEST_MESSAGE}
    async with AsyncExitStack() as stack:
        # The client implements part of the protocol: no terminals and no forms.
        side = cast("acp.Client", client)
        spawned = acp.spawn_agent_process(side, *argv, env=os.environ, cwd=top, transport_kwargs=streams)
        try:
            agent, process = await stack.enter_async_context(spawned)
        except OSError as error:
            failure = "missing" if isinstance(error, FileNotFoundError) else "invalid"
            return BridgeExit(f"the agent {argv[0]!r} can't be started: {error.strerror}", failure)
        async with anyio.create_task_group() as group:
            group.start_soon(_stop_on_signal, agent, client, group.cancel_scope)
            ended = await _conclude(agent, process, client, top, prompt, asked)
            group.cancel_scope.cancel()
        if client.stopped_by is not None:
            return client.stopped_by
        return ended
    raise AssertionError("no exception is suppressed")


async def _conclude(
    agent: Any, process: Any, client: _Client, top: Path, prompt: str, asked: ConversationRequest
) -> BridgeExit:
    """Run a conversation and return its end."""
    try:
        return await _run_conversation(agent, client, top, prompt, asked)
    except BridgeExit as concluded:
        return concluded
    except acp.RequestError as error:
        return make_exit(error)
    except ConnectionError:
        client.words.flush()
        with anyio.move_on_after(_PATIENCE):
            await process.wait()
        code = "it closed its output" if process.returncode is None else f"exit code {process.returncode}"
        return BridgeExit(f"the agent ended before its response was complete ({code})", "crashed")
    except ValueError as error:  # pydantic's
        return BridgeExit(f"the agent's response violates the protocol: {str(error)[:300]}", "crashed")


async def _stop_on_signal(agent: Any, client: _Client, scope: anyio.CancelScope) -> None:
    """Cancel the agent's turn after a signal, so that it stops its tools and reports its usage."""
    with anyio.open_signal_receiver(*_STOPS) as signals:
        async for number in signals:
            client.stopped_by = number
            if client.session is None:
                break
            with anyio.move_on_after(_CANCEL_PATIENCE), suppress(ConnectionError):
                await agent.cancel(session_id=client.session)
                await anyio.sleep_forever()  # until the conversation ends
            break
    scope.cancel()


def main() -> int:
    """Run one conversation; return 0 on success, otherwise 1."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--prompt-file", type=Path)
    parser.add_argument("--worktree", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--resume")
    parser.add_argument("--auth")
    parser.add_argument("--permissions", choices=("all", "edits"), default="all")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--pre-edit", default=(), type=json.loads)
    parser.add_argument("--stop-gate", default=(), type=json.loads)
    parser.add_argument("--mcp-server", action="append", default=[], type=json.loads)
    parser.add_argument("--ready", action="store_true")
    parser.add_argument("argv", nargs="*")
    options = parser.parse_args()
    if options.ready:
        return BridgeExit("ready").report(plain=True)
    log = logging.StreamHandler()
    log.setFormatter(_OneLineFormatter())
    logging.basicConfig(handlers=[log])
    prompt = options.prompt_file.read_text(encoding="utf-8")
    asked = ConversationRequest(options.model, options.resume, options.mcp_server, options.stop_gate, options.auth)
    worktree = ConfinedWorktree(options.worktree)
    permissions = Permissions(worktree, options.permissions, options.read_only, options.pre_edit)
    ended: BridgeExit | signal.Signals
    try:
        ended = anyio.run(_run, options.argv, permissions, prompt, asked)
    except KeyboardInterrupt:  # before the agent has started
        ended = signal.SIGINT
    if isinstance(ended, BridgeExit):
        return ended.report()
    signal.signal(ended, signal.SIG_DFL)  # the agent has already exited
    signal.raise_signal(ended)
    return 1


if __name__ == "__main__":
    sys.exit(main())
