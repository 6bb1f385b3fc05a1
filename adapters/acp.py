"""Any agent that speaks the Agent Client Protocol (https://agentclientprotocol.com), through a bridge of ours.

adapters:
  gemini:
    use: acp
    argv: [gemini, --acp]
    env: [GEMINI_API_KEY]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import ClassVar, Final, Self

import pluggy
from pydantic import BaseModel, model_validator

from adapters.json_output import bridge_command, bridge_readable_paths, concluded_failure, parse_bridge_line
from adapters.opencode import limit_config, limit_plugin, parse_limit
from adapters.options import AdapterOptions, CommandLine, OptionValue, option_arguments, own_home_variables
from adapters.rate_limits import with_reset_time
from orchestrator.domain.runs.outcome import Failed
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterAdapter
from orchestrator.protocols import (
    Capability,
    Program,
    SessionCommand,
    SessionEnd,
    SessionEvent,
    SessionHome,
    SessionRequest,
)

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)

# What the agents that are known need to be one process, to stay what they are, and to leave trying again to us.
_PRESET: Final = {
    "CLAUDE_CODE_MAX_RETRIES": "3",
    "DISABLE_AUTOUPDATER": "1",
    "GEMINI_CLI_NO_RELAUNCH": "true",
    "GEMINI_CLI_TRUST_WORKSPACE": "true",  # else it leaves out what the project tells it, as in all new worktrees
    "QWEN_CODE_NO_RELAUNCH": "true",
}
_INSTALL: Final = "`pip install 'cli-council[acp]'` into the environment of `council`"


class AcpOptions(AdapterOptions):
    """What stands under an adapter that says `use: acp`."""

    argv: CommandLine
    """The agent and its arguments, such as `[gemini, --acp]`; it speaks on standard input and output."""
    model: OptionValue | None = None
    """The model, one of those that the agent offers; none: the agent's own choice."""
    resumes: bool = False
    """Whether the agent can load earlier conversations, so that work is mended in the one in which it was done."""

    @model_validator(mode="after")
    def _check_resumes(self) -> Self:
        if self.resumes and not self.has_own_home:
            raise ValueError(
                "`resumes` needs conversations that are kept, which are those in a home of the task's: set `home: own`"
            )
        return self


class AcpAdapter:
    """Runs the bridge, which starts the agent and answers it."""

    Options: ClassVar[type[BaseModel]] = AcpOptions

    def __init__(self, options: AcpOptions, /) -> None:
        self._options = options

    def capabilities(self) -> frozenset[Capability]:
        """Return what it can; whether its agent loads conversations only the agent knows, once it runs."""
        return frozenset({Capability.MCP, Capability.RESUME} if self._options.resumes else {Capability.MCP})

    def programs(self) -> Sequence[Program]:
        """Return the bridge, which can say whether its SDK is installed, and the agent."""
        bridge = bridge_command("acp", "--ready")
        return (
            Program(sys.executable, ready=bridge[1:], log_in=_INSTALL),
            Program(self._options.argv[0], install="install the agent, or correct `argv`"),
        )

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return the bridge's command line, with the agent's after `--`."""
        places = ("--prompt-file", str(request.prompt_file), "--worktree", str(request.worktree))
        is_opencode = PurePath(self._options.argv[0]).name == "opencode"
        files = limit_plugin("stderr") if is_opencode else {}
        limit = {"OPENCODE_CONFIG_CONTENT": limit_config(request.home)} if is_opencode else {}
        preset = {**_PRESET, **limit, **own_home_variables(self._options, request)}
        env, passed = self._options.variables(("HOME", "USER"), **preset)
        return SessionCommand(
            argv=bridge_command(
                *("acp", *places, *option_arguments("--model", self._options.model)),
                *(*_asked(request, resumes=self._options.resumes), "--", *self._options.argv),
            ),
            env=env,
            pass_env=passed,
            readable=bridge_readable_paths(),
            home=SessionHome(files) if self._options.has_own_home or files else None,
        )

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return what a line of the bridge means."""
        return parse_bridge_line(line)

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return what the bridge concluded; a limit with its end, if the agent says when that is."""
        return with_reset_time(parse_limit(end.stderr) or concluded_failure(end), end.time)


def _asked(request: SessionRequest, *, resumes: bool) -> Iterator[str]:
    if resumes:
        yield from option_arguments("--resume", request.resume)
    for one in request.mcp_servers:
        yield from ("--mcp-server", json.dumps(dataclasses.asdict(one)))


@hookimpl
def council_register_adapters(register: RegisterAdapter) -> None:
    """Register `use: acp`."""
    register("acp", AcpAdapter)
