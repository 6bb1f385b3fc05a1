"""Run an Agent Client Protocol agent for a prompt; print events as JSON lines.

    python3 -P acp.py --prompt-file FILE --worktree FOLDER [OPTION]... -- AGENT [ARGUMENT]...
    python3 -P acp.py --ready

Permission requests are granted unless they contain a path outside the worktree; only files in the worktree are read or
written for the agent. `--ready` checks that the SDK is installed.

--model M             a model that the agent offers
--resume ID           resume this conversation, which the agent loads
--mcp-server JSON     an MCP server for the agent (`conversations.ConversationRequest`), repeatable
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import anyio
import anyio.to_thread

from adapters.bridges.http_status import failure_name_for_status
from adapters.bridges.lines import BridgeExit, MessageBuffer, write_line
from adapters.bridges.tool_text import plan_text
from adapters.bridges.worktree import ConfinedWorktree, OutsideWorktreeError

try:
    import acp
    from acp import schema

    from adapters.bridges.agent_tools import ToolCalls
    from adapters.bridges.conversations import ConversationRequest, check_can_resume, choose_model, mcp_servers_for
except ImportError:
    _MISSING = BridgeExit("the SDK of the Agent Client Protocol is missing: pip install 'cli-council[acp]'", "invalid")
    sys.exit(_MISSING.report(plain="--ready" in sys.argv))

_AUTH_REQUIRED: Final = -32000  # agentclientprotocol.com/protocol/v1/schema, ErrorCode
_LONGEST_MESSAGE: Final = 50 << 20  # bytes of one message
_PATIENCE: Final = 5.0  # seconds for an agent to exit after it closes its output, or to replay a conversation
_QUIET: Final = 0.3  # seconds without updates after which a replay is considered complete
#: Messages that are unambiguous for any error code: Gemini CLI uses 500 for all connection errors.
_CERTAIN_PATTERNS: Final[Mapping[str, re.Pattern[str]]] = {
    "transient": re.compile(
        r"fetch failed|\bterminated$|ECONN(?:REFUSED|RESET)|ENOTFOUND|ETIMEDOUT|EAI_AGAIN|socket hang up"
        r"|premature close|cannot connect to api|unable to connect|connection (?:error|refused|was closed)",
        re.IGNORECASE,
    ),
    "limit": re.compile(
        r"prompt is too long|token count .*exceeds|context length|context window|output token maximum", re.IGNORECASE
    ),
}
_STATUS: Final = re.compile(r"\bAPI Error: ([45]\d\d)\b")
#: Messages of errors without a code; the first match counts.
_ERROR_PATTERNS: Final[Mapping[str, re.Pattern[str]]] = {
    "rate_limited": re.compile(
        r"rate.?limit|usage.?limit|hit your .*limit|limit (?:reached|exceeded)|too many requests|quota|exhausted"
        r"|\b429\b",
        re.IGNORECASE,
    ),
    "auth": re.compile(r"authenticat|not logged in|/login|api.?key|unauthorized|\b40[13]\b", re.IGNORECASE),
    "overloaded": re.compile(r"overloaded|unavailable|internal server error|\b5(?:00|02|03|29)\b", re.IGNORECASE),
}
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

    def __init__(self, worktree: ConfinedWorktree) -> None:
        self._worktree = worktree
        self.words = MessageBuffer()
        self.refused = ""
        """The last denied permission request, until the agent continues."""
        self._cost: float | None = None
        self._cost_before = 0.0
        self._tools = ToolCalls()
        self._is_listening = False
        self._last_replayed = 0.0

    @property
    def cost(self) -> float | None:
        """US dollars spent since the conversation was loaded, or None if unknown."""
        return None if self._cost is None else max(self._cost - self._cost_before, 0.0)

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
        """Allow a request once unless it contains a path outside the worktree."""
        title, paths = self._tools.describe(tool_call)[1:]
        reason = self._denial_reason(paths)
        wanted = ("allow_once", "allow_always") if reason is None else ("reject_once", "reject_always")
        if reason is not None:
            self.refused = f"not allowed: {title}: {reason}"
            write_line("denied", tool=title, detail=reason, call=tool_call.tool_call_id)
        chosen = next((option for kind in wanted for option in options if option.kind == kind), None)
        if chosen is None:
            return schema.RequestPermissionResponse(outcome=schema.DeniedOutcome(outcome="cancelled"))
        outcome = schema.AllowedOutcome(outcome="selected", option_id=chosen.option_id)
        return schema.RequestPermissionResponse(outcome=outcome)

    def _denial_reason(self, paths: Iterable[str]) -> str | None:
        try:
            for path in paths:
                self._worktree.resolve(path)
        except OutsideWorktreeError as error:
            return str(error)
        return None

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
        try:
            await anyio.to_thread.run_sync(_write, file, content)
        except OSError as error:
            raise acp.RequestError.invalid_params({"details": str(error)}) from None
        return schema.WriteTextFileResponse()

    def _locate(self, path: str) -> Path:
        try:
            return self._worktree.locate(path)
        except OutsideWorktreeError as error:
            write_line("denied", tool="file", detail=str(error), call="")
            raise acp.RequestError.invalid_params({"details": str(error)}) from None


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
        session = await _start_conversation(agent, known, client, top, asked)
        client.listen()
        response = await agent.prompt(session_id=session, prompt=[acp.text_block(prompt)])
    except acp.RequestError as error:
        raise _concluded(error, known.auth_methods or ()) from error
    said = client.words.flush()
    _write_spent(response.usage or _usage_in_metadata(response), client.cost)
    if response.stop_reason in _STOP_REASONS:
        failure, reason = _STOP_REASONS[response.stop_reason]
        return BridgeExit(reason, failure)
    if client.refused:
        return BridgeExit(f"the agent stopped: {client.refused}", "refused")
    return BridgeExit(said[-2_000:])


async def _start_conversation(
    agent: Any, known: schema.InitializeResponse, client: _Client, top: Path, asked: ConversationRequest
) -> str:
    """Start or resume a conversation; return its id."""
    started: schema.NewSessionResponse | schema.LoadSessionResponse
    if asked.resume is None:
        started = await agent.new_session(cwd=str(top), mcp_servers=mcp_servers_for(known, asked.servers))
        session = started.session_id
    else:
        check_can_resume(known)
        session = asked.resume
        started = await _load(agent, session, top, mcp_servers_for(known, asked.servers))
        await client.wait_for_replay()
    write_line("session", id=session)
    if asked.model is not None:
        await choose_model(agent, session, started, asked.model)
    return session


async def _load(agent: Any, session: str, top: Path, servers: Sequence[Any]) -> schema.LoadSessionResponse:
    try:
        return cast(
            "schema.LoadSessionResponse",
            await agent.load_session(cwd=str(top), session_id=session, mcp_servers=servers),
        )
    except acp.RequestError as error:
        if error.code == _AUTH_REQUIRED:
            raise
        # The next session starts a new conversation, which may work.
        raise BridgeExit(
            f"the agent can't load the conversation {session}: {_error_text(error)}", "transient"
        ) from error


def _usage_in_metadata(response: schema.PromptResponse) -> schema.Usage | None:
    """Return the tokens in Gemini CLI's protocol extension, or None."""
    try:
        count = (response.field_meta or {})["quota"]["token_count"]
        sent, received = count["input_tokens"], count["output_tokens"]
        return schema.Usage(input_tokens=sent, output_tokens=received, total_tokens=sent + received)
    except (LookupError, TypeError, ValueError):
        return None


def _write_spent(usage: schema.Usage | None, cost: float | None) -> None:
    if usage is not None or cost is not None:
        read = 0 if usage is None else usage.input_tokens + (usage.cached_read_tokens or 0)
        sent = read if usage is None else read + (usage.cached_write_tokens or 0)
        write_line("spent", input_tokens=sent, output_tokens=0 if usage is None else usage.output_tokens, cost=cost)


def _concluded(error: acp.RequestError, methods: Sequence[Any]) -> BridgeExit:
    message = _error_text(error)
    failure = "auth" if error.code == _AUTH_REQUIRED else _failure(error.code, message)
    if failure != "auth":
        return BridgeExit(f"the agent reports: {message}", failure)
    ways = ", ".join(method.name for method in methods)
    return BridgeExit(f"the agent reports: {message}: log in with the agent{f' ({ways})' if ways else ''}", failure)


def _error_text(error: acp.RequestError) -> str:
    details = error.data.get("details") or error.data.get("message") if isinstance(error.data, dict) else error.data
    said = _message_in(str(error))
    return " ".join(f"{said}{f': {details}' if isinstance(details, str) and details else ''}".split())[:300]


def _message_in(text: str) -> str:
    """Return the message in an API's JSON error, or any other text unchanged."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return text
    return message if isinstance(message, str) else text


def _failure(code: int, message: str) -> str:
    """Return the failure class of an error code, which may be an HTTP status."""
    found = _STATUS.search(message)
    status = int(found[1]) if found is not None else code if code < 600 else 0
    by_status = failure_name_for_status(status)
    return _named(_CERTAIN_PATTERNS, message) or by_status or _named(_ERROR_PATTERNS, message) or "crashed"


def _named(patterns: Mapping[str, re.Pattern[str]], message: str) -> str | None:
    return next((name for name, pattern in patterns.items() if pattern.search(message)), None)


async def _run(argv: Sequence[str], worktree: ConfinedWorktree, prompt: str, asked: ConversationRequest) -> BridgeExit:
    client = _Client(worktree)
    # It inherits our standard error, because an unread pipe would block it.
    streams = {"stderr": None, "limit": _LONGEST_MESSAGE}
    async with AsyncExitStack() as stack:
        # The client implements part of the protocol: no terminals and no forms.
        side = cast("acp.Client", client)
        spawned = acp.spawn_agent_process(side, *argv, env=os.environ, cwd=worktree.top, transport_kwargs=streams)
        try:
            agent, process = await stack.enter_async_context(spawned)
        except OSError as error:
            return BridgeExit(f"the agent {argv[0]!r} can't be started: {error.strerror}", "invalid")
        try:
            return await _run_conversation(agent, client, worktree.top, prompt, asked)
        except BridgeExit as concluded:
            return concluded
        except acp.RequestError as error:
            return _concluded(error, ())
        except ConnectionError:
            client.words.flush()
            with anyio.move_on_after(_PATIENCE):
                await process.wait()
            code = "it closed its output" if process.returncode is None else f"exit code {process.returncode}"
            return BridgeExit(f"the agent ended before its response was complete ({code})", "crashed")
        except ValueError as error:  # pydantic's
            return BridgeExit(f"the agent's response violates the protocol: {str(error)[:300]}", "crashed")
    raise AssertionError("no exception is suppressed")


def main() -> int:
    """Run one conversation; return 0 on success, otherwise 1."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--prompt-file", type=Path)
    parser.add_argument("--worktree", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--resume")
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
    asked = ConversationRequest(options.model, options.resume, options.mcp_server)
    try:
        return anyio.run(_run, options.argv, ConfinedWorktree(options.worktree), prompt, asked).report()
    except KeyboardInterrupt:  # the agent has already exited
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
        raise


if __name__ == "__main__":
    sys.exit(main())
