"""Adapter for any program, configured in YAML.

adapters:
  fixer:
    use: command
    argv: [python3, tools/fix.py, "{prompt_file}"]
    env: [HOME, MY_KEY]
    failures:
      auth: not logged in|invalid api key
      rate_limited: 'try again in (?P<seconds>[0-9]+) s'

`read` (`adapters.command.output_rules`) has rules for its output; other keys are named after the program's abilities.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import ClassVar, Final

import pluggy
from pydantic import BaseModel

from adapters.bridges.program import NOT_FOUND_EXIT
from adapters.command.home_files import file_text, fill_json
from adapters.command.options import OPTIONS, REQUESTED, SERVERS_FILE, STDIN_FILE, CommandOptions, SaidClass
from adapters.command.output_rules import MAX_LINE_CHARS, OutputReader
from adapters.command.placeholders import fill_placeholders, placeholder_names
from adapters.json_output import bridge_command, bridge_readable_paths, concluded_failure
from adapters.options import INSTRUCTIONS_FILE, own_home_variables
from adapters.rate_limits import with_reset_time
from orchestrator.client.commands import MCP_SERVER_NAME
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.errors import RefusedError
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterAdapter
from orchestrator.protocols import (
    Capability,
    FinalResult,
    JsonObject,
    McpServer,
    Program,
    SessionCommand,
    SessionEnd,
    SessionEvent,
    SessionHome,
    SessionRequest,
    SettingsOverlay,
)

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)

_LONGEST_REASON: Final = 300
# Linux accepts at most 128 KiB per argument (MAX_ARG_STRLEN, execve(2)); the rest is for the text around it.
_LARGEST_IN_ARGV: Final = 100 * 1024
#: Values that may be long, and other ways to pass them.
_LONG: Final[Mapping[str, str]] = {
    "prompt": "use {prompt_file} in argv, or `prompt: stdin`",
    "instructions": "use {instructions_file} instead of {instructions}",
}
#: The last line of the bridge if the program is missing.
_NOT_FOUND: Final = re.compile(r"^council: (.+) was not found$", re.MULTILINE)
#: The failures after which a program repeats a request: a later end shows that this succeeded.
_REPEATED: Final = frozenset({FailureClass.OVERLOADED, FailureClass.RATE_LIMITED, FailureClass.TRANSIENT})


class CommandAdapter:
    """Runs the program in the options."""

    Options: ClassVar[type[BaseModel]] = CommandOptions

    def __init__(self, options: CommandOptions, /) -> None:
        self._options = options
        self._failure_patterns = {
            failure: re.compile(pattern, re.IGNORECASE) for failure, pattern in options.failures.items()
        }
        self._reader = OutputReader(options.read, options.output == "jsonl", options.model, self._class_in)

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return argv with filled placeholders; placeholders in prompts are not expanded.

        Raises RefusedError if the prompt or the instructions can't be an argument, because they are too long or contain
        a NUL character.
        """
        options, values = self._options, placeholder_values(self._options, request)
        arguments = tuple(self._arguments(request))
        for name in _LONG:
            _check_size(name, values[name], placeholder_names(arguments).count(name))
        argv = fill_placeholders(arguments, values)
        is_attached = request.interactive and options.attach is not None
        bridge = () if is_attached else _bridge_arguments(options, request)
        env, passed = self._variables(request, values)
        home = _home(options, request, values)
        return SessionCommand(
            argv=bridge_command("program", *bridge, "--", *argv) if bridge else argv,
            stdin=request.prompt_file if options.prompt == "stdin" and not is_attached else None,
            env=env,
            pass_env=passed,
            readable=bridge_readable_paths() if bridge else (),
            scratch_patterns=options.scratch,
            home=home if options.has_own_home or home.files or self._uses_home(arguments) else None,
            interrupt=options.interrupt,
        )

    def _arguments(self, request: SessionRequest) -> Iterator[str]:
        """Yield the arguments of a session, with placeholders."""
        return list_arguments(self._options, request)

    def _variables(
        self,
        request: SessionRequest,
        values: Mapping[str, str],  # noqa: ARG002  for subclasses
    ) -> tuple[Mapping[str, str], tuple[str, ...]]:
        """Return the variables to set, and the names of those to pass on."""
        return self._options.variables(**own_home_variables(self._options, request))

    def _uses_home(self, arguments: Sequence[str]) -> bool:
        return "home" in placeholder_names(arguments) or self._options.result_file is not None

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return the failure by `read`, or the first match of `failures`, last line first.

        A group named `seconds`, or `until` (an ISO 8601 time, or seconds since the epoch), is the reset time of a
        limit.
        """
        if (missing := self._missing_program(end)) is not None:
            return missing
        failed, awaited = concluded_failure(end), self._reader.awaited
        has_ended = any(isinstance(event, FinalResult) for event in end.events)
        if failed is None or failed.failure is FailureClass.CRASHED:
            found = self._failure_in_text(end)
            is_complete = failed is None and awaited is not None and has_ended and end.exit == 0
            if found is None or not (is_complete and found.failure in _REPEATED):
                failed = found or failed
        elif failed.failure is FailureClass.RATE_LIMITED:
            failed = replace(failed, until=self._until(failed.reason, end.time))
        failed = with_reset_time(failed, end.time)
        if awaited is None or end.exit != 0 or has_ended:
            return failed
        failed = failed or Failed(FailureClass.CRASHED, f"it ended without {awaited}"[:_LONGEST_REASON])
        return replace(failed, unfinished=True)

    def _missing_program(self, end: SessionEnd) -> Failed | None:
        """Return a failure if the bridge, which exists, could not find the program."""
        has_bridge = self._options.stdin is not None or self._options.result_file is not None
        found = _NOT_FOUND.search(end.stderr) if has_bridge and end.exit == NOT_FOUND_EXIT else None
        return None if found is None else Failed(FailureClass.MISSING, f"the program was not found: {found[1]}")

    def capabilities(self) -> frozenset[Capability]:
        """Return the capabilities that have options."""
        options = self._options
        given = {
            Capability.RESUME: options.resume,
            Capability.ATTACH: options.attach,
            Capability.READ_ONLY: options.read_only,
            Capability.INSTRUCTIONS: options.instructions,
            Capability.MCP: options.mcp,
        }
        return frozenset(capability for capability, arguments in given.items() if arguments is not None)

    def programs(self) -> Sequence[Program]:
        """Return the program if it is a plain name, which is looked up on PATH."""
        program = self._options.argv[0]
        return () if "/" in program or placeholder_names([program]) else (Program(program),)

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return the events in a line by `read`; other lines except JSON are messages."""
        return self._reader.read(line)

    def _failure_in_text(self, end: SessionEnd) -> Failed | None:
        """Search the plain output; JSON lines are left to rules, as they may quote errors."""
        is_json = self._options.output == "jsonl"
        said = [line for line in end.stdout.splitlines() if not (is_json and line.startswith("{"))]
        lines = [*said, *end.stderr.splitlines()][::-1]
        for failure in self._options.failures:
            match = next(filter(None, (self._search(failure, line) for line in lines)), None)
            if match is not None:
                reason = match.string.strip()[:_LONGEST_REASON]
                return Failed(FailureClass(failure), reason, _instant(match, end.time))
        return None

    def _class_in(self, text: str) -> FailureClass | None:
        return next((FailureClass(failure) for failure in self._options.failures if self._search(failure, text)), None)

    def _until(self, reason: str, now: float) -> float | None:
        match = self._search("rate_limited", reason)
        return None if match is None else _instant(match, now)

    def _search(self, failure: SaidClass, text: str) -> re.Match[str] | None:
        pattern = self._failure_patterns.get(failure)
        return None if pattern is None else pattern.search(text[:MAX_LINE_CHARS])


def list_arguments(options: CommandOptions, request: SessionRequest, args: Sequence[str] = ()) -> Iterator[str]:
    """Yield the arguments of a session, with placeholders; `args` are its last options."""
    if request.interactive and options.attach is not None:
        yield from (options.argv[0], *options.attach, *args)
        return
    asked = (
        options.resume if request.resume is not None else None,
        options.read_only if request.read_only else options.read_write,
        options.instructions if request.instructions is not None else None,
        options.mcp if request.mcp_servers else None,
        options.model_args if options.model is not None else None,
        args,
    )
    more = [argument for arguments in asked for argument in arguments or ()]
    for argument in options.argv if OPTIONS in options.argv else (*options.argv, OPTIONS):
        yield from more if argument == OPTIONS else [argument]


def placeholder_values(options: CommandOptions, request: SessionRequest) -> dict[str, str]:
    """Return the values of placeholders."""
    return {name: str(getattr(request, name)) for name in REQUESTED} | {
        "model": options.model or "",
        "session": request.resume or "",
        "prompt_line": " ".join(request.prompt.split()),
        "instructions": request.instructions or "",
        "instructions_file": str(request.home / INSTRUCTIONS_FILE),
        "mcp_file": str(request.home / SERVERS_FILE),
    }


def _bridge_arguments(options: CommandOptions, request: SessionRequest) -> tuple[str, ...]:
    """Return the arguments of the bridge; empty if the program needs none."""
    stdin = () if options.stdin is None else ("--stdin", str(request.home / STDIN_FILE))
    if options.result_file is None:
        return stdin
    result = ("--result", str(request.home / options.result_file.path))
    return (*stdin, *result, *(("--keys", ",".join(options.result_file.keys)) if options.result_file.keys else ()))


def _home(options: CommandOptions, request: SessionRequest, values: Mapping[str, str]) -> SessionHome:
    files = dict(_files(options, request, values))
    if not options.has_own_home:
        return SessionHome(files)
    linked = (*options.links, *options.logins)
    return SessionHome(
        files,
        links={path: f"~/{path}" for path in linked},
        renewed=options.logins,
        settings={
            path: SettingsOverlay(f"~/{path}", fill_json(overrides, values))
            for path, overrides in options.settings.items()
        },
    )


def _files(options: CommandOptions, request: SessionRequest, values: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the files that the program needs, and those that arguments refer to."""
    for path, content in options.files.items():
        yield path, file_text(content, values)
    if options.stdin is not None:
        yield STDIN_FILE, fill_placeholders([options.stdin], values)[0]
    if request.instructions is not None and "instructions_file" in placeholder_names(options.instructions or ()):
        yield INSTRUCTIONS_FILE, request.instructions
    if request.mcp_servers and options.mcp is not None:
        yield SERVERS_FILE, json.dumps({"mcpServers": {server.name: _server(server) for server in request.mcp_servers}})


def _server(server: McpServer) -> JsonObject:
    """Return a server in the usual format; it inherits the program's variables.

    Some programs expect `httpUrl`, because they use `url` for an older protocol. Without `alwaysLoadTools`, the model
    of Qwen Code would have to search for a tool before it can submit a handoff.
    """
    if server.url is not None:
        return {"type": "http", "url": server.url, "httpUrl": server.url}
    loaded = {"alwaysLoadTools": True} if server.name == MCP_SERVER_NAME else {}
    return {"command": server.argv[0], "args": [*server.argv[1:]], **loaded}


def _check_size(name: str, text: str, times: int) -> None:
    size = len(text.encode()) * times
    message = "the prompt" if name == "prompt" else "`instructions`"
    if size > _LARGEST_IN_ARGV:
        raise RefusedError(
            f"{message} takes {size} bytes of argv (system limit: about {_LARGEST_IN_ARGV})", _LONG[name]
        )
    if "\0" in text and times:
        raise RefusedError(f"{message} contains a NUL character, which arguments can't contain", "remove it")


def _instant(match: re.Match[str], now: float) -> float | None:
    """Return the time in a match (wall-clock seconds), or None if it is not valid."""
    groups = match.groupdict()
    try:
        if groups.get("seconds"):
            return now + float(groups["seconds"])
        text = (groups.get("until") or "").strip()
        if re.fullmatch(r"[0-9]{9,11}(\.[0-9]+)?", text):
            return float(text)
        time = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


@hookimpl
def council_register_adapters(register: RegisterAdapter) -> None:
    """Register `use: command`."""
    register("command", CommandAdapter)
