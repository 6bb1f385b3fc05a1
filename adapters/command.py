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
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, ClassVar, Final, Literal

import pluggy
from pydantic import AfterValidator, BaseModel, Field

from adapters.options import AdapterOptions, check_argument, own_home
from orchestrator.domain.failures import FailureClass
from orchestrator.domain.outcome import Failed
from orchestrator.errors import RefusedError
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterAdapter
from orchestrator.protocols import Capability, Command, Home, Program, Said, SessionEnd, SessionEvent, SessionRequest

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)

# One pass: doubled braces come first, so that what they protect is not looked at again.
_PLACEHOLDER: Final = re.compile(r"\{\{([a-z_]+)\}\}|\{([a-z_]+)\}")
_PLACEHOLDERS: Final = ("prompt", "prompt_file", "worktree", "task", "run", "attempt")
#: The classes that a program's words can mean; the others are known from facts.
_SaidClass = Literal["transient", "overloaded", "rate_limited", "auth", "invalid", "refused", "limit", "crashed"]
_LONGEST_LINE: Final = 4096  # characters: patterns are a user's, lines an agent's
_LONGEST_REASON: Final = 300
# Linux takes at most 128 KiB for one argument (MAX_ARG_STRLEN, execve(2)); the rest is left to what surrounds it.
_LARGEST_IN_ARGV: Final = 100 * 1024


def _check_argument(argument: str) -> str:
    for match in _PLACEHOLDER.finditer(argument):
        word = match[2]
        if word is not None and word not in _PLACEHOLDERS:
            known = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
            raise ValueError(
                f"{{{word}}} is no placeholder: use one of {known}, or double the braces, {{{{{word}}}}}, for the text"
            )
    return check_argument(argument)


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern[:60]!r} is no regular expression, {error}: correct it") from None
    return pattern


class CommandOptions(AdapterOptions):
    """What stands under an adapter that says `use: command`."""

    argv: Annotated[tuple[Annotated[str, AfterValidator(_check_argument)], ...], Field(strict=False, min_length=1)]
    """The program and its arguments, with placeholders such as {prompt_file}."""
    failures: dict[_SaidClass, Annotated[str, AfterValidator(_check_pattern)]] = Field(default_factory=dict)
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
        env, passed = self._options.variables(**own_home(self._options, request))
        return Command(
            argv=tuple(_PLACEHOLDER.sub(fill, argument) for argument in self._options.argv),
            stdin=request.prompt_file if self._options.prompt == "stdin" else None,
            env=env,
            pass_env=passed,
            home=Home() if self._options.has_own_home else None,
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

    def capabilities(self) -> frozenset[Capability]:
        """Return nothing."""
        return frozenset()

    def programs(self) -> Sequence[Program]:
        """Return the program if it is looked for on PATH: neither a path nor known only when a session starts."""
        program = self._options.argv[0]
        return () if "/" in program or _PLACEHOLDER.search(program) else (Program(program),)

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return each line that is not empty as something that the program said."""
        return (Said(line),) if line.strip() else ()

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
def council_register_adapters(register: RegisterAdapter) -> None:
    """Register `use: command`."""
    register("command", CommandAdapter)
