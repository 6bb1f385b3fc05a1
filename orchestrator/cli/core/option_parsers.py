"""Parsers for options with durations, sizes and limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import click

from orchestrator.domain.settings.quantities import MAX_DOLLARS, parse_count, parse_duration, parse_size
from orchestrator.domain.settings.run_settings import Budget

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
