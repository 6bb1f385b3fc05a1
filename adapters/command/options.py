"""The options of `use: command`, and the defaults of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from adapters.command.home_files import FILE_PLACEHOLDERS, FileContent, HomePath, HomePaths, JsonSettings
from adapters.command.json_paths import JsonPath
from adapters.command.output_rules import OutputRule, RegexPattern
from adapters.command.placeholders import check_placeholders, placeholder_names
from adapters.options import AdapterOptions, OptionValue

REQUESTED: Final = ("prompt", "prompt_file", "worktree", "task", "run", "attempt", "home")
_PLACEHOLDERS: Final = (*REQUESTED, "model")
_FOR_RESUME: Final = ("session",)
_FOR_INSTRUCTIONS: Final = ("instructions", "instructions_file")
_FOR_MCP: Final = ("mcp_file",)
_FOR_STDIN: Final = ("prompt", "prompt_line", "prompt_file")
#: The position in argv of arguments that only some sessions have.
OPTIONS: Final = "{options}"

#: The files in the home that arguments refer to.
SERVERS_FILE: Final = "council-mcp.json"
STDIN_FILE: Final = "council-stdin"
#: Failure classes that messages can have. The others are derived from other data.
SaidClass = Literal["transient", "overloaded", "rate_limited", "auth", "invalid", "refused", "limit", "crashed"]


def _check_argument(argument: str, more: Sequence[str] = ()) -> str:
    return check_placeholders(argument, (*_PLACEHOLDERS, *more))


def _check_argv(argv: tuple[str, ...]) -> tuple[str, ...]:
    if placeholder_names(argv).count("options") > argv[1:].count(OPTIONS) or argv.count(OPTIONS) > 1:
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
_ModelArguments = Annotated[_Arguments, AfterValidator(partial(_check_used, one_of=("model",)))]
_Mcp = Annotated[
    tuple[Annotated[str, AfterValidator(partial(_check_argument, more=_FOR_MCP))], ...],
    Field(strict=False, min_length=1),
    AfterValidator(partial(_check_used, one_of=_FOR_MCP)),
]


def _check_stdin(text: str) -> str:
    check_placeholders(text, (*FILE_PLACEHOLDERS, *_FOR_STDIN))
    _check_used((text,), _FOR_STDIN)
    return text


def _check_pattern(pattern: str) -> str:
    if not pattern.strip() or pattern.startswith(("!", "#")) or "\n" in pattern or "\0" in pattern:
        raise ValueError(f"{pattern[:60]!r} is not a pattern for files: write one such as /.some-cli*")
    return pattern


class ResultFile(BaseModel):
    """A file of JSON that the program writes, read as one more line of output, `{"file": …}`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)

    path: HomePath
    """The file, relative to the home; in arguments `{home}/PATH`."""
    keys: Annotated[tuple[JsonPath, ...], Field(strict=False)] = ()
    """The paths to read, such as `usage`; by default all. Longer lines than 1 MiB are skipped."""


class CommandOptions(AdapterOptions):
    """Options of an adapter with `use: command`."""

    argv: _Argv
    """The program and its arguments, with placeholders such as {prompt_file}."""
    failures: dict[SaidClass, RegexPattern] = Field(default_factory=dict)
    """Regular expressions for the program's last messages, keyed by failure class."""
    prompt: Literal["stdin"] | None = None
    """`stdin` passes the prompt on standard input; by default, it is passed only in argv."""
    stdin: Annotated[str, AfterValidator(_check_stdin)] | None = None
    """Text for standard input with {prompt}, {prompt_line} or {prompt_file}, if the prompt alone is not enough."""
    model: OptionValue | None = None
    """The value of {model}, also used to look up its price."""
    model_args: _ModelArguments | None = None
    """Arguments, with {model}, of sessions with a `model`."""
    output: Literal["text", "jsonl"] = "text"
    """The format of its standard output: lines of text, or lines of JSON."""
    read: Annotated[tuple[OutputRule, ...], Field(strict=False)] = ()
    """Rules for its output, one per kind of line."""
    resume: _Resume | None = None
    """Arguments, with {session}, that resume an earlier conversation."""
    attach: _Resume | None = None
    """Arguments, with {session}, that open an earlier conversation in a terminal, instead of those in `argv`."""
    read_only: _Arguments | None = None
    """Arguments of a read-only session."""
    read_write: _Arguments | None = None
    """Arguments of any other session, instead of `read_only`."""
    instructions: _Instructions | None = None
    """Arguments, with {instructions} or {instructions_file}, for instructions separate from the prompt."""
    mcp: _Mcp | None = None
    """Arguments, with {mcp_file}, for servers of the Model Context Protocol."""
    files: dict[HomePath, FileContent] = Field(default_factory=dict)
    """Files to write into the home before each session: text, or a mapping that is written as JSON."""
    settings: dict[HomePath, JsonSettings] = Field(default_factory=dict)
    """JSON settings for `home: own`, which override those of your file at the same path."""
    links: HomePaths = ()
    """Your files and folders that a session with `home: own` can read at the same path."""
    logins: HomePaths = ()
    """Your login files for `home: own`, which the program may renew."""
    result_file: ResultFile | None = None
    """A file of JSON that the program writes."""
    scratch: Annotated[tuple[Annotated[str, AfterValidator(_check_pattern)], ...], Field(strict=False)] = ()
    """Patterns (gitignore) of the program's own new files in the worktree, which are not part of its work."""
    interrupt: bool = False
    """Whether to stop it by SIGINT first, because it then stops its tools and reports its usage."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_rules(self)
        if self.prompt is not None and self.stdin is not None:
            raise ValueError("`prompt: stdin` and `stdin` are both set: keep one of them")
        lists = (self.argv, self.resume, self.read_only, self.read_write, self.instructions, self.mcp)
        if self.model is None and any(
            "model" in placeholder_names(arguments) for arguments in lists if arguments is not None
        ):
            raise ValueError("{model} has no value: add `model`, or write the name instead")
        if self.read_write is not None and self.read_only is None:
            raise ValueError(
                "all sessions would get the arguments of `read_write`: move them to `argv`, or add `read_only`"
            )
        if twice := {*self.files} & {*self.settings} or {*self.links} & {*self.logins}:
            raise ValueError(f"{min(twice)} is listed twice: keep one of them")
        if self.attach is not None and self.resume is None:
            raise ValueError("`attach` opens a conversation that sessions can resume: add `resume`")
        if self.resume is not None and not any("session" in rule.fields_read for rule in self.read):
            raise ValueError("`resume` needs the id of a conversation: add a rule with `session` to `read`")
        if self.resume is not None and not self.has_own_home and "home" not in self.model_fields_set:
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
