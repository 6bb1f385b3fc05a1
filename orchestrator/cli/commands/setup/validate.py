"""The command that checks a file without running it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import click

from orchestrator.cli.core.command import CommandContext, json_option, run_command
from orchestrator.cli.core.run_source import load_run_config
from orchestrator.cli.render.output import Output
from orchestrator.cli.render.text import pluralize, printable
from orchestrator.config.model import RunConfig, make_adapters
from orchestrator.config.warnings import ConfigWarning, find_warnings
from orchestrator.engine.diagnostics.preflight import find_surroundings


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@json_option
def validate(file: Path | None, as_json: bool) -> None:
    """Report every mistake in a file, without running it.

    FILE defaults to council.yaml, in the current folder or at the top of the repository. Unusual settings are reported
    as warnings, which do not change the exit code. `council run --dry-run` also checks programs and branches.

    \b
    Examples:
      council validate
      council validate night.yaml --json
    """

    async def command(context: CommandContext) -> int:
        plugins, config = await load_run_config(file)
        around = await find_surroundings(config, os.environ)
        adapters = make_adapters(config.adapters, plugins.adapters)
        _show(config, find_warnings(config, around, adapters), context.output)
        return 0

    run_command(command, as_json=as_json)


def _show(config: RunConfig, warnings: list[ConfigWarning], output: Output) -> None:
    if output.as_json:
        told = {"file": str(config.path), "tasks": len(config.tasks), "adapters": list(config.adapters)}
        output.json({"status": "valid", **told, "errors": [], "warnings": [*map(asdict, warnings)], "exit": 0})
        return
    parts = {"task": config.tasks, "tracker": config.trackers, "adapter": config.adapters}
    counts = ", ".join(pluralize(len(part), word) for word, part in parts.items() if part)
    target = config.target or "council/<run>"
    output.text(printable(f"{config.path} is valid: {counts}, from {config.base} onto {target}") + "\n")
    for warning in warnings:
        output.text(printable(f"warning: {warning}") + "\n")
