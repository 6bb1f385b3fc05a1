"""A fake agent of the Agent Client Protocol, built on the agent side of the SDK.

Steps: `write PATH TEXT` (by a request to the client), `edit PATH TEXT` (itself, after asking for permission), `read
PATH`, `say TEXT`, `run COMMAND` (reported only), `work` (in the worktree itself, after asking for permission),
`plan STEP…` (reports steps, the first one done), `change PATH TEXT` (itself, reported as a diff),
`servers` (print those it received), `await PATH` (wait for a file), `ask KIND` (for permission for a tool of that
kind), `fail auth|limit|die|refuse`, `fail CODE MESSAGE`; `stop PATH` is `edit`, and ends if it is rejected. It prints
the responses it gets. With ACP_BESIDE it reports its tokens like Gemini CLI.

With ACP_LOADS it stores its conversation, accepts servers by URL, and resumes a conversation: it replays all of it,
some of it late. ACP_MODES are the modes that it offers, ACP_METHODS its login methods; with ACP_LOGGED_OUT it requires
one. `wait` waits until it is cancelled.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any, cast

import acp
from acp import schema

from tests.fakes.script import steps, write

OPTIONS = [
    schema.PermissionOption(option_id="always", name="Always", kind="allow_always"),
    schema.PermissionOption(option_id="once", name="Once", kind="allow_once"),
    schema.PermissionOption(option_id="no", name="No", kind="reject_once"),
]


class FakeAgent:
    """Execute the steps of the prompt."""

    def __init__(self) -> None:
        self.client: Any = None
        self.cwd = Path()
        self.model = "small"
        self.reads_by_client = False
        self.mode = ""
        self.login = ""
        self.cancelled = asyncio.Event()
        self.servers: list[Any] = []
        self.cost = 0.0
        self.late: Any = None

    def on_connect(self, client: Any) -> None:
        self.client = client

    async def initialize(
        self, protocol_version: int, client_capabilities: schema.ClientCapabilities | None = None, **_: Any
    ) -> schema.InitializeResponse:
        files = client_capabilities.fs if client_capabilities else None
        self.reads_by_client = bool(files and files.read_text_file)
        names = {"login": "agent login", "openai": "Use an API key"}
        methods = [
            schema.AuthMethodAgent(id=one, name=names[one]) for one in os.environ.get("ACP_METHODS", "login").split()
        ]
        version = int(os.environ.get("ACP_VERSION", protocol_version))
        loads = "ACP_LOADS" in os.environ
        can = schema.AgentCapabilities(load_session=loads, mcp_capabilities=schema.McpCapabilities(http=loads))
        return schema.InitializeResponse(protocol_version=version, auth_methods=methods, agent_capabilities=can)

    async def authenticate(self, method_id: str, **_: Any) -> schema.AuthenticateResponse:
        self.login = method_id
        return schema.AuthenticateResponse()

    async def new_session(self, cwd: str, mcp_servers: list[Any], **_: Any) -> schema.NewSessionResponse:
        if "ACP_LOGGED_OUT" in os.environ and not self.login:
            raise acp.RequestError.auth_required()
        self.begin(cwd, mcp_servers)
        models = [schema.SessionConfigSelectOption(value=name, name=name) for name in ("small", "large")]
        option = schema.SessionConfigOptionSelect(
            id="m", name="Model", category="model", type="select", current_value="small", options=models
        )
        return schema.NewSessionResponse(session_id="s-1", config_options=[option], modes=self.modes())

    async def load_session(
        self, cwd: str, session_id: str, mcp_servers: list[Any], **_: Any
    ) -> schema.LoadSessionResponse:
        self.begin(cwd, mcp_servers)
        if not self.kept.exists():
            raise acp.RequestError.internal_error({"details": f"no session {session_id}"})
        before = self.kept.read_text()
        await self.client.session_update(session_id, acp.update_user_message_text(before))
        await self.say(session_id, f"before: {before}")
        await self.spend(session_id)
        self.late = asyncio.create_task(self.replay_late(session_id))
        return schema.LoadSessionResponse(modes=self.modes())

    async def replay_late(self, session: str) -> None:
        await asyncio.sleep(0.05)
        await self.say(session, "before, told late")

    def begin(self, cwd: str, servers: list[Any]) -> None:
        self.cwd = Path(cwd)
        self.servers = servers

    @property
    def kept(self) -> Path:
        return Path(os.environ["HOME"]) / "acp-agent.txt"

    def modes(self) -> schema.SessionModeState | None:
        modes = [schema.SessionMode(id=one, name=one) for one in os.environ.get("ACP_MODES", "").split()]
        return schema.SessionModeState(current_mode_id=modes[0].id, available_modes=modes) if modes else None

    async def set_session_mode(self, mode_id: str, session_id: str, **_: Any) -> schema.SetSessionModeResponse:
        assert session_id == "s-1"
        self.mode = mode_id
        return schema.SetSessionModeResponse()

    async def set_config_option(self, config_id: str, session_id: str, value: str | bool, **_: Any) -> Any:
        assert (config_id, session_id) == ("m", "s-1")
        self.model = str(value)
        return schema.SetSessionConfigOptionResponse(config_options=[])

    async def prompt(self, session_id: str, prompt: list[Any], **_: Any) -> schema.PromptResponse:
        if self.late is not None:
            await self.late
        if "ACP_LOADS" in os.environ:
            with self.kept.open("a") as file:
                file.write(prompt[0].text)
        for word, first, rest in steps(prompt[0].text):
            if word == "fail" and first == "refuse":
                return schema.PromptResponse(stop_reason="refusal")
            if word == "stop":
                await self.ask_permission(session_id, self.at(first))
                return schema.PromptResponse(stop_reason="end_turn")
            if word == "wait":
                await self.cancelled.wait()
                usage = schema.Usage(total_tokens=9, input_tokens=7, output_tokens=2)
                return schema.PromptResponse(stop_reason="cancelled", usage=usage)
            if word == "run":
                await self.run(session_id, f"{first} {rest}".strip())
                continue
            while word == "await" and not Path(first).exists():
                await asyncio.sleep(0.02)
            await self.step(session_id, word, first, rest)
        await self.spend(session_id)
        if "ACP_BESIDE" in os.environ:
            count = {"token_count": {"input_tokens": 40, "output_tokens": 20}}
            return schema.PromptResponse(stop_reason="end_turn", field_meta={"quota": count})
        usage = schema.Usage(total_tokens=60, input_tokens=10, output_tokens=20, cached_read_tokens=30)
        return schema.PromptResponse(stop_reason="end_turn", usage=usage)

    async def spend(self, session: str) -> None:
        self.cost += 0.5
        cost = schema.Cost(amount=self.cost, currency="USD")
        update = schema.UsageUpdate(session_update="usage_update", used=1, size=2, cost=cost)
        await self.client.session_update(session, update)

    async def step(self, session: str, word: str, first: str, rest: str) -> None:
        match word, first:
            case "write", _:
                await self.write(session, self.at(first), rest + "\n")
            case "read", _:
                await self.ask(
                    session, self.client.read_text_file(session_id=session, path=self.at(first), line=1, limit=1)
                )
            case "say", _:
                await self.say(
                    session,
                    f"{first} {rest}".replace("MODEL", self.model)
                    .replace("MODE", self.mode)
                    .replace("LOGIN", self.login),
                )
            case "ask", _:
                await self.say(session, f"chosen: {await self.ask_permission(session, f'{first}-1', first)}")
            case "edit" | "plan" | "change" as step, _:
                await getattr(self, step)(session, first, rest)
            case "servers", _:
                for one in self.servers:
                    await self.say(session, f"server: {one.model_dump_json(exclude_none=True)}")
            case "fail", _:
                self.fail(first, rest)
            case "work", _:
                await self.say(session, f"chosen: {await self.ask_permission(session, self.at('.'))}")

    def fail(self, how: str, message: str) -> None:
        match how:
            case "auth":
                raise acp.RequestError.auth_required()
            case "limit":
                raise acp.RequestError.internal_error({"details": "429 rate_limit_error: try later"})
            case "die":
                sys.stderr.write("x" * 300_000 + "last words")
                sys.stderr.flush()
                os._exit(7)
            case code:
                raise acp.RequestError(int(code), message)

    async def write(self, session: str, path: str, content: str) -> None:
        """Write like Gemini CLI:

        read the file first, and fail to recognize the client's response for a missing file.
        """
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

    async def run(self, session: str, command: str) -> None:
        """Report a command like opencode: each update has only new fields, the last one not even the command."""
        for update in (
            acp.start_tool_call("r-1", "bash", kind="execute", status="pending"),
            acp.update_tool_call("r-1", title=command, status="in_progress", raw_input={"command": command}),
            acp.update_tool_call("r-1", status="completed", raw_output="done"),
        ):
            await self.client.session_update(session, update)

    async def plan(self, session: str, first: str, rest: str) -> None:
        """Report a plan whose first step is done."""
        entries = [schema.PlanEntry(content=first, priority="medium", status="completed")]
        entries += [schema.PlanEntry(content=step, priority="medium", status="pending") for step in rest.split()]
        await self.client.session_update(session, acp.update_plan(entries))

    async def change(self, session: str, name: str, text: str) -> None:
        """Change a file itself, and report the change later than the call, as Gemini CLI does."""
        path = self.at(name)
        before = Path(path).read_text() if Path(path).exists() else None
        write(path, text)
        start = acp.start_tool_call("c-1", f"Writing to {Path(path).name}", kind="edit", status="pending")
        await self.client.session_update(session, start)
        diff = schema.FileEditToolCallContent(type="diff", path=path, old_text=before, new_text=f"{text}\n")
        await self.client.session_update(session, acp.update_tool_call("c-1", content=[diff]))
        await self.client.session_update(session, acp.update_tool_call("c-1", status="completed"))

    async def edit(self, session: str, name: str, text: str) -> None:
        path = self.at(name)
        chosen = await self.ask_permission(session, path)
        await self.say(session, f"chosen: {chosen}")
        if chosen == "once":
            write(path, text)

    async def ask_permission(self, session: str, path: str, kind: Any = "edit") -> str:
        location = schema.ToolCallLocation(path=path)
        start = acp.start_tool_call(path, "Edit a file", kind=kind, status="pending", locations=[location])
        await self.client.session_update(session, start)
        call = schema.ToolCallUpdate(tool_call_id=path, title="Edit a file")
        answer = await self.client.request_permission(session_id=session, tool_call=call, options=OPTIONS)
        return str(answer.outcome.option_id)

    async def say(self, session: str, text: str) -> None:
        for piece in (text[:3], text[3:], "\n"):
            await self.client.session_update(session, acp.update_agent_message_text(piece))

    async def cancel(self, session_id: str, **_: Any) -> None:
        assert session_id == "s-1"
        self.cancelled.set()


if __name__ == "__main__":
    asyncio.run(acp.run_agent(cast("acp.Agent", FakeAgent())))
