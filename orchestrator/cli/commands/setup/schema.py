"""The command that prints JSON Schemas."""

from __future__ import annotations

import json

import click

from orchestrator.cli.core.command import CommandContext, async_command
from orchestrator.config.json_schema import file_schema
from orchestrator.engine.reports.schema import event_schema, result_schema, task_details_schema
from orchestrator.plugins import load_plugins


@click.command()
@click.option("--result", is_flag=True, help="Print the schema of the final --json object.")
@click.option("--task-details", is_flag=True, help="Print the schema of `council show TASK --json`.")
@click.option("--events", is_flag=True, help="Print the schema of the events that --json prints.")
@async_command(prints_json=False)
async def schema(context: CommandContext, result: bool, task_details: bool, events: bool) -> None:
    """Print the JSON Schema of the file, for editors.

    Includes the options of all installed adapter types. An editor with a YAML language server finds it by this first
    line of the file:

    \b
      # yaml-language-server: $schema=council.schema.json

    \b
    Examples:
      council schema > council.schema.json
      council schema --result
    """
    if result + task_details + events > 1:
        raise click.UsageError("--result, --task-details and --events cannot be combined.")
    if events:
        made = event_schema()
    elif task_details:
        made = task_details_schema()
    else:
        made = result_schema() if result else file_schema(load_plugins().adapters)
    context.output.text(json.dumps(made, indent=2) + "\n")
