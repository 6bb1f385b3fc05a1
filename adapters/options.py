"""What the options of adapters have in common: how arguments and variables are written, and what they may be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from orchestrator.domain.security.secrets import has_secret_key, secret_values
from orchestrator.protocols import SessionRequest

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


def check_argument(argument: str) -> str:
    """Return what can be an argument of a program; ValueError for what can't or is surely a mistake."""
    if not argument or "\0" in argument:
        raise ValueError("an argument of the program is empty or holds a NUL character: give it text or remove it")
    return argument


def _check_value(value: str) -> str:
    if check_argument(value).startswith("-"):
        raise ValueError(f"{value[:60]!r} would be taken for an option of the program: begin with something else")
    return value


def _check_program(program: str) -> str:
    if "/" in _check_value(program) and not Path(program).is_absolute():
        raise ValueError(f"{program[:60]!r} is no program: give a name to look for on PATH, or an absolute path")
    return program


def _check_program_first(arguments: tuple[str, ...]) -> tuple[str, ...]:
    _check_program(arguments[0])
    return arguments


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
        if has_secret_key(value) or secret_values({name: value}):
            raise ValueError(f"the value of {name} looks like a secret, which no file should hold: {_BY_NAME}")
    return env


def _env_form(env: Any) -> str | None:
    return "names" if isinstance(env, list | tuple) else "values" if isinstance(env, dict) else None


_EnvName = Annotated[str, AfterValidator(_check_env_name)]
_EnvItems = Annotated[tuple[Annotated[str, AfterValidator(_check_env_item)], ...], Field(strict=False)]
_EnvValues = Annotated[
    dict[_EnvName, Annotated[str, AfterValidator(_check_env_value)]], AfterValidator(_check_not_secret)
]

#: What a program's instructions are called in the home of the request, where it takes them from a file.
INSTRUCTIONS_FILE: Final = "council-instructions.md"

#: A word for the program's command line that is no option.
OptionValue = Annotated[str, AfterValidator(_check_value)]
#: How many turns of a model's.
TurnLimit = Annotated[int, Field(ge=1, le=10_000)]
UsDollars = Annotated[float, Field(gt=0, le=1_000_000, strict=False)]
#: A program: a name that is looked for on PATH, or an absolute path.
ProgramName = Annotated[str, AfterValidator(_check_program)]
#: Arguments as they are, without placeholders.
Arguments = Annotated[tuple[Annotated[str, AfterValidator(check_argument)], ...], Field(strict=False)]
#: A program and its arguments.
CommandLine = Annotated[Arguments, Field(min_length=1), AfterValidator(_check_program_first)]


def option_arguments(option: str, value: str | float | None) -> tuple[str, ...]:
    """Return an option of a command line with its value; nothing where there is none."""
    if value is None:
        return ()
    return (option, value if isinstance(value, str) else f"{value:.6f}".rstrip("0").rstrip("."))


def own_home_variables(options: AdapterOptions, request: SessionRequest) -> dict[str, str]:
    """Return the variable by which a program that has no folder of its own to name keeps all in the task's home."""
    return {"HOME": str(request.home)} if options.has_own_home else {}


def smallest_limit(*values: float | None) -> float | None:
    """Return the smallest of the limits that there are."""
    return min((one for one in values if one is not None), default=None)


class AdapterOptions(BaseModel):
    """What the options of every adapter have."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)

    env: Annotated[
        Annotated[_EnvItems, Tag("names")] | Annotated[_EnvValues, Tag("values")],
        Discriminator(
            _env_form,
            custom_error_type="env_form",
            custom_error_message="write a list of names to pass on, or a mapping of names to values",
        ),
    ] = ()
    """Names of variables that are passed on and `NAME=value` for those that are set, or a mapping for the latter."""
    home: Literal["own", "shared"] = "shared"
    """Where it keeps its settings, logins and conversations: in a folder of the task's own, or where you keep yours."""

    @property
    def has_own_home(self) -> bool:
        """Whether each task has one of its own."""
        return self.home == "own"

    def variables(self, passed: Sequence[str] = (), **preset: str) -> tuple[Mapping[str, str], tuple[str, ...]]:
        """Return the variables that a session sees as `Command.env` and `Command.pass_env` have them.

        `passed` and `preset` are an adapter's own; what the file says of a variable replaces them.
        """
        listed = () if isinstance(self.env, dict) else self.env
        given = self.env if isinstance(self.env, dict) else dict(one.split("=", 1) for one in listed if "=" in one)
        names = [one for one in listed if "=" not in one]
        own = {name: value for name, value in preset.items() if name not in names}
        return {**own, **given}, tuple(dict.fromkeys((*(name for name in passed if name not in given), *names)))
