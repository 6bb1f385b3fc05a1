"""Any program as an adapter, from YAML alone.

adapters:
  fixer:
    use: command
    argv: [python3, tools/fix.py, "{prompt_file}"]
    env: [HOME, MY_KEY]
    failures:
      auth: not logged in|invalid api key
      rate_limited: 'try again in (?P<seconds>[0-9]+) s'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Final, Literal

import pluggy
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from orchestrator.domain.failures import FailureClass
from orchestrator.domain.outcome import Failed
from orchestrator.domain.secrets import contains_key, secret_values
from orchestrator.errors import RefusedError
from orchestrator.protocols import Command, SessionEnd, SessionRequest

hookimpl = pluggy.HookimplMarker("cli_council")

# One pass: doubled braces come first, so that what they protect is not looked at again.
_PLACEHOLDER: Final = re.compile(r"\{\{([a-z_]+)\}\}|\{([a-z_]+)\}")
_PLACEHOLDERS: Final = ("prompt", "prompt_file", "worktree", "task", "run", "attempt")
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What git itself takes as bound to one repository (`git rev-parse --local-env-vars`), and its like: it would lead
# the program to another repository than its worktree's.
_RELOCATING: Final = frozenset(
    {
        "GIT_ALTERNATE_OBJECT_DIRECTORIES",
        "GIT_COMMON_DIR",
        "GIT_CONFIG",
        "GIT_CONFIG_COUNT",
        "GIT_CONFIG_PARAMETERS",
        "GIT_DIR",
        "GIT_GRAFT_FILE",
        "GIT_IMPLICIT_WORK_TREE",
        "GIT_INDEX_FILE",
        "GIT_NAMESPACE",
        "GIT_NO_REPLACE_OBJECTS",
        "GIT_OBJECT_DIRECTORY",
        "GIT_PREFIX",
        "GIT_QUARANTINE_PATH",
        "GIT_REPLACE_REF_BASE",
        "GIT_SHALLOW_FILE",
        "GIT_WORK_TREE",
    }
)
_BY_NAME: Final = "pass the variable on by its name alone (`env: [NAME]`)"
#: The classes that a program's words can mean; the others are known from facts.
_SaidClass = Literal["transient", "overloaded", "rate_limited", "auth", "invalid", "refused", "limit", "crashed"]
_LONGEST_LINE: Final = 4096  # characters: patterns are a user's, lines an agent's
_LONGEST_REASON: Final = 300
# Linux takes at most 128 KiB for one argument (MAX_ARG_STRLEN, execve(2)); the rest is left to what surrounds it.
_LARGEST_IN_ARGV: Final = 100 * 1024


def _check_argument(argument: str) -> str:
    if not argument or "\0" in argument:
        raise ValueError("an argument of argv is empty or holds a NUL character: give it text or remove it")
    for match in _PLACEHOLDER.finditer(argument):
        word = match[2]
        if word is not None and word not in _PLACEHOLDERS:
            known = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
            raise ValueError(
                f"{{{word}}} is no placeholder: use one of {known}, or double the braces, {{{{{word}}}}}, for the text"
            )
    return argument


def _check_env_name(name: str) -> str:
    if not _ENV_NAME.fullmatch(name):
        raise ValueError(
            f"{name[:60]!r} can't name a variable: use letters, digits and '_', not beginning with a digit"
        )
    if name.startswith("COUNCIL_"):
        raise ValueError(f"{name[:60]} is set for each session by the run: choose a name without COUNCIL_")
    if name in _RELOCATING:
        raise ValueError(f"{name} would point git at another repository than the session's: remove it")
    return name


def _check_env_value(value: str) -> str:
    if "\0" in value:
        raise ValueError("a variable's value holds a NUL character: remove it")
    return value


def _check_env_item(item: str) -> str:
    name, is_set, value = item.partition("=")
    _check_env_name(name)
    if is_set:
        _check_env_value(value)
        _check_not_secret({name: value})
    return item


def _check_not_secret(env: dict[str, str]) -> dict[str, str]:
    for name, value in env.items():
        if contains_key(value) or secret_values({name: value}):
            raise ValueError(f"the value of {name} looks like a secret, which no file should hold: {_BY_NAME}")
    return env


def _env_form(env: Any) -> str | None:
    return "names" if isinstance(env, list | tuple) else "values" if isinstance(env, dict) else None


_EnvName = Annotated[str, AfterValidator(_check_env_name)]
_EnvItems = Annotated[tuple[Annotated[str, AfterValidator(_check_env_item)], ...], Field(strict=False)]
_EnvValues = Annotated[
    dict[_EnvName, Annotated[str, AfterValidator(_check_env_value)]], AfterValidator(_check_not_secret)
]


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern[:60]!r} is no regular expression, {error}: correct it") from None
    return pattern


class CommandOptions(BaseModel):
    """What stands under an adapter that says `use: command`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    argv: Annotated[tuple[Annotated[str, AfterValidator(_check_argument)], ...], Field(strict=False, min_length=1)]
    """The program and its arguments, with placeholders such as {prompt_file}."""
    env: Annotated[
        Annotated[_EnvItems, Tag("names")] | Annotated[_EnvValues, Tag("values")],
        Discriminator(
            _env_form,
            custom_error_type="env_form",
            custom_error_message="write a list of names to pass on, or a mapping of names to values",
        ),
    ] = ()
    """Names of variables that are passed on and `NAME=value` for those that are set, or a mapping for the latter."""
    failures: dict[_SaidClass, Annotated[str, AfterValidator(_check_pattern)]] = {}
    """Regular expressions, by the class of failure that the program's last words mean where they match."""
    prompt: Literal["stdin"] | None = None
    """`stdin` feeds the prompt there; otherwise it goes where argv names it."""


class CommandAdapter:
    """Runs the program that the options name."""

    Options: ClassVar[type[BaseModel]] = CommandOptions

    def __init__(self, options: CommandOptions, /) -> None:
        self._options = options

    def command(self, request: SessionRequest) -> Command:
        """Return argv with its placeholders filled, each once: what a prompt holds is never filled again.

        Raises RefusedError if the prompt can't be an argument: too long, or with a NUL character.
        """
        values = {name: str(getattr(request, name)) for name in _PLACEHOLDERS}

        def fill(match: re.Match[str]) -> str:
            return values[match[2]] if match[2] is not None else f"{{{match[1]}}}"

        self._check_prompt(request.prompt)
        env = self._options.env
        return Command(
            argv=tuple(_PLACEHOLDER.sub(fill, argument) for argument in self._options.argv),
            stdin=request.prompt_file if self._options.prompt == "stdin" else None,
            env=env if isinstance(env, dict) else dict(item.split("=", 1) for item in env if "=" in item),
            pass_env=() if isinstance(env, dict) else tuple(item for item in env if "=" not in item),
        )

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return the first of the options' `failures` whose pattern matches a line that the program printed last.

        A group named `seconds`, or `until` (an ISO 8601 time, or seconds since the epoch), says when it may be
        used again.
        """
        lines = [*end.stdout.splitlines(), *end.stderr.splitlines()][::-1]
        for failure, pattern in self._options.failures.items():
            compiled = re.compile(pattern, re.IGNORECASE)
            match = next(filter(None, (compiled.search(line[:_LONGEST_LINE]) for line in lines)), None)
            if match is not None:
                return Failed(FailureClass(failure), match.string.strip()[:_LONGEST_REASON], _until(match, end.time))
        return None

    def programs(self) -> Sequence[str]:
        """Return the program if it is looked for on PATH: neither a path nor known only when a session starts."""
        program = self._options.argv[0]
        return () if "/" in program or _PLACEHOLDER.search(program) else (program,)

    def _check_prompt(self, prompt: str) -> None:
        used = [match[2] for argument in self._options.argv for match in _PLACEHOLDER.finditer(argument)]
        size = len(prompt.encode()) * used.count("prompt")
        if size > _LARGEST_IN_ARGV:
            raise RefusedError(
                f"the prompt takes {size} bytes of argv, the system's limit is near {_LARGEST_IN_ARGV}",
                "use {prompt_file} in argv, or `prompt: stdin`",
            )
        if "\0" in prompt and "prompt" in used:
            raise RefusedError("the prompt holds a NUL character, which no argument can", "remove it")


def _until(match: re.Match[str], now: float) -> float | None:
    """Return the instant that a match names, in wall-clock seconds; None if it names none that can be read."""
    groups = match.groupdict()
    try:
        if groups.get("seconds"):
            return now + float(groups["seconds"])
        text = (groups.get("until") or "").strip()
        if re.fullmatch(r"[0-9]{9,11}(\.[0-9]+)?", text):
            return float(text)
        told = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        return None
    return (told if told.tzinfo else told.replace(tzinfo=UTC)).timestamp()


@hookimpl
def council_register_adapters(register: Callable[[str, type[CommandAdapter]], None]) -> None:
    """Register `use: command`."""
    register("command", CommandAdapter)
