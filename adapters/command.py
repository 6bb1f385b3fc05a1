"""Adapter for any program, configured in YAML.

adapters:
  fixer:
    use: command
    argv: [python3, tools/fix.py, "{prompt_file}"]
    env: [HOME, MY_KEY]
    failures:
      auth: not logged in|invalid api key
      rate_limited: 'try again in (?P<seconds>[0-9]+) s'

`read` (`adapters.output_rules`) has rules for its output; other keys are named after the program's capabilities.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, ClassVar, Final, Literal, Self

import pluggy
from pydantic import AfterValidator, BaseModel, Field, model_validator

from adapters.json_output import concluded_failure
from adapters.options import INSTRUCTIONS_FILE, AdapterOptions, check_argument, own_home_variables
from adapters.output_rules import MAX_LINE_CHARS, OutputReader, OutputRule, RegexPattern
from adapters.placeholders import check_placeholders, fill_placeholders, placeholder_names
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
)

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)

_REQUESTED: Final = ("prompt", "prompt_file", "worktree", "task", "run", "attempt", "home")
_PLACEHOLDERS: Final = (*_REQUESTED, "model")
_FOR_RESUME: Final = ("session",)
_FOR_INSTRUCTIONS: Final = ("instructions", "instructions_file")
_FOR_MCP: Final = ("mcp_file",)
#: The position in argv of arguments that only some sessions have.
_OPTIONS: Final = "{options}"

_SERVERS: Final = "council-mcp.json"
#: Failure classes that messages can have. The others are derived from other data.
_SaidClass = Literal["transient", "overloaded", "rate_limited", "auth", "invalid", "refused", "limit", "crashed"]
_LONGEST_REASON: Final = 300
# Linux accepts at most 128 KiB per argument (MAX_ARG_STRLEN, execve(2)); the rest is for the text around it.
_LARGEST_IN_ARGV: Final = 100 * 1024
#: Values that may be long, and other ways to pass them.
_LONG: Final[Mapping[str, str]] = {
    "prompt": "use {prompt_file} in argv, or `prompt: stdin`",
    "instructions": "use {instructions_file} instead of {instructions}",
}


def _check_argument(argument: str, more: Sequence[str] = ()) -> str:
    return check_placeholders(argument, (*_PLACEHOLDERS, *more))


def _check_argv(argv: tuple[str, ...]) -> tuple[str, ...]:
    if placeholder_names(argv).count("options") > argv[1:].count(_OPTIONS) or argv.count(_OPTIONS) > 1:
        raise ValueError("{options} is replaced by arguments: write it once, as a separate argument")
    return argv


def _check_used(arguments: tuple[str, ...], one_of: Sequence[str]) -> tuple[str, ...]:
    if not set(one_of) & set(placeholder_names(arguments)):
        wanted = " or ".join(f"{{{name}}}" for name in one_of)
        raise ValueError(f"{wanted} is missing in these arguments: add it")
    return arguments


_Filled = Annotated[str, AfterValidator(_check_argument)]
_Arguments = Annotated[tuple[_Filled, ...], Field(strict=False, min_length=1)]
_Argv = Annotated[
    tuple[Annotated[str, AfterValidator(partial(_check_argument, more=("options",)))], ...],
    Field(strict=False, min_length=1),
    AfterValidator(_check_argv),
]
_Resume = Annotated[
    tuple[Annotated[str, AfterValidator(partial(_check_argument, more=_FOR_RESUME))], ...],
    Field(strict=False, min_length=1),
    AfterValidator(partial(_check_used, one_of=_FOR_RESUME)),
]
_Instructions = Annotated[
    tuple[Annotated[str, AfterValidator(partial(_check_argument, more=_FOR_INSTRUCTIONS))], ...],
    Field(strict=False, min_length=1),
    AfterValidator(partial(_check_used, one_of=_FOR_INSTRUCTIONS)),
]
_Mcp = Annotated[
    tuple[Annotated[str, AfterValidator(partial(_check_argument, more=_FOR_MCP))], ...],
    Field(strict=False, min_length=1),
    AfterValidator(partial(_check_used, one_of=_FOR_MCP)),
]


class CommandOptions(AdapterOptions):
    """Options of an adapter with `use: command`."""

    argv: _Argv
    """The program and its arguments, with placeholders such as {prompt_file}."""
    failures: dict[_SaidClass, RegexPattern] = Field(default_factory=dict)
    """Regular expressions for the program's last messages, keyed by failure class."""
    prompt: Literal["stdin"] | None = None
    """`stdin` passes the prompt on standard input; by default, it is passed only in argv."""
    model: Annotated[str, AfterValidator(check_argument)] | None = None
    """The value of {model}, also used to look up its price."""
    output: Literal["text", "jsonl"] = "text"
    """The format of its standard output: lines of text, or lines of JSON."""
    read: Annotated[tuple[OutputRule, ...], Field(strict=False)] = ()
    """Rules for its output, one per kind of line."""
    resume: _Resume | None = None
    """Arguments, with {session}, that resume an earlier conversation."""
    read_only: _Arguments | None = None
    """Arguments of a read-only session."""
    read_write: _Arguments | None = None
    """Arguments of any other session, instead of `read_only`."""
    instructions: _Instructions | None = None
    """Arguments, with {instructions} or {instructions_file}, for instructions separate from the prompt."""
    mcp: _Mcp | None = None
    """Arguments, with {mcp_file}, for servers of the Model Context Protocol."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_rules(self)
        lists = (self.argv, self.resume, self.read_only, self.read_write, self.instructions, self.mcp)
        if self.model is None and any(
            "model" in placeholder_names(arguments) for arguments in lists if arguments is not None
        ):
            raise ValueError("{model} has no value: add `model`, or write the name instead")
        if self.read_write is not None and self.read_only is None:
            raise ValueError(
                "all sessions would get the arguments of `read_write`: move them to `argv`, or add `read_only`"
            )
        if self.resume is not None and not any("session" in rule.fields_read for rule in self.read):
            raise ValueError("`resume` needs the id of a conversation: add a rule with `session` to `read`")
        if self.resume is not None and "home" not in self.model_fields_set:
            raise ValueError(
                "`resume` needs a folder that keeps conversations: set `home: own`, or set `home: shared` "
                "and add your folder with its conversations to `writable`"
            )
        return self


def _check_rules(options: CommandOptions) -> None:
    if options.output == "jsonl" and not options.read:
        raise ValueError("lines of JSON need rules: add `read` with a rule for each kind of line")
    if options.output == "text" and any(rule.needs_json for rule in options.read):
        raise ValueError(
            "`read` has rules for lines of JSON, and the output is text: write `output: jsonl`, or use only `match` in "
            "its rules, with a named group for each value"
        )


class CommandAdapter:
    """Runs the program in the options."""

    Options: ClassVar[type[BaseModel]] = CommandOptions

    def __init__(self, options: CommandOptions, /) -> None:
        self._options = options
        self._reader = OutputReader(options.read, options.output == "jsonl", options.model, self._class_in)

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return argv with filled placeholders; placeholders in prompts are not expanded.

        Raises RefusedError if the prompt or the instructions can't be an argument, because they are too long or contain
        a NUL character.
        """
        options = self._options
        values = {name: str(getattr(request, name)) for name in _REQUESTED} | {
            "model": options.model or "",
            "session": request.resume or "",
            "instructions": request.instructions or "",
            "instructions_file": str(request.home / INSTRUCTIONS_FILE),
            "mcp_file": str(request.home / _SERVERS),
        }
        arguments = tuple(_arguments(options, request))
        for name in _LONG:
            _check_size(name, values[name], placeholder_names(arguments).count(name))
        env, passed = options.variables(**own_home_variables(options, request))
        files = dict(_files(options, request))
        return SessionCommand(
            argv=fill_placeholders(arguments, values),
            stdin=request.prompt_file if options.prompt == "stdin" else None,
            env=env,
            pass_env=passed,
            home=SessionHome(files)
            if options.has_own_home or files or "home" in placeholder_names(arguments)
            else None,
        )

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return the failure by `read`, or the first match of `failures`, last line first.

        A group named `seconds`, or `until` (an ISO 8601 time, or seconds since the epoch), is the reset time of a
        limit.
        """
        failed = concluded_failure(end)
        if failed is None or failed.failure is FailureClass.CRASHED:
            failed = self._failure_in_text(end) or failed
        elif failed.failure is FailureClass.RATE_LIMITED:
            failed = replace(failed, until=self._until(failed.reason, end.time))
        awaited = self._reader.awaited
        if awaited is None or end.exit != 0 or any(isinstance(event, FinalResult) for event in end.events):
            return failed
        failed = failed or Failed(FailureClass.CRASHED, f"it ended without {awaited}"[:_LONGEST_REASON])
        return replace(failed, unfinished=True)

    def capabilities(self) -> frozenset[Capability]:
        """Return the capabilities that have options."""
        options = self._options
        given = {
            Capability.RESUME: options.resume,
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

    def _search(self, failure: _SaidClass, text: str) -> re.Match[str] | None:
        pattern = self._options.failures.get(failure)
        return None if pattern is None else re.search(pattern, text[:MAX_LINE_CHARS], re.IGNORECASE)


def _arguments(options: CommandOptions, request: SessionRequest) -> Iterator[str]:
    """Yield the arguments of a session, with placeholders."""
    asked = (
        options.resume if request.resume is not None else None,
        options.read_only if request.read_only else options.read_write,
        options.instructions if request.instructions is not None else None,
        options.mcp if request.mcp_servers else None,
    )
    more = [argument for arguments in asked for argument in arguments or ()]
    for argument in options.argv if _OPTIONS in options.argv else (*options.argv, _OPTIONS):
        yield from more if argument == _OPTIONS else [argument]


def _files(options: CommandOptions, request: SessionRequest) -> Iterator[tuple[str, str]]:
    """Yield the files that arguments refer to."""
    if request.instructions is not None and "instructions_file" in placeholder_names(options.instructions or ()):
        yield INSTRUCTIONS_FILE, request.instructions
    if request.mcp_servers and options.mcp is not None:
        yield _SERVERS, json.dumps({"mcpServers": {server.name: _server(server) for server in request.mcp_servers}})


def _server(server: McpServer) -> JsonObject:
    """Return a server in the usual format; it inherits the program's variables.

    Some programs expect `httpUrl`, because they use `url` for an older protocol.
    """
    if server.url is not None:
        return {"type": "http", "url": server.url, "httpUrl": server.url}
    return {"command": server.argv[0], "args": [*server.argv[1:]]}


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
