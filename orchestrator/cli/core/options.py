"""Parsers for options with durations, sizes and limits."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import wraps
from typing import Any, Final, Literal

import click

from orchestrator.api.topics.history import StateHistory
from orchestrator.config.coordination import CoordinationOverrides
from orchestrator.domain.settings.quantities import MAX_DOLLARS, parse_count, parse_duration, parse_size
from orchestrator.domain.settings.run_settings import MAX_RETRIES, Budget
from orchestrator.errors import RefusedError

_LONGEST: Final = 10 * 365 * 86400.0  # seconds


def parse_duration_option(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    """Return the seconds of a duration; None if the option is absent."""
    try:
        return None if value is None else parse_duration(value, longest=_LONGEST)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def parse_size_option(_context: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    """Return the bytes of a size; None if the option is absent."""
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def parse_budget_option(_context: click.Context, _option: click.Parameter, value: str | None) -> Budget | None:
    """Return the limits in a value like `tokens=5M,cost=20,time=8h`; None if the option is absent."""
    if value is None:
        return None
    limits: dict[str, float] = {}
    for part in value.split(","):
        key, _, amount = part.partition("=")
        if key.strip() not in _LIMITS or key.strip() in limits:
            raise click.BadParameter(f"{part!r} is not a limit: write tokens=5M, cost=20 or time=8h, each at most once")
        try:
            limits[key.strip()] = _LIMITS[key.strip()](amount.strip())
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return Budget.model_validate(limits)


def _dollars(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = 0.0
    if not 0 < amount <= MAX_DOLLARS:
        raise ValueError(
            f"{text!r} is not an amount of US dollars: write a positive number, as in cost=20 or cost=0.50"
        )
    return amount


def _count(text: str) -> int:
    return parse_count(int(text) if text.isascii() and text.isdigit() else text)


_LIMITS: Final[Mapping[str, Callable[[str], float]]] = {"tokens": _count, "cost": _dollars, "time": parse_duration}


_OPTIONS = (
    click.option(
        "--heartbeat",
        metavar="DURATION",
        callback=parse_duration_option,
        help="The interval between renewals of claims on tasks.",
    ),
    click.option(
        "--stale",
        metavar="DURATION",
        callback=parse_duration_option,
        help="The time without renewal after which a claim is invalid.",
    ),
    click.option("--max-retries", type=click.IntRange(0, MAX_RETRIES), help="The maximum number of retries of a task."),
    click.option(
        "--when-unreachable",
        type=click.Choice(["pause", "continue"]),
        help="The behavior while the store is unreachable.",
    ),
)
_NO_COORDINATION = click.option("--no-coordination", is_flag=True, help="Prevent other processes from joining the run.")


def coordination_options(command: Callable[..., None], *, joins: bool = False) -> Callable[..., None]:
    """Give a command these options; it gets them as `coordination`, a CoordinationOverrides.

    One that only `joins` others can't choose to be alone.
    """

    @wraps(command)
    def with_coordination(
        *args: Any,
        heartbeat: float | None,
        stale: float | None,
        max_retries: int | None,
        when_unreachable: Literal["pause", "continue"] | None,
        no_coordination: bool = False,
        **kwargs: Any,
    ) -> None:
        coordination = CoordinationOverrides(
            enabled=False if no_coordination else None,
            heartbeat_interval=heartbeat,
            stale_after=stale,
            max_retries=max_retries,
            when_unreachable=when_unreachable,
        )
        command(*args, coordination=coordination, **kwargs)

    for option in reversed(_OPTIONS if joins else (*_OPTIONS, _NO_COORDINATION)):
        with_coordination = option(with_coordination)
    return with_coordination


_POSITION: Final = re.compile(r"[0-9]{1,18}")
_CHECKPOINT: Final = re.compile(r"[^/]+/[0-9]+")
_LONGEST_AGE: Final = 100 * 366 * 86400.0  # seconds
_REMEDY: Final = (
    "write a position such as 120, a time such as 2026-01-02T03:04, an age such as 2h, the id of a checkpoint, or now"
)


async def resolve_position(past: StateHistory, text: str) -> int:
    """Return the position of a point in time; RefusedError for other text."""
    if text == "now":
        return await past.position()
    if _POSITION.fullmatch(text):
        return int(text)
    instant = parse_instant(text, time.time())
    if instant is not None:
        return await past.position_at(instant)
    found = await past.position_of(text)
    if found is None and _CHECKPOINT.fullmatch(text):
        raise RefusedError(f"there is no checkpoint {text!r}", "`council checkpoint list` lists them")
    if found is None:
        raise RefusedError(f"{text!r} is not a point in time", _REMEDY)
    return found


def parse_instant(text: str, now: float) -> float | None:
    """Return the instant (wall-clock seconds) of a time in ISO 8601 or so long before `now`; None for other text.

    A time that names no zone is one of the local zone.
    """
    try:
        return now - parse_duration(text.removesuffix("ago").rstrip(), longest=_LONGEST_AGE)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
