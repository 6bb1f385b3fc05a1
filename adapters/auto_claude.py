"""Adapter for Auto-Claude, run by a bridge.

Not a profile: it consists of two programs of a clone, which keep the verdict and the usage in files; an exit code of 0
does not mean success; and its files have to be excluded from commits before it starts.

See https://github.com/AndyMik90/Auto-Claude/blob/develop/guides/CLI-USAGE.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

import pluggy
from pydantic import AfterValidator, BaseModel

from adapters.bridges.auto_claude import OWN_FILES
from adapters.json_output import bridge_command, bridge_readable_paths, concluded_failure, parse_bridge_line
from adapters.options import AdapterOptions, OptionValue, ProgramName, check_argument, option_arguments
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

#: It accepts no API key.
_KEYS: Final = ("CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_AUTH_TOKEN")
_PRESET: Final = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_MAX_RETRIES": "3",
    "DISABLE_AUTOUPDATER": "1",
    "GRAPHITI_ENABLED": "false",  # its memory needs a key of another provider
    "PYTHONUNBUFFERED": "1",
}


def _check_folder(path: str) -> str:
    if not Path(check_argument(path)).is_absolute():
        raise ValueError(f"{path[:60]!r} is not an absolute path: write the folder with its run.py")
    return path


class AutoClaudeOptions(AdapterOptions):
    """Options of an adapter with `use: auto-claude`."""

    path: Annotated[str, AfterValidator(_check_folder)]
    """The folder with its `run.py`, such as `/home/me/Auto-Claude/apps/backend`."""
    python: ProgramName | None = None
    """The Python with its requirements; by default that of `.venv` in the folder."""
    model: OptionValue | None = None
    """The model, as in `--model`; by default, its own choice for each phase."""
    complexity: Literal["simple", "standard", "complex"] | None = None
    """The number of phases of a spec; by default, a model decides."""
    qa: bool = True
    """Whether its QA reviews the build and must approve it."""
    home: Literal["own", "shared"] = "own"
    """The location of settings and conversations: a folder per task, or yours."""


class AutoClaudeAdapter:
    """Runs the bridge, which has a spec written, built and reviewed."""

    Options: ClassVar[type[BaseModel]] = AutoClaudeOptions

    def __init__(self, options: AutoClaudeOptions, /) -> None:
        self._options = options

    def capabilities(self) -> frozenset[Capability]:
        """Return no capabilities."""
        return frozenset()

    def programs(self) -> Sequence[Program]:
        """Return its Python, which checks for its requirements."""
        remedy = f"clone https://github.com/AndyMik90/Auto-Claude, and install the requirements in {self._options.path}"
        ready = (str(Path(self._options.path) / "run.py"), "--help")
        return (Program(self._python, install=remedy, ready=ready, log_in=remedy, verified=()),)

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return the bridge's command line; each attempt has a spec of its own."""
        options = self._options
        own = {"HOME": str(request.home), "CLAUDE_CONFIG_DIR": str(request.home / ".claude")}
        is_own = options.has_own_home
        env, passed = options.variables(
            ("HOME", "USER", *_KEYS, "ANTHROPIC_BASE_URL", *(() if is_own else ("CLAUDE_CONFIG_DIR",))),
            **_PRESET,
            **(own if is_own else {}),
        )
        return SessionCommand(
            argv=bridge_command(
                *("auto_claude", "--program", options.path, "--python", self._python),
                *("--prompt-file", str(request.prompt_file), "--worktree", str(request.worktree)),
                *("--spec", f"{request.attempt:03}-task"),
                *option_arguments("--model", options.model),
                *option_arguments("--complexity", options.complexity),
                *(() if options.qa else ("--skip-qa",)),
            ),
            env=env,
            pass_env=passed,
            readable=(*bridge_readable_paths(), Path(options.path)),
            scratch_patterns=OWN_FILES,
            home=SessionHome() if is_own else None,
            interrupt=True,
        )

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return the events in a line printed by the bridge."""
        return parse_bridge_line(line)

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return the failure in the bridge's result, with a limit's reset time if known."""
        return with_reset_time(concluded_failure(end), end.time)

    @property
    def _python(self) -> str:
        return self._options.python or str(Path(self._options.path) / ".venv/bin/python")


@hookimpl
def council_register_adapters(register: RegisterAdapter) -> None:
    """Register `use: auto-claude`."""
    register("auto-claude", AutoClaudeAdapter)
