"""Options of the commands that execute a run: budget and coordination."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any, Final

import click

from orchestrator.cli.core.options import parse_duration_option
from orchestrator.config.coordination import CoordinationOverrides
from orchestrator.domain.settings.quantities import MAX_DOLLARS, parse_count, parse_duration
from orchestrator.domain.settings.run_settings import MAX_RETRIES, Budget


def parse_budget(value: str) -> Budget:
    """Parse a budget such as `tokens=5M,cost=20,time=8h`.

    Raises ValueError if it is invalid.
    """
    limits: dict[str, float] = {}
    for part in value.split(","):
        key, _, amount = part.partition("=")
        if key.strip() not in _LIMITS or key.strip() in limits:
            raise ValueError(f"{part!r} is not a limit: write tokens=5M, cost=20 or time=8h, each at most once")
        limits[key.strip()] = _LIMITS[key.strip()](amount.strip())
    return Budget.model_validate(limits)


def _dollars(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = 0.0
    if not 0 < amount <= MAX_DOLLARS:
        raise ValueError(
            f"{text!r} is not an amount of US dollars: write a positive number, for example cost=20 or cost=0.50"
        )
    return amount


def _count(text: str) -> int:
    return parse_count(int(text) if text.isascii() and text.isdigit() else text)


_LIMITS: Final[Mapping[str, Callable[[str], float]]] = {"tokens": _count, "cost": _dollars, "time": parse_duration}


_OPTIONS = (
    click.option(
        "--heartbeat",
        "heartbeat_interval",
        metavar="DURATION",
        callback=parse_duration_option,
        help="The interval between renewals of claims on tasks.",
    ),
    click.option(
        "--stale",
        "stale_after",
        metavar="DURATION",
        callback=parse_duration_option,
        help="The time without renewal after which a claim expires.",
    ),
    click.option("--max-retries", type=click.IntRange(0, MAX_RETRIES), help="The maximum number of retries of a task."),
    click.option(
        "--when-unreachable",
        type=click.Choice(["pause", "continue"]),
        help="What to do while the store is unreachable.",
    ),
)
_NO_COORDINATION = click.option(
    "--no-coordination",
    "enabled",
    is_flag=True,
    flag_value=False,
    default=None,
    help="Prevent other processes from joining the run.",
)


def coordination_options(command: Callable[..., None], *, joins: bool = False) -> Callable[..., None]:
    """Add the coordination options to a command, passed as `coordination`.

    A command that `joins` runs has no `--no-coordination`.
    """

    @wraps(command)
    def with_coordination(**options: Any) -> None:
        given = {field.name: options.pop(field.name, None) for field in fields(CoordinationOverrides)}
        command(**options, coordination=CoordinationOverrides(**given))

    for option in reversed(_OPTIONS if joins else (*_OPTIONS, _NO_COORDINATION)):
        with_coordination = option(with_coordination)
    return with_coordination
