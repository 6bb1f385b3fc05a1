"""How runs are shared: what a file says of it, the environment above that, and a command above both."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from orchestrator.config.model import CoordinationConfig, RunConfig, TaskSpec
from orchestrator.config.schema import MAX_RETRIES
from orchestrator.config.source.problems import quote_text
from orchestrator.config.source.quantities import MAX_DURATION, format_duration
from orchestrator.errors import raise_combined_refusal

#: By the key of the file: the variable that stands above it.
ENVIRONMENT_VARIABLES: Final[Mapping[str, str]] = {
    "enabled": "SHARED_STATE_ENABLED",
    "heartbeat_interval": "SHARED_STATE_HEARTBEAT_INTERVAL_MS",
    "stale_after": "SHARED_STATE_STALE_THRESHOLD_MS",
    "owner_stale_after": "TASK_CLAIM_OWNER_STALE_TTL_MS",
    "max_retries": "SHARED_STATE_MAX_RETRIES",
}
#: By the key of the file: the option of commands that stands above both.
COMMAND_OPTIONS: Final[Mapping[str, str]] = {
    "heartbeat_interval": "--heartbeat",
    "stale_after": "--stale",
    "max_retries": "--max-retries",
}

#: What fits how often into what: two beats may be lost before a claim is, and nobody that may well be alive loses one
#: earlier than a stranger.
_DURATION_RULES: Final = (("heartbeat_interval", "stale_after", 3), ("stale_after", "owner_stale_after", 1))
_BOOLEANS: Final = {"true": True, "1": True, "false": False, "0": False}
_WHOLE: Final = re.compile("[0-9]{1,15}")
_MILLISECONDS: Final = 1000


@dataclass(frozen=True, slots=True)
class CoordinationOverrides:
    """What stands above the `coordination` of a run, key by key; None: nothing does. Durations are in seconds."""

    enabled: bool | None = None
    heartbeat_interval: float | None = None
    stale_after: float | None = None
    owner_stale_after: float | None = None
    max_retries: int | None = None
    when_unreachable: Literal["pause", "continue"] | None = None

    def given(self) -> dict[str, Any]:
        """Return those that do, by key."""
        values = {key: getattr(self, key) for key in self.__slots__}
        return {key: value for key, value in values.items() if value is not None}


class DurationConflict(NamedTuple):
    """A duration that does not fit `times` into another, by the keys of both."""

    short: str
    long: str
    times: int


def find_duration_conflicts(config: CoordinationConfig) -> Iterator[DurationConflict]:
    """Yield each pair of durations that contradict each other."""
    for short, long, times in _DURATION_RULES:
        if getattr(config, short) * times > getattr(config, long):
            yield DurationConflict(short, long, times)


def explain_duration_conflict(misfit: DurationConflict, config: CoordinationConfig) -> tuple[str, str]:
    """Return what is wrong and what would be right, in the words of the file."""
    return _explain(misfit, config, {})


def read_environment(environ: Mapping[str, str]) -> CoordinationOverrides:
    """Return what the environment says; an empty variable says nothing.

    RefusedError names each variable that can't be read, and what to write.
    """
    found: dict[str, Any] = {}
    wrong: list[tuple[str, str]] = []
    for key, name in ENVIRONMENT_VARIABLES.items():
        text = environ.get(name, "").strip()
        if not text:
            continue
        try:
            found[key] = _read(key, text)
        except ValueError as error:
            wrong.append((f"{name} can't be {quote_text(text)}", str(error)))
    raise_combined_refusal(wrong, "correct these variables, or unset them")
    return CoordinationOverrides(**found)


def _read(key: str, text: str) -> float | bool:
    if key == "enabled":
        if text.lower() not in _BOOLEANS:
            raise ValueError("write true or false")
        return _BOOLEANS[text.lower()]
    number = int(text) if _WHOLE.fullmatch(text) else -1
    if key == "max_retries":
        if not 0 <= number <= MAX_RETRIES:
            raise ValueError(f"write a whole number from 0 to {MAX_RETRIES}, as in 3")
        return number
    if not 0 < number <= MAX_DURATION * _MILLISECONDS:
        default = _milliseconds(getattr(CoordinationConfig(), key))
        raise ValueError(f"write milliseconds as a whole number above 0, as in {default}")
    return number / _MILLISECONDS


def resolve_coordination(
    config: CoordinationConfig, environ: Mapping[str, str], options: CoordinationOverrides | None = None
) -> CoordinationConfig:
    """Return what holds of a run's `config`, with the environment above it and a command's `options` above both.

    RefusedError names the variable that can't be read, or what contradicts what.
    """
    found, above = read_environment(environ).given(), {} if options is None else options.given()
    names = {
        **{key: ENVIRONMENT_VARIABLES[key] for key in found},
        **{key: COMMAND_OPTIONS[key] for key in above if key in COMMAND_OPTIONS},
    }
    config = config.model_copy(update={**found, **above})
    raise_combined_refusal(
        [_explain(one, config, names) for one in find_duration_conflicts(config)], "change these settings"
    )
    return config


def apply_max_retries(config: RunConfig, coordination: CoordinationConfig) -> RunConfig:
    """Return a run whose tasks are tried again as often as `max_retries` says, where they say nothing themselves.

    Without that setting they are tried as often as is usual.
    """
    if "max_retries" not in coordination.model_fields_set:
        return config

    def filled(spec: TaskSpec) -> TaskSpec:
        is_given = "attempts" in spec.model_fields_set
        return spec if is_given else spec.model_copy(update={"attempts": coordination.max_retries + 1})

    template = None if config.template is None else filled(config.template)
    return config.model_copy(update={"tasks": tuple(map(filled, config.tasks)), "template": template})


def _explain(misfit: DurationConflict, config: CoordinationConfig, names: Mapping[str, str]) -> tuple[str, str]:
    """Return the same with the names by which keys were given; those of the file where a key is not among `names`."""
    short, long = getattr(config, misfit.short), getattr(config, misfit.long)
    limit = {1: "", 3: "a third of "}[misfit.times]
    one, other = (_named(key, config, names) for key in (misfit.short, misfit.long))
    what = f"{one} is more than {limit}{other}"
    # Whoever gave one of the two in one place can give the other one there, too.
    places = names.get(misfit.short, names.get(misfit.long, "")), names.get(misfit.long, names.get(misfit.short, ""))
    at_most = math.floor(long * _MILLISECONDS / misfit.times) / _MILLISECONDS
    remedy = f"write at most {_written(misfit.short, at_most, places[0])}"
    return what, f"{remedy}, or at least {_written(misfit.long, short * misfit.times, places[1])}"


def _named(key: str, config: CoordinationConfig, names: Mapping[str, str]) -> str:
    name, value = names.get(key), getattr(config, key)
    if name == ENVIRONMENT_VARIABLES[key]:
        return f"{name} ({_milliseconds(value)})"
    return f"{name or f'`{key}`'} ({format_duration(value)})"


def _written(key: str, seconds: float, like: str) -> str:
    """Return how a key is given a value in the place where `like` was given: a variable, an option, or the file."""
    if like.startswith("--") and key in COMMAND_OPTIONS:
        return f"{COMMAND_OPTIONS[key]} {format_duration(seconds)}"
    if like:
        return f"{ENVIRONMENT_VARIABLES[key]}={_milliseconds(seconds)}"
    return f"`{key}: {format_duration(seconds)}`"


def _milliseconds(seconds: float) -> int:
    return round(seconds * _MILLISECONDS)
