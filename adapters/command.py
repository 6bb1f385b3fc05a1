"""Any program as an adapter, from YAML alone.

adapters:
  fixer:
    use: command
    argv: [python3, tools/fix.py, "{prompt_file}"]
    env: [HOME, MY_KEY]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

import pluggy
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from orchestrator.errors import RefusedError
from orchestrator.protocols import Command, SessionRequest

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


def _env_form(env: Any) -> str | None:
    return "names" if isinstance(env, list | tuple) else "values" if isinstance(env, dict) else None


_EnvName = Annotated[str, AfterValidator(_check_env_name)]
_EnvNames = Annotated[tuple[_EnvName, ...], Field(strict=False)]
_EnvValues = dict[_EnvName, Annotated[str, AfterValidator(_check_env_value)]]


class CommandOptions(BaseModel):
    """What stands under an adapter that says `use: command`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    argv: Annotated[tuple[Annotated[str, AfterValidator(_check_argument)], ...], Field(strict=False, min_length=1)]
    """The program and its arguments, with placeholders such as {prompt_file}."""
    env: Annotated[
        Annotated[_EnvNames, Tag("names")] | Annotated[_EnvValues, Tag("values")],
        Discriminator(
            _env_form,
            custom_error_type="env_form",
            custom_error_message="write a list of names to pass on, or a mapping of names to values",
        ),
    ] = ()
    """Names of variables that are passed on, or a mapping of names to values that are set."""
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
            env=env if isinstance(env, dict) else {},
            pass_env=env if isinstance(env, tuple) else (),
        )

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


@hookimpl
def council_register_adapters(register: Callable[[str, type[CommandAdapter]], None]) -> None:
    """Register `use: command`."""
    register("command", CommandAdapter)
