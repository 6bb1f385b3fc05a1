"""Return the JSON Schemas (draft 2020-12) of `--json` output: the result of a run, and the details of a task."""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise

from pydantic import TypeAdapter

from orchestrator.domain.runs.model import TaskStatus
from orchestrator.engine.reports import report, task_details
from orchestrator.engine.reports.report import EXIT_CODES, RunReport, TaskReport
from orchestrator.engine.reports.task_details import TaskDetails
from orchestrator.protocols import JsonObject

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
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


def _build_schema(model: type) -> JsonObject:
    schema = TypeAdapter(model).json_schema(mode="serialization")
    models = {**vars(report), **vars(task_details)}
    for name, definition in {**schema["$defs"], model.__name__: schema}.items():
        definition.pop("additionalProperties", None)
        if name in models:
            texts = _field_docstrings(models[name])
            for field in texts.keys() & definition.get("properties", {}).keys():
                definition["properties"][field]["description"] = texts[field]
    schema["properties"]["exit"] = {"description": "The exit code."}
    schema["required"].append("exit")
    return {"$schema": _DRAFT, **schema}


def _field_docstrings(model: type) -> dict[str, str]:
    """Return the docstrings of the fields of a class, inherited ones included."""
    texts: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if base.__module__.startswith("orchestrator."):
            definition = ast.parse(inspect.getsource(base)).body[0]
            for field, following in pairwise(getattr(definition, "body", ())):
                match field, following:
                    case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                        texts[name] = inspect.cleandoc(text)
    return texts
