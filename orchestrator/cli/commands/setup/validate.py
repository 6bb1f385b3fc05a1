"""The command that checks a file without running it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import click

from orchestrator.cli.core.command import CommandContext, async_command
from orchestrator.cli.core.run_source import load_run_config
from orchestrator.cli.render.text import pluralize
from orchestrator.config.model import RunConfig, make_adapters
from orchestrator.config.warnings import find_warnings
from orchestrator.engine.diagnostics.preflight import find_surroundings


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@async_command()
async def validate(context: CommandContext, file: Path | None) -> None:
    """Report every error in a file, without running it.

    FILE defaults to council.yaml, in the current folder or at the root of the repository. Unusual settings are reported
    as warnings, which do not change the exit code. `council run --dry-run` also checks programs and branches.

    \b
    Examples:
      council validate
      council validate night.yaml --json
    """
    plugins, config = await load_run_config(file)
    around = await find_surroundings(config, os.environ)
    warnings = find_warnings(config, around, make_adapters(config.adapters, plugins.adapters))
    facts = {"file": str(config.path), "tasks": len(config.tasks), "adapters": list(config.adapters)}
    context.output.answer(
        lambda: {"status": "valid", **facts, "errors": [], "warnings": [*map(asdict, warnings)], "exit": 0},
        (_summary(config), *(f"warning: {warning}" for warning in warnings)),
    )


def _summary(config: RunConfig) -> str:
    parts = {"task": config.tasks, "tracker": config.trackers, "adapter": config.adapters}
    counts = ", ".join(pluralize(len(part), word) for word, part in parts.items() if part)
    return f"{config.path} is valid: {counts}, from {config.base} onto {config.target or 'council/<run>'}"
