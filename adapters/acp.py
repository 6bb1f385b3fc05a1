"""Any agent that speaks the Agent Client Protocol (https://agentclientprotocol.com), through a bridge of ours.

adapters:
  gemini:
    use: acp
    argv: [gemini, --acp]
    env: [GEMINI_API_KEY]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import ClassVar, Final

import pluggy
from pydantic import BaseModel

from adapters.jsonlines import bridge_command, bridge_readable, failure_concluded, parse_bridge_line
from adapters.options import AdapterOptions, CommandLine, Value, own_home
from orchestrator.domain.outcome import Failed
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterAdapter
from orchestrator.protocols import Capability, Command, Home, Program, SessionEnd, SessionEvent, SessionRequest

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
    model: Value | None = None
    """The model, one of those that the agent offers; none: the agent's own choice."""


class AcpAdapter:
    """Runs the bridge, which starts the agent and answers it."""

    Options: ClassVar[type[BaseModel]] = AcpOptions

    def __init__(self, options: AcpOptions, /) -> None:
        self._options = options

    def capabilities(self) -> frozenset[Capability]:
        """Return nothing."""
        return frozenset()

    def programs(self) -> Sequence[Program]:
        """Return the bridge, which can say whether its SDK is installed, and the agent."""
        bridge = bridge_command("acp", "--ready")
        return (
            Program(sys.executable, ready=bridge[1:], log_in=_INSTALL),
            Program(self._options.argv[0], install="install the agent, or correct `argv`"),
        )

    def command(self, request: SessionRequest) -> Command:
        """Return the bridge's command line, with the agent's after `--`."""
        model = () if self._options.model is None else ("--model", self._options.model)
        places = ("--prompt-file", str(request.prompt_file), "--worktree", str(request.worktree))
        env, passed = self._options.variables(("HOME", "USER"), **_PRESET, **own_home(self._options, request))
        return Command(
            argv=bridge_command("acp", *places, *model, "--", *self._options.argv),
            env=env,
            pass_env=passed,
            readable=bridge_readable(),
            home=Home() if self._options.has_own_home else None,
        )

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return what a line of the bridge means."""
        return parse_bridge_line(line)

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return what the bridge concluded."""
        return failure_concluded(end)


@hookimpl
def council_register_adapters(register: RegisterAdapter) -> None:
    """Register `use: acp`."""
    register("acp", AcpAdapter)
