"""Reduce the OpenAPI description of a forge to the operations and fields that a scripted server has.

    python -m tests.forge_descriptions.reduce api.github.com.deref.json VERSION > tests/forge_descriptions/github.json

The description, with its references resolved, is in the npm package `@octokit/openapi` (MIT license).
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from orchestrator.testing.forge_servers import github

_ISSUE: Final = "/repos/{owner}/{repo}/issues/{issue_number}"
_PULL: Final = "/repos/{owner}/{repo}/pulls/{pull_number}"
OPERATIONS: Final = (
    "get /user",
    "get /search/issues",
    "get /repos/{owner}/{repo}/issues",
    "get /repos/{owner}/{repo}/milestones",
    "get /repos/{owner}/{repo}/collaborators/{username}/permission",
    f"get {_ISSUE}",
    f"patch {_ISSUE}",
    f"get {_ISSUE}/comments",
    f"post {_ISSUE}/comments",
    "patch /repos/{owner}/{repo}/issues/comments/{comment_id}",
    "delete /repos/{owner}/{repo}/issues/comments/{comment_id}",
    f"get {_ISSUE}/events",
    f"get {_ISSUE}/dependencies/blocked_by",
    f"get {_ISSUE}/sub_issues",
    f"post {_ISSUE}/labels",
    f"delete {_ISSUE}/labels/{{name}}",
    "get /repos/{owner}/{repo}/commits/{ref}/check-runs",
    "get /repos/{owner}/{repo}/commits/{ref}/status",
    "get /repos/{owner}/{repo}/pulls",
    "post /repos/{owner}/{repo}/pulls",
    f"get {_PULL}",
    f"get {_PULL}/reviews",
    f"get {_PULL}/comments",
    f"post {_PULL}/requested_reviewers",
    f"put {_PULL}/merge",
)
_KEPT: Final = ("type", "enum", "format")


def emitted_names(module: ModuleType) -> frozenset[str]:
    """Return all texts in the source of a scripted server, which include the names of its fields."""
    tree = ast.parse(inspect.getsource(module))
    return frozenset(
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def reduce_schema(schema: Mapping[str, Any], names: frozenset[str] | None, *, required: bool) -> dict[str, Any]:
    """Return a JSON schema with only types, and the fields in `names` (None: all); other fields are not allowed."""
    if parts := schema.get("allOf"):
        schema = _merge(parts, schema)
    reduced: dict[str, Any] = {key: schema[key] for key in _KEPT if key in schema}
    for key in ("anyOf", "oneOf"):
        if key in schema:
            reduced["anyOf"] = [reduce_schema(one, names, required=required) for one in schema[key]]
    if "properties" in schema and "anyOf" not in reduced:
        kept = {name: one for name, one in schema["properties"].items() if names is None or name in names}
        reduced["properties"] = {name: reduce_schema(one, names, required=required) for name, one in kept.items()}
        reduced["additionalProperties"] = False
        if required and schema.get("required"):
            reduced["required"] = schema["required"]
    if "items" in schema:
        reduced["items"] = reduce_schema(schema["items"], names, required=required)
    if schema.get("nullable"):
        return {"anyOf": [reduced, {"type": "null"}]}
    return reduced


def _merge(parts: Iterable[Mapping[str, Any]], schema: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {key: value for key, value in schema.items() if key != "allOf"}
    for part in parts:
        properties = {**merged.get("properties", {}), **part.get("properties", {})}
        merged = {**merged, **part} | ({"properties": properties} if properties else {})
    return merged


def reduce_operation(operation: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """Return the query parameters, the schema of the body, and the schemas of the answers by status."""
    parameters = {one["name"]: one["schema"].get("type") for one in operation["parameters"] if one["in"] == "query"}
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    answers = {
        status: reduce_schema(one["content"]["application/json"]["schema"], names, required=False)
        for status, one in operation["responses"].items()
        if status < "300" and "application/json" in one.get("content", {})
    }
    return {
        "query": parameters,
        "body": None if body is None else reduce_schema(body, None, required=True),
        "statuses": sorted(operation["responses"]),
        "answers": answers,
    }


def main() -> None:
    """Print the reduced description."""
    described = json.loads(Path(sys.argv[1]).read_text())
    names = emitted_names(github)
    operations = {}
    for operation in OPERATIONS:
        method, path = operation.split(" ")
        operations[operation] = reduce_operation(described["paths"][path][method], names)
    source = {"package": f"@octokit/openapi {sys.argv[2]}", "license": "MIT", "version": described["info"]["version"]}
    json.dump({"source": source, "operations": operations}, sys.stdout, separators=(",", ":"), sort_keys=True)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
