"""Options for the coordination of the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import click

from orchestrator.cli.core.option_parsers import parse_duration_option
from orchestrator.config.coordination import CoordinationOverrides
from orchestrator.domain.settings.run_settings import MAX_RETRIES

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
