"""The command that prints JSON Schemas."""

from __future__ import annotations

import json
from typing import get_type_hints

import click
from pydantic import TypeAdapter

from orchestrator.cli.core.command import CommandContext, async_command
from orchestrator.config.json_schema import DIALECT, field_docstrings, file_schema
from orchestrator.domain.documents.times import Instant
from orchestrator.domain.events import EVENT_TYPES, TypedEvent
from orchestrator.domain.runs import check_results
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.engine.reports import report, task_details
from orchestrator.engine.reports.report import EXIT_CODES, RunReport
from orchestrator.engine.reports.task_details import TaskDetails
from orchestrator.engine.reports.task_report import TaskReport
from orchestrator.plugins import load_plugins
from orchestrator.protocols import JsonObject


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


_STATUSES = [*map(str, TaskStatus), "blocked"]


def result_schema() -> JsonObject:
    """Return the schema of `RunReport.to_json`; later versions may add fields."""
    schema = _build_schema(RunReport)
    schema["$defs"][TaskReport.__name__]["properties"]["status"]["enum"] = _STATUSES
    schema["properties"]["exit"]["enum"] = sorted(set(EXIT_CODES.values()))
    return schema


def task_details_schema() -> JsonObject:
    """Return the schema of `council show --json`; later versions may add fields."""
    schema = _build_schema(TaskDetails)
    schema["properties"]["status"]["enum"] = _STATUSES
    schema["properties"]["exit"]["const"] = 0
    return schema


def event_schema() -> JsonObject:
    """Return the schema of printed events; later versions may add events and fields."""
    return {"$schema": DIALECT, "anyOf": [_schema_of(event) for event in EVENT_TYPES.values()]}


def _schema_of(event: type[TypedEvent]) -> JsonObject:
    hints = get_type_hints(event, localns={"Instant": Instant})
    texts = field_docstrings(event)
    fields = {name: TypeAdapter(hints[name]).json_schema() for name in event.field_types}
    fields |= {name: {**field, "description": texts[name]} for name, field in fields.items() if name in texts}
    required = [name for name in fields if name in event.context or not hasattr(event, name)]
    return {
        "title": event.type,
        "description": " ".join((event.__doc__ or "").split()),
        "type": "object",
        "properties": {"event": {"const": event.type}, "time": {"type": "number"}, **fields},
        "required": ["event", "time", *required],
    }


def _build_schema(model: type) -> JsonObject:
    schema = TypeAdapter(model).json_schema(mode="serialization")
    models = {**vars(report), **vars(task_details), **vars(check_results)}
    for name, definition in {**schema["$defs"], model.__name__: schema}.items():
        definition.pop("additionalProperties", None)
        if name in models:
            texts = field_docstrings(models[name])
            for field in texts.keys() & definition.get("properties", {}).keys():
                definition["properties"][field]["description"] = texts[field]
    schema["properties"]["exit"] = {"description": "The exit code."}
    schema["required"].append("exit")
    return {"$schema": DIALECT, **schema}
