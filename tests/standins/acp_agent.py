"""An agent that speaks the Agent Client Protocol, built on the agent's side of the SDK.

Steps: `write PATH TEXT` (by asking us to), `edit PATH TEXT` (itself, after asking leave), `read PATH`, `say TEXT`,
`work` (in the worktree itself, after asking leave), `fail auth|limit|die|refuse`, `fail CODE MESSAGE`; `stop PATH` is
`edit`, and the end where it is refused. What it was answered it says. With ACP_BESIDE it tells its tokens as Gemini
CLI does.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any, cast

import acp
from acp import schema

from tests.standins.script import steps, write

OPTIONS = [
    schema.PermissionOption(option_id="always", name="Always", kind="allow_always"),
    schema.PermissionOption(option_id="once", name="Once", kind="allow_once"),
    schema.PermissionOption(option_id="no", name="No", kind="reject_once"),
]


class Agent:
    """Does what the prompt says."""

    def __init__(self) -> None:
        self.client: Any = None
        self.cwd = Path()
        self.model = "small"
        self.reads_by_client = False

    def on_connect(self, client: Any) -> None:
        self.client = client

    async def initialize(
        self, protocol_version: int, client_capabilities: schema.ClientCapabilities | None = None, **_: Any
    ) -> schema.InitializeResponse:
        files = client_capabilities.fs if client_capabilities else None
        self.reads_by_client = bool(files and files.read_text_file)
        methods = [schema.AuthMethodAgent(id="login", name="agent login")]
        version = int(os.environ.get("ACP_VERSION", protocol_version))
        return schema.InitializeResponse(protocol_version=version, auth_methods=methods)

    async def new_session(self, cwd: str, **_: Any) -> schema.NewSessionResponse:
        if "ACP_LOGGED_OUT" in os.environ:
            raise acp.RequestError.auth_required()
        self.cwd = Path(cwd)
        models = [schema.SessionConfigSelectOption(value=name, name=name) for name in ("small", "large")]
        option = schema.SessionConfigOptionSelect(
            id="m", name="Model", category="model", type="select", current_value="small", options=models
        )
        return schema.NewSessionResponse(session_id="s-1", config_options=[option])

    async def set_config_option(self, config_id: str, session_id: str, value: str | bool, **_: Any) -> Any:
        assert (config_id, session_id) == ("m", "s-1")
        self.model = str(value)
        return schema.SetSessionConfigOptionResponse(config_options=[])

    async def prompt(self, session_id: str, prompt: list[Any], **_: Any) -> schema.PromptResponse:
        for word, first, rest in steps(prompt[0].text):
            if word == "fail" and first == "refuse":
                return schema.PromptResponse(stop_reason="refusal")
            if word == "stop":
                await self.request_leave(session_id, self.at(first))
                return schema.PromptResponse(stop_reason="end_turn")
            await self.step(session_id, word, first, rest)
        await self.client.session_update(
            session_id,
            schema.UsageUpdate(
                session_update="usage_update", used=1, size=2, cost=schema.Cost(amount=0.5, currency="USD")
            ),
        )
        if "ACP_BESIDE" in os.environ:
            count = {"token_count": {"input_tokens": 40, "output_tokens": 20}}
            return schema.PromptResponse(stop_reason="end_turn", field_meta={"quota": count})
        usage = schema.Usage(total_tokens=60, input_tokens=10, output_tokens=20, cached_read_tokens=30)
        return schema.PromptResponse(stop_reason="end_turn", usage=usage)

    async def step(self, session: str, word: str, first: str, rest: str) -> None:
        match word, first:
            case "write", _:
                await self.write(session, self.at(first), rest + "\n")
            case "read", _:
                await self.ask(
                    session, self.client.read_text_file(session_id=session, path=self.at(first), line=1, limit=1)
                )
            case "edit", _:
                await self.edit(session, self.at(first), rest)
            case "say", _:
                await self.say(session, f"{first} {rest}".replace("MODEL", self.model))
            case "fail", "auth":
                raise acp.RequestError.auth_required()
            case "fail", "limit":
                raise acp.RequestError.internal_error({"details": "429 rate_limit_error: try later"})
            case "fail", code if code.lstrip("-").isdigit():
                raise acp.RequestError(int(code), rest)
            case "work", _:
                await self.say(session, f"chosen: {await self.request_leave(session, self.at('.'))}")
            case "fail", "die":
                sys.stderr.write("x" * 300_000 + "last words")
                sys.stderr.flush()
                os._exit(7)

    async def write(self, session: str, path: str, content: str) -> None:
        """Write as Gemini CLI does: it looks for the file, and does not know the client's answer that there is none."""
        if not self.reads_by_client or Path(path).exists():
            await self.ask(session, self.client.write_text_file(session_id=session, path=path, content=content))

    def at(self, path: str) -> str:
        return str(self.cwd / path)

    async def ask(self, session: str, request: Any) -> None:
        try:
            answer = await request
            await self.say(session, getattr(answer, "content", "") or "done")
        except acp.RequestError as error:
            await self.say(session, f"refused: {error.data}")

    async def edit(self, session: str, path: str, text: str) -> None:
        chosen = await self.request_leave(session, path)
        await self.say(session, f"chosen: {chosen}")
        if chosen == "once":
            write(path, text)

    async def request_leave(self, session: str, path: str) -> str:
        location = schema.ToolCallLocation(path=path)
        start = acp.start_tool_call(path, "Edit a file", kind="edit", status="pending", locations=[location])
        await self.client.session_update(session, start)
        call = schema.ToolCallUpdate(tool_call_id=path, title="Edit a file")
        answer = await self.client.request_permission(session_id=session, tool_call=call, options=OPTIONS)
        return str(answer.outcome.option_id)

    async def say(self, session: str, text: str) -> None:
        for piece in (text[:3], text[3:], "\n"):
            await self.client.session_update(session, acp.update_agent_message_text(piece))

    async def cancel(self, session_id: str, **_: Any) -> None:
        """Nothing to cancel."""


if __name__ == "__main__":
    asyncio.run(acp.run_agent(cast("acp.Agent", Agent())))
