"""Adapter for Ollama models, which have no tools, run by a bridge.

Not a profile: it is a server without tools, whose responses a bridge applies.

See https://docs.ollama.com/api. The bridge sends the task with a list of files and as many file contents as fit, and
applies the model's response.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, ClassVar, Final
from urllib.parse import urlsplit

import pluggy
from pydantic import AfterValidator, BaseModel, Field

from adapters.json_output import bridge_command, bridge_readable_paths, concluded_failure, parse_bridge_line
from adapters.options import INSTRUCTIONS_FILE, AdapterOptions, OptionValue
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

_KEYS: Final = ("OLLAMA_API_KEY",)


def _check_host(host: str) -> str:
    try:
        parts = urlsplit(host)
        is_url = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
        has_login = parts.username is not None
    except ValueError:
        is_url = has_login = False
    if not is_url or "\0" in host:
        raise ValueError(f"{host[:60]!r} is not an address: write one such as http://127.0.0.1:11434")
    if has_login:
        raise ValueError("the address contains a user name or password: set OLLAMA_API_KEY instead")
    return host


class OllamaOptions(AdapterOptions):
    """Options of an adapter with `use: ollama`."""

    model: OptionValue
    """The model, as named by `ollama list`."""
    host: Annotated[str, AfterValidator(_check_host)] = "http://127.0.0.1:11434"
    """The server's address."""
    context: Annotated[int, Field(ge=2048, le=1_048_576)] = 32_768
    """The model's context in tokens (`num_ctx`), of which half is for the prompt, including files."""


class OllamaAdapter:
    """Runs the bridge, which sends requests to the server and applies the response."""

    Options: ClassVar[type[BaseModel]] = OllamaOptions

    def __init__(self, options: OllamaOptions, /) -> None:
        self._options = options

    def capabilities(self) -> frozenset[Capability]:
        """Return the capabilities."""
        return frozenset({Capability.INSTRUCTIONS, Capability.READ_ONLY})

    def programs(self) -> Sequence[Program]:
        """Return the bridge, which checks for the client, the server and the model."""
        ready = bridge_command("ollama", *self._server(), "--ready")
        remedy = (
            f"`pip install 'cli-council[ollama]'` into the environment of `council`, start `ollama serve` at "
            f"{self._options.host}, and `ollama pull {self._options.model}`"
        )
        # No keys, because a key does not show that the server is reachable.
        return (Program(sys.executable, ready=ready[1:], log_in=remedy),)

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return the bridge's command line."""
        paths = ("--prompt-file", str(request.prompt_file), "--worktree", str(request.worktree))
        more = () if request.instructions is None else ("--instructions-file", str(request.home / INSTRUCTIONS_FILE))
        more = (*more, "--read-only") if request.read_only else more
        env, passed = self._options.variables(_KEYS)
        return SessionCommand(
            argv=bridge_command(*("ollama", *self._server(), *paths, "--context", str(self._options.context), *more)),
            env=env,
            pass_env=passed,
            readable=bridge_readable_paths(),
            home=None if request.instructions is None else SessionHome({INSTRUCTIONS_FILE: request.instructions}),
        )

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return the events in a line printed by the bridge."""
        return parse_bridge_line(line)

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return the failure in the bridge's result."""
        return with_reset_time(concluded_failure(end), end.time)

    def _server(self) -> tuple[str, ...]:
        return ("--host", self._options.host, "--model", self._options.model)


@hookimpl
def council_register_adapters(register: RegisterAdapter) -> None:
    """Register `use: ollama`."""
    register("ollama", OllamaAdapter)
