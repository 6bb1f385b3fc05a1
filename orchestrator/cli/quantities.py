"""Lengths of time and sizes as options of commands take them."""

from __future__ import annotations

from typing import Final

import click

from orchestrator.config.quantities import parse_duration, parse_size

_LONGEST: Final = 10 * 365 * 86400.0  # seconds


def duration(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    """Return the seconds of an option's value; None where it was not given."""
    try:
        return None if value is None else parse_duration(value, longest=_LONGEST)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def size(_context: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    """Return the bytes of an option's value; None where it was not given."""
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
