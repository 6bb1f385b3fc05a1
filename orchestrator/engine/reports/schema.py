"""Return the JSON Schemas (draft 2020-12) of `--json` output: the result of a run, and the details of a task."""

from __future__ import annotations

from pydantic import TypeAdapter

from orchestrator.domain.runs.model import TaskStatus
from orchestrator.domain.scheduling.claims import ClaimCounters
from orchestrator.engine.reports.report import EXIT_CODES, RunReport, TaskReport
from orchestrator.engine.reports.task_details import TaskDetails
from orchestrator.protocols import JsonObject

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_STATUSES = [*map(str, TaskStatus), "blocked"]


def result_schema() -> JsonObject:
    """Return the schema of `RunReport.to_json`; later versions may add fields."""
    schema = TypeAdapter(RunReport).json_schema(mode="serialization")
    task = schema["$defs"][TaskReport.__name__]["properties"]
    task["status"]["enum"] = _STATUSES
    schema["properties"]["exit"] = {"description": "The exit code.", "enum": sorted(set(EXIT_CODES.values()))}
    schema["required"].append("exit")
    del schema["$defs"][ClaimCounters.__name__]["additionalProperties"]
    return {"$schema": _DRAFT, **schema}


def task_details_schema() -> JsonObject:
    """Return the schema of `council show --json`; later versions may add fields."""
    schema = TypeAdapter(TaskDetails).json_schema(mode="serialization")
    schema["properties"]["status"]["enum"] = _STATUSES
    schema["properties"]["exit"] = {"description": "The exit code.", "const": 0}
    schema["required"].append("exit")
    for definition in schema["$defs"].values():
        definition.pop("additionalProperties", None)
    return {"$schema": _DRAFT, **schema}
