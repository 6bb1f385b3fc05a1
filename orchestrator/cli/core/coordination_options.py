"""The options by which commands that work in a run say how it is shared with others."""

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
        "--heartbeat", metavar="DURATION", callback=parse_duration_option, help="How often claims on tasks are renewed."
    ),
    click.option(
        "--stale", metavar="DURATION", callback=parse_duration_option, help="How long a claim holds without that."
    ),
    click.option("--max-retries", type=click.IntRange(0, MAX_RETRIES), help="How often a task is tried again at most."),
    click.option(
        "--when-unreachable",
        type=click.Choice(["pause", "continue"]),
        help="What is done while the store can't be reached.",
    ),
)
_NO_COORDINATION = click.option("--no-coordination", is_flag=True, help="Nobody else can join the run.")


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
