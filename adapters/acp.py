"""Adapter for agents that use the Agent Client Protocol, run by a bridge.

Not a profile: it speaks a protocol, by a bridge.

# https://agentclientprotocol.com
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
from adapters.opencode import limit_config, limit_plugin, parse_limit, read_given_config
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

# Known agents: run as a single process, without updates, and with few retries, because the scheduler retries.
_PRESET: Final = {
    "CLAUDE_CODE_MAX_RETRIES": "3",
    "DISABLE_AUTOUPDATER": "1",
    "GEMINI_CLI_NO_RELAUNCH": "true",
    "GEMINI_CLI_TRUST_WORKSPACE": "true",  # otherwise it ignores the instructions in new worktrees
    "QWEN_CODE_NO_RELAUNCH": "true",
}
_INSTALL: Final = "`pip install 'cli-council[acp]'` into the environment of `council`"


class AcpOptions(AdapterOptions):
    """Options of an adapter with `use: acp`."""

    argv: CommandLine
    """The agent and its arguments, such as `[gemini, --acp]`; it communicates on standard input and output."""
    model: OptionValue | None = None
    """One of the models that the agent offers; by default, the agent chooses."""
    resumes: bool = False
    """Whether the agent can load earlier conversations, so that a retry continues the failed one."""

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.resumes and not self.has_own_home:
            raise ValueError("`resumes` needs a folder per task that keeps conversations: set `home: own`")
        if _is_opencode(self):
            read_given_config(self)
        return self


def _is_opencode(options: AcpOptions) -> bool:
    return PurePath(options.argv[0]).name == "opencode"


class AcpAdapter:
    """Runs the bridge, which starts the agent and communicates with it."""

    Options: ClassVar[type[BaseModel]] = AcpOptions

    def __init__(self, options: AcpOptions, /) -> None:
        self._options = options

    def capabilities(self) -> frozenset[Capability]:
        """Return the capabilities; only a running agent reports whether it can resume."""
        return frozenset({Capability.MCP, Capability.RESUME} if self._options.resumes else {Capability.MCP})

    def programs(self) -> Sequence[Program]:
        """Return the bridge, which checks for the SDK, and the agent."""
        bridge = bridge_command("acp", "--ready")
        return (
            Program(sys.executable, ready=bridge[1:], log_in=_INSTALL),
            Program(self._options.argv[0], install="install the agent, or correct `argv`"),
        )

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return the bridge's command line, followed by `--` and the agent's."""
        paths = ("--prompt-file", str(request.prompt_file), "--worktree", str(request.worktree))
        is_opencode = _is_opencode(self._options)
        files = limit_plugin("stderr") if is_opencode else {}
        preset = {**_PRESET, **own_home_variables(self._options, request)}
        env, passed = self._options.variables(("HOME", "USER"), **preset)
        env = {**env, **limit_config(self._options, request.home)} if is_opencode else env
        return SessionCommand(
            argv=bridge_command(
                *("acp", *paths, *option_arguments("--model", self._options.model)),
                *(*_asked(request, resumes=self._options.resumes), "--", *self._options.argv),
            ),
            env=env,
            pass_env=passed,
            readable=bridge_readable_paths(),
            home=SessionHome(files) if self._options.has_own_home or files else None,
        )

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return the events in a line printed by the bridge."""
        return parse_bridge_line(line)

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return the failure in the bridge's result, with a limit's reset time if known."""
        return with_reset_time(parse_limit(end.stderr) or concluded_failure(end), end.time)


def _asked(request: SessionRequest, *, resumes: bool) -> Iterator[str]:
    if resumes:
        yield from option_arguments("--resume", request.resume)
    for server in request.mcp_servers:
        yield from ("--mcp-server", json.dumps(dataclasses.asdict(server)))


@hookimpl
def council_register_adapters(register: RegisterAdapter) -> None:
    """Register `use: acp`."""
    register("acp", AcpAdapter)
