"""The options of adapters, with validation of arguments and variables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from orchestrator.domain.security.secrets import has_secret_key, secret_values
from orchestrator.protocols import Program, SessionRequest

_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Variables that bind git to a repository (`git rev-parse --local-env-vars`) and similar ones, with which the program
# would use a different repository than its worktree's.
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
_BY_NAME: Final = "pass the variable by name only (`env: [NAME]`)"


def check_argument(argument: str) -> str:
    """Return a program argument. Raises ValueError if it is invalid."""
    if not argument or "\0" in argument:
        raise ValueError("an argument of the program is empty or contains a NUL character: give it text or remove it")
    return argument


def _check_value(value: str) -> str:
    if check_argument(value).startswith("-"):
        raise ValueError(f"{value[:60]!r} looks like an option of the program: begin with another character")
    return value


def _check_program(program: str) -> str:
    if "/" in _check_value(program) and not Path(program).is_absolute():
        raise ValueError(f"{program[:60]!r} is not a program: write a name to look up on PATH, or an absolute path")
    return program


def _check_program_first(arguments: tuple[str, ...]) -> tuple[str, ...]:
    _check_program(arguments[0])
    return arguments


def _check_env_name(name: str) -> str:
    if not _ENV_NAME.fullmatch(name):
        raise ValueError(
            f"{name[:60]!r} is not a variable name: use letters, digits and '_', and do not begin with a digit"
        )
    if name.startswith("COUNCIL_"):
        raise ValueError(f"{name[:60]} is set by the run for each session: choose a name without COUNCIL_")
    if name in _RELOCATING:
        raise ValueError(f"{name} would point git at a different repository than the session's: remove it")
    return name


def _check_env_value(value: str) -> str:
    if "\0" in value:
        raise ValueError("a variable's value contains a NUL character: remove it")
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
            raise ValueError(f"the value of {name} looks like a secret, which does not belong in a file: {_BY_NAME}")
    return env


def _env_form(env: Any) -> str | None:
    return "names" if isinstance(env, list | tuple) else "values" if isinstance(env, dict) else None


#: The name of an environment variable.
EnvName = Annotated[str, AfterValidator(_check_env_name)]
_EnvItems = Annotated[tuple[Annotated[str, AfterValidator(_check_env_item)], ...], Field(strict=False)]
_EnvValues = Annotated[
    dict[EnvName, Annotated[str, AfterValidator(_check_env_value)]], AfterValidator(_check_not_secret)
]

#: The name of the instructions file in the request's home, for programs that read instructions from a file.
INSTRUCTIONS_FILE: Final = "council-instructions.md"

#: Seconds after which a CLI may end the command of a stop gate, which runs checks.
STOP_GATE_TIMEOUT: Final = 3600

#: The comment on a mode without questions in a new file.
MAY_RUN_COMMANDS: Final = "it may also run commands, as the sandbox allows"
#: A command-line argument that is not an option.
OptionValue = Annotated[str, AfterValidator(_check_value)]
#: The maximum number of model turns.
TurnLimit = Annotated[int, Field(ge=1, le=10_000)]
UsDollars = Annotated[float, Field(gt=0, le=1_000_000, strict=False)]
#: A program: a name to look up on PATH, or an absolute path.
ProgramName = Annotated[str, AfterValidator(_check_program)]
#: Literal arguments, without placeholders.
Arguments = Annotated[tuple[Annotated[str, AfterValidator(check_argument)], ...], Field(strict=False)]
#: A program and its arguments.
CommandLine = Annotated[Arguments, Field(min_length=1), AfterValidator(_check_program_first)]
#: Whether a CLI runs as an agent of the Agent Client Protocol, or the agent and its arguments.
AcpChoice = bool | CommandLine


def option_arguments(option: str, value: str | float | None) -> tuple[str, ...]:
    """Return a command-line option with its value; empty if the value is None."""
    if value is None:
        return ()
    return (option, value if isinstance(value, str) else f"{value:.6f}".rstrip("0").rstrip("."))


def own_home_variables(options: AdapterOptions, request: SessionRequest) -> dict[str, str]:
    """Return HOME as the task's home, for programs without a setting for their folder."""
    return {"HOME": str(request.home)} if options.has_own_home else {}


def smallest_limit(*values: float | None) -> float | None:
    """Return the smallest limit that is not None."""
    return min((value for value in values if value is not None), default=None)


class AdapterOptions(BaseModel):
    """The options of every adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)

    env: Annotated[
        Annotated[_EnvItems, Tag("names")] | Annotated[_EnvValues, Tag("values")],
        Discriminator(
            _env_form,
            custom_error_type="env_form",
            custom_error_message="write a list of names to pass on, or a mapping of names to values",
        ),
    ] = ()
    """Environment variables: a list of names to pass on and `NAME=value` to set, or a mapping to set."""
    home: Literal["own", "shared"] = "shared"
    """The location of settings, logins and conversations: a folder per task (`own`), or yours (`shared`)."""

    @property
    def has_own_home(self) -> bool:
        """Whether each task has its own home."""
        return self.home == "own"

    def variables(self, passed: Sequence[str] = (), **preset: str) -> tuple[Mapping[str, str], tuple[str, ...]]:
        """Return a session's variables for `SessionCommand.env` and `pass_env`.

        `passed` and `preset` are the adapter's defaults, which the YAML file overrides.
        """
        given, names = self.given_variables()
        own = {name: value for name, value in preset.items() if name not in names}
        return {**own, **given}, tuple(dict.fromkeys((*(name for name in passed if name not in given), *names)))

    def given_variables(self) -> tuple[Mapping[str, str], Sequence[str]]:
        """Return the variables that `env` sets, and the names that it passes on."""
        if isinstance(self.env, dict):
            return self.env, ()
        values = dict(item.split("=", 1) for item in self.env if "=" in item)
        return values, [item for item in self.env if "=" not in item]


class AgentOptions(AdapterOptions):
    """The options of adapters whose CLI can also run as an agent of the Agent Client Protocol."""

    acp: AcpChoice = False
    """Whether to run it by the Agent Client Protocol; instead of `true`, the agent and its arguments."""

    def agent_argv(self, *default: str) -> tuple[str, ...]:
        """Return the command line of the agent."""
        return default if isinstance(self.acp, bool) else self.acp

    def agent_program(self, own: Program, install: str, name: str | None = None) -> Program:
        """Return the program of the agent: the CLI's own, or another one with its command to install it."""
        if isinstance(self.acp, bool) and name is None:
            return own
        remedy = f"install it ({install}), or correct `acp`" if isinstance(self.acp, bool) else "correct `acp`"
        return Program(self.agent_argv(name or own.name)[0], install=remedy, keys=own.keys, log_in=own.log_in)

    def check_without_acp(self, *keys: str) -> None:
        """Raise ValueError if options are set that do not apply to an agent."""
        for key in keys:
            if self.acp and getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                raise ValueError(f"`{key}` has no effect with `acp`: remove one of them")


class CliOptions(AgentOptions):
    """The options of adapters for a specific CLI; `bin` is the name of its program."""

    bin: ProgramName
    """The program."""
    model: OptionValue | None = None
    """The model, as in `--model`; by default, the one in its configuration."""
    args: Arguments = ()
    """Additional arguments, such as `[--verbose]`."""

    def program(self, install: str, supported: str, keys: Sequence[str], log_in: str, **more: Any) -> Program:
        """Return the CLI's program, with its install command and tested versions."""
        remedy = f"install it ({install}), or correct `bin`"
        return Program(
            self.bin,
            install=remedy,
            version=("--version",),
            supported=supported,
            keys=tuple(keys),
            log_in=log_in,
            **more,
        )
