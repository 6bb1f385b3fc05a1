"""Option callbacks that remember or parse a value; the option `--json`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

import click

from orchestrator.domain.settings.quantities import parse_duration, parse_size

T = TypeVar("T")

_LONGEST: Final = 10 * 365 * 86400.0  # seconds


def remember_option(key: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """Return a callback that stores the value in `meta`, shared with subcommands."""

    def callback(context: click.Context, _: click.Parameter, value: Any) -> None:
        context.meta[key] = value or context.meta.get(key)

    return callback


_JSON: Final = "orchestrator.json"
json_option = click.option(
    "--json",
    is_flag=True,
    expose_value=False,
    callback=remember_option(_JSON),
    help="Print JSON: one event per line, then one result object.",
)


def wants_json() -> bool:
    """Return True if `--json` was given."""
    return bool(click.get_current_context().meta.get(_JSON))


def parsed_by(parse: Callable[[str], T]) -> Callable[[click.Context, click.Parameter, str | None], T | None]:
    """Return a callback that parses a value and reports a ValueError.

    The value is None if the option is absent.
    """

    def callback(_context: click.Context, _option: click.Parameter, text: str | None) -> T | None:
        try:
            return None if text is None else parse(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return callback


#: The callbacks of options with a duration, in seconds, and with a size, in bytes.
parse_duration_option = parsed_by(partial(parse_duration, longest=_LONGEST))
parse_size_option = parsed_by(parse_size)
