"""The shapes of what `--json` prints as JSON Schema (draft 2020-12): the result, and the story of a task."""

from __future__ import annotations

from pydantic import TypeAdapter

from orchestrator.domain.runs.model import TaskStatus
from orchestrator.domain.scheduling.claims import ClaimCounters
from orchestrator.engine.reports.report import EXIT_CODES, RunReport, TaskReport
from orchestrator.engine.reports.task_details import TaskDetails
from orchestrator.protocols import JsonObject

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_STATES = [*map(str, TaskStatus), "blocked"]


def result_schema() -> JsonObject:
    """Return the schema of what `RunReport.to_json` returns; later versions may add fields."""
    schema = TypeAdapter(RunReport).json_schema(mode="serialization")
    task = schema["$defs"][TaskReport.__name__]["properties"]
    task["status"]["enum"] = _STATES
    schema["properties"]["exit"] = {"description": "The exit code.", "enum": sorted(set(EXIT_CODES.values()))}
    schema["required"].append("exit")
    del schema["$defs"][ClaimCounters.__name__]["additionalProperties"]
    return {"$schema": _DRAFT, **schema}


def task_details_schema() -> JsonObject:
    """Return the schema of what `council show --json` prints; later versions may add fields."""
    schema = TypeAdapter(TaskDetails).json_schema(mode="serialization")
    schema["properties"]["status"]["enum"] = _STATES
    schema["properties"]["exit"] = {"description": "The exit code.", "const": 0}
    schema["required"].append("exit")
    for one in schema["$defs"].values():
        one.pop("additionalProperties", None)
    return {"$schema": _DRAFT, **schema}
