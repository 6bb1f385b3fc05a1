"""Resolve coordination settings: options, then the environment, then the file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from orchestrator.config.model import RunConfig
from orchestrator.domain.settings.names import check_name
from orchestrator.domain.settings.quantities import MAX_DURATION, format_duration
from orchestrator.domain.settings.run_settings import MAX_RETRIES, CoordinationSettings, TaskSpec
from orchestrator.domain.wording import quote_text
from orchestrator.errors import raise_combined_refusal

#: The environment variable that overrides each key of the config file.
ENVIRONMENT_VARIABLES: Final[Mapping[str, str]] = {
    "enabled": "SHARED_STATE_ENABLED",
    "heartbeat_interval": "SHARED_STATE_HEARTBEAT_INTERVAL_MS",
    "stale_after": "SHARED_STATE_STALE_THRESHOLD_MS",
    "owner_stale_after": "TASK_CLAIM_OWNER_STALE_TTL_MS",
    "max_retries": "SHARED_STATE_MAX_RETRIES",
}
#: The environment variable with the labels of a machine.
LABELS_VARIABLE: Final = "COUNCIL_LABELS"
#: The command-line option that overrides each key.
COMMAND_OPTIONS: Final[Mapping[str, str]] = {
    "heartbeat_interval": "--heartbeat",
    "stale_after": "--stale",
    "max_retries": "--max-retries",
}

#: (short, long, times): `long` must be at least `times` times `short`. Two heartbeats may be lost before a claim
#: expires, and a possibly live owner on this machine does not lose its claim earlier than an owner on another machine.
_DURATION_RULES: Final = (("heartbeat_interval", "stale_after", 3), ("stale_after", "owner_stale_after", 1))
_BOOLEANS: Final = {"true": True, "1": True, "false": False, "0": False}
_WHOLE: Final = re.compile("[0-9]{1,15}")
_MILLISECONDS: Final = 1000


@dataclass(frozen=True, slots=True)
class CoordinationOverrides:
    """Overrides for the `coordination` settings of a run, in seconds where durations.

    None: not overridden.
    """

    enabled: bool | None = None
    heartbeat_interval: float | None = None
    stale_after: float | None = None
    owner_stale_after: float | None = None
    max_retries: int | None = None
    when_unreachable: Literal["pause", "continue"] | None = None

    def explicit(self) -> dict[str, Any]:
        """Return the overridden values by key."""
        values = {key: getattr(self, key) for key in self.__slots__}
        return {key: value for key, value in values.items() if value is not None}


class DurationConflict(NamedTuple):
    """Two keys of durations: `long` is less than `times` times `short`."""

    short: str
    long: str
    times: int


def find_duration_conflicts(config: CoordinationSettings) -> Iterator[DurationConflict]:
    """Yield each pair of conflicting durations."""
    for short, long, times in _DURATION_RULES:
        if getattr(config, short) * times > getattr(config, long):
            yield DurationConflict(short, long, times)


def explain_duration_conflict(conflict: DurationConflict, config: CoordinationSettings) -> tuple[str, str]:
    """Return the problem and its remedy, with the keys of the config file."""
    return _explain(conflict, config, {})


def read_labels(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the labels of this machine in `COUNCIL_LABELS`, separated by commas. Raises RefusedError."""
    return check_labels([label.strip() for label in environ.get(LABELS_VARIABLE, "").split(",") if label.strip()])


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Return labels without duplicates. Raises RefusedError if one is invalid."""
    invalid = []
    for label in labels:
        try:
            check_name(label)
        except ValueError as error:
            invalid.append((f"invalid label {quote_text(label)}", str(error)))
    raise_combined_refusal(invalid, f"correct --label or {LABELS_VARIABLE}")
    return tuple(dict.fromkeys(labels))


def read_environment(environ: Mapping[str, str]) -> CoordinationOverrides:
    """Return the overrides from the environment; empty variables are ignored.

    Raises RefusedError that lists each invalid variable with its remedy.
    """
    values: dict[str, Any] = {}
    invalid: list[tuple[str, str]] = []
    for key, name in ENVIRONMENT_VARIABLES.items():
        text = environ.get(name, "").strip()
        if not text:
            continue
        try:
            values[key] = _read(key, text)
        except ValueError as error:
            invalid.append((f"invalid value {quote_text(text)} of {name}", str(error)))
    raise_combined_refusal(invalid, "correct these variables, or unset them")
    return CoordinationOverrides(**values)


def _read(key: str, text: str) -> float | bool:
    if key == "enabled":
        if text.lower() not in _BOOLEANS:
            raise ValueError("use true or false")
        return _BOOLEANS[text.lower()]
    number = int(text) if _WHOLE.fullmatch(text) else -1
    if key == "max_retries":
        if not 0 <= number <= MAX_RETRIES:
            raise ValueError(f"use a whole number from 0 to {MAX_RETRIES}, such as 3")
        return number
    if not 0 < number <= MAX_DURATION * _MILLISECONDS:
        default = _milliseconds(getattr(CoordinationSettings(), key))
        raise ValueError(f"use a positive whole number of milliseconds, such as {default}")
    return number / _MILLISECONDS


def resolve_coordination(
    config: CoordinationSettings, environ: Mapping[str, str], options: CoordinationOverrides | None = None
) -> CoordinationSettings:
    """Return a run's settings: `config`, the environment, then a command's `options`.

    Raises RefusedError that lists all invalid variables, or the conflicting settings.
    """
    from_environment, from_options = read_environment(environ).explicit(), {} if options is None else options.explicit()
    names = {
        **{key: ENVIRONMENT_VARIABLES[key] for key in from_environment},
        **{key: COMMAND_OPTIONS[key] for key in from_options if key in COMMAND_OPTIONS},
    }
    config = config.model_copy(update={**from_environment, **from_options})
    raise_combined_refusal(
        [_explain(conflict, config, names) for conflict in find_duration_conflicts(config)], "change these settings"
    )
    return config


def apply_max_retries(config: RunConfig, coordination: CoordinationSettings) -> RunConfig:
    """Return a run with `max_retries` + 1 attempts for tasks without their own number.

    If `max_retries` is not set, the run is returned unchanged.
    """
    if "max_retries" not in coordination.model_fields_set:
        return config

    def filled(spec: TaskSpec) -> TaskSpec:
        is_given = "attempts" in spec.model_fields_set
        return spec if is_given else spec.model_copy(update={"attempts": coordination.max_retries + 1})

    template = None if config.template is None else filled(config.template)
    return config.model_copy(update={"tasks": tuple(map(filled, config.tasks)), "template": template})


def _explain(conflict: DurationConflict, config: CoordinationSettings, names: Mapping[str, str]) -> tuple[str, str]:
    """Return the problem and its remedy, in the words of its source.

    `names` has the variable or option that overrides each key, if any.
    """
    short, long = getattr(config, conflict.short), getattr(config, conflict.long)
    limit = {1: "", 3: "a third of "}[conflict.times]
    subject, other = (_named(key, config, names) for key in (conflict.short, conflict.long))
    message = f"{subject} is more than {limit}{other}"
    # The remedy for each setting refers to the source of that setting, which the user can change.
    sources = (
        names.get(conflict.short, names.get(conflict.long, "")),
        names.get(conflict.long, names.get(conflict.short, "")),
    )
    at_most = math.floor(long * _MILLISECONDS / conflict.times) / _MILLISECONDS
    remedy = f"use at most {_written(conflict.short, at_most, sources[0])}"
    return message, f"{remedy}, or at least {_written(conflict.long, short * conflict.times, sources[1])}"


def _named(key: str, config: CoordinationSettings, names: Mapping[str, str]) -> str:
    name, value = names.get(key), getattr(config, key)
    if name == ENVIRONMENT_VARIABLES[key]:
        return f"{name} ({_milliseconds(value)})"
    return f"{name or f'`{key}`'} ({format_duration(value)})"


def _written(key: str, seconds: float, like: str) -> str:
    """Return the text that sets a key, in the same source as `like`.

    The source is a variable, an option or the config file.
    """
    if like.startswith("--") and key in COMMAND_OPTIONS:
        return f"{COMMAND_OPTIONS[key]} {format_duration(seconds)}"
    if like:
        return f"{ENVIRONMENT_VARIABLES[key]}={_milliseconds(seconds)}"
    return f"`{key}: {format_duration(seconds)}`"


def _milliseconds(seconds: float) -> int:
    return round(seconds * _MILLISECONDS)
