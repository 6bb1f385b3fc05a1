"""Adapters for agents that use the Agent Client Protocol, run by a bridge.

Not a profile: it speaks a protocol, by a bridge.

# https://agentclientprotocol.com
adapters:
  gemini: {use: gemini, acp: true}       # a CLI that supports it, with the options of its adapter
  other: {use: acp, argv: [other, --acp], env: [OTHER_API_KEY]}
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal, Protocol, Self, cast

import pluggy
from pydantic import BaseModel, model_validator

from adapters.bridges.lines import DENIED_BY_MODE
from adapters.failures import make_failure
from adapters.json_output import bridge_command, bridge_readable_paths, concluded_failure, parse_bridge_line
from adapters.options import AdapterOptions, CommandLine, OptionValue, option_arguments, own_home_variables
from adapters.rate_limits import parse_limit, with_reset_time
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterAdapter
from orchestrator.protocols import (
    Adapter,
    Capability,
    FinalResult,
    Program,
    SessionCommand,
    SessionEnd,
    SessionEvent,
    SessionHome,
    SessionRequest,
    ToolDenied,
)

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)

# Known agents: run as a single process, without updates, and with few retries, because the scheduler retries.
_PRESET: Final = {
    "CLAUDE_CODE_MAX_RETRIES": "3",
    "DISABLE_AUTOUPDATER": "1",
    "GEMINI_CLI_NO_RELAUNCH": "true",
    "GEMINI_CLI_TRUST_WORKSPACE": "true",  # otherwise it ignores the instructions in new worktrees
    "QWEN_CODE_NO_RELAUNCH": "true",
}
_INSTALL: Final = "`pip install 'cli-council[acp]'` into the environment of `council`"
#: What the bridge enforces by its responses to an agent that asks for permission before each edit.
ENFORCED: Final = frozenset({Capability.PRE_EDIT, Capability.READ_ONLY})


@dataclass(frozen=True, slots=True)
class Agent:
    """How a CLI runs as an agent of the protocol."""

    program: Program
    permissions: Literal["all", "edits"] = "all"
    """Which requests for permission are allowed."""
    remedy: str = ""
    """How to allow the others."""
    auth: str | None = None
    """The agent's method to log in, if it must be chosen."""
    model: str | None = None
    """The model to choose by the protocol."""
    resumes: bool = True
    """Whether it can load an earlier conversation."""
    enforced: frozenset[Capability] = ENFORCED
    """The capabilities of the bridge, or of the CLI's own hooks, that apply to it."""
    failure_in_answer: Callable[[str], Failed | None] = lambda _: None
    """Returns the failure that it reports as its last message, after a turn without an error."""


class AgentCli(Protocol):
    """A CLI that can run as an agent."""

    def agent(self) -> Agent:
        """Return the facts about the agent."""

    def agent_command(self, request: SessionRequest) -> SessionCommand:
        """Return the command that starts the agent, without what the protocol passes to it."""


class AgentAdapter:
    """Runs the bridge, which starts an agent and communicates with it."""

    def __init__(self, cli: AgentCli) -> None:
        self._cli, self._agent = cli, cli.agent()

    def capabilities(self) -> frozenset[Capability]:
        """Return the capabilities of the bridge and the agent."""
        can = self._agent.enforced | {Capability.MCP, Capability.STOP_GATE}
        return can | {Capability.RESUME} if self._agent.resumes else can

    def programs(self) -> Sequence[Program]:
        """Return the bridge, which checks for the SDK, and the agent."""
        bridge = bridge_command("acp", "--ready")
        return Program(sys.executable, ready=bridge[1:], log_in=_INSTALL), self._agent.program

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return the bridge's command line, followed by `--` and the agent's."""
        own = replace(
            request,
            resume=None,
            interactive=False,
            read_only=False,
            instructions=None,
            mcp_servers=(),
            max_cost=None,
            post_tool=(),
            stop_gate=(),
        )
        started = self._cli.agent_command(own)
        return replace(
            started,
            argv=bridge_command("acp", *self._arguments(request), "--", *started.argv),
            stdin=None,
            readable=(*started.readable, *bridge_readable_paths()),
            interrupt=True,  # the bridge cancels the agent's turn
        )

    def _arguments(self, request: SessionRequest) -> Iterator[str]:
        agent = self._agent
        yield from ("--prompt-file", str(request.prompt_file), "--worktree", str(request.worktree))
        yield from option_arguments("--model", agent.model)
        yield from option_arguments("--auth", agent.auth)
        yield from option_arguments("--permissions", None if agent.permissions == "all" else agent.permissions)
        yield from option_arguments("--resume", request.resume if agent.resumes else None)
        if request.read_only and Capability.READ_ONLY in agent.enforced:
            yield "--read-only"
        if request.pre_edit and Capability.PRE_EDIT in agent.enforced:
            yield from ("--pre-edit", json.dumps(request.pre_edit))
        if request.stop_gate:
            yield from ("--stop-gate", json.dumps(request.stop_gate))
        for server in request.mcp_servers:
            yield from ("--mcp-server", json.dumps(dataclasses.asdict(server)))

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return the events in a line printed by the bridge."""
        return tuple(map(self._with_remedy, parse_bridge_line(line)))

    def _with_remedy(self, event: SessionEvent) -> SessionEvent:
        if isinstance(event, ToolDenied) and event.detail == DENIED_BY_MODE:
            return replace(event, remedy=self._agent.remedy)
        return event

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return the failure in the bridge's result, with a limit's reset time if known."""
        failed = parse_limit(end.stderr) or concluded_failure(end)
        if failed is None and end.events and isinstance(last := end.events[-1], FinalResult):
            failed = self._agent.failure_in_answer(last.text.strip())
        failed = with_reset_time(failed, end.time)
        log_in = self._agent.program.log_in
        if failed is None or failed.failure is not FailureClass.AUTH or not log_in:
            return failed
        return make_failure(failed.failure, failed.reason, log_in)


class AgentChoice:
    """The type of an adapter with the option `acp`, which runs the same CLI as an agent."""

    def __init__(self, cli_type: Callable[[Any], AgentCli], options_type: type[BaseModel]) -> None:
        """Run the adapter that `cli_type` makes, or an agent, with options of `options_type`."""
        self._make, self.Options = cli_type, options_type

    def __call__(self, options: Any, /) -> Adapter:
        """Create the adapter."""
        cli = self._make(options)
        return AgentAdapter(cli) if options.acp else cast("Adapter", cli)


class AcpOptions(AdapterOptions):
    """Options of an adapter with `use: acp`."""

    argv: CommandLine
    """The agent and its arguments, such as `[gemini, --acp]`; it communicates on standard input and output."""
    model: OptionValue | None = None
    """One of the models that the agent offers; by default, the agent chooses."""
    auth: OptionValue | None = None
    """The id of the agent's method to log in, such as `gemini-api-key`; by default, one that needs only a key."""
    permissions: Literal["all", "edits"] = "all"
    """Which requests for permission are allowed: all in the worktree, or only edits, without commands."""
    resumes: bool = False
    """Whether the agent can load earlier conversations, so that a retry continues the failed one."""

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.resumes and not self.has_own_home:
            raise ValueError("`resumes` needs a folder per task that keeps conversations: set `home: own`")
        return self


class _AnyAgent:
    """Any agent, in the user's configuration."""

    def __init__(self, options: AcpOptions) -> None:
        self._options = options

    def agent(self) -> Agent:
        """See `AgentCli`."""
        options = self._options
        return Agent(
            Program(options.argv[0], install="install the agent, or correct `argv`"),
            permissions=options.permissions,
            remedy="set `permissions: all` for its adapter (intended for sandboxed sessions)",
            auth=options.auth,
            model=options.model,
            resumes=options.resumes,
        )

    def agent_command(self, request: SessionRequest) -> SessionCommand:
        """See `AgentCli`."""
        preset = {**_PRESET, **own_home_variables(self._options, request)}
        env, passed = self._options.variables(("HOME", "USER"), **preset)
        home = SessionHome() if self._options.has_own_home else None
        return SessionCommand(self._options.argv, env=env, pass_env=passed, home=home)


class AcpAdapter(AgentAdapter):
    """Runs any agent."""

    Options: ClassVar[type[BaseModel]] = AcpOptions

    def __init__(self, options: AcpOptions, /) -> None:
        super().__init__(_AnyAgent(options))


@hookimpl
def council_register_adapters(register: RegisterAdapter) -> None:
    """Register `use: acp`."""
    register("acp", AcpAdapter)
