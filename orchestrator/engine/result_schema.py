"""The shape of the result object as JSON Schema (draft 2020-12), for programs that read what `--json` prints last."""

from __future__ import annotations

from pydantic import TypeAdapter

from orchestrator.domain.claims import Counters
from orchestrator.domain.model import TaskStatus
from orchestrator.engine.report import EXIT_CODES, RunReport, TaskReport
from orchestrator.protocols import JsonObject


def result_schema() -> JsonObject:
    """Return the schema of what `RunReport.to_json` returns; later versions may add fields."""
    schema = TypeAdapter(RunReport).json_schema(mode="serialization")
    task = schema["$defs"][TaskReport.__name__]["properties"]
    task["state"]["enum"] = [*map(str, TaskStatus), "blocked"]
    schema["properties"]["exit"] = {"description": "The exit code.", "enum": sorted(set(EXIT_CODES.values()))}
    schema["required"].append("exit")
    del schema["$defs"][Counters.__name__]["additionalProperties"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
