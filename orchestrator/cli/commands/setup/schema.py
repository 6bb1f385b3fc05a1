"""The command that prints JSON Schemas."""

from __future__ import annotations

import json

import click

from orchestrator.cli.core.command import CommandContext, run_command
from orchestrator.config.json_schema import file_schema
from orchestrator.engine.reports.schema import result_schema, task_details_schema
from orchestrator.plugins import load_plugins


@click.command()
@click.option("--result", is_flag=True, help="That of the object which --json prints last.")
@click.option("--story", is_flag=True, help="That of the object which `council show TASK --json` prints.")
def schema(result: bool, story: bool) -> None:
    """Print the JSON Schema of the file, for your editor.

    It has the options of every adapter type that is installed. An editor with a YAML language server finds it by this
    first line of the file:

    \b
      # yaml-language-server: $schema=council.schema.json

    \b
    Examples:
      council schema > council.schema.json
      council schema --result
    """

    async def command(context: CommandContext) -> int:
        if result and story:
            raise click.UsageError("--result and --story are two schemas: ask for one at a time")
        made = task_details_schema() if story else result_schema() if result else file_schema(load_plugins().adapters)
        context.output.text(json.dumps(made, indent=2) + "\n")
        return 0

    run_command(command, as_json=False)
