"""Parse lines of JSON from any program and from our bridges."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from adapters import bridges
from adapters.bridges.lines import LINE_FIELDS
from adapters.bridges.tool_text import input_diff, plan_text, shorten
from adapters.failures import one_line
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.protocols import (
    AgentMessage,
    AgentPlan,
    CliWarning,
    ConversationStarted,
    FinalResult,
    JsonObject,
    SessionEnd,
    SessionEvent,
    ToolCall,
    ToolDenied,
    ToolResult,
    UsageReport,
)

#: An upper bound for plausible counts and amounts. JSON numbers are unbounded, and neither floats nor stores can
# represent all of them.
_TOO_MANY: Final = 1 << 53
#: The usual names of the words of a step in a plan.
_STEPS: Final = ("content", "description", "text", "step")
_BRIDGES: Final = Path(bridges.__file__).absolute().parent


def parse_object(line: str) -> JsonObject | None:
    """Return the JSON object in a line, or None if the line is anything else."""
    if not line.startswith("{"):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_plain_line(line: str) -> Sequence[SessionEvent]:
    """Return a line as a message unless it is a JSON object or part of one."""
    return (AgentMessage(line),) if line.strip() and not line.startswith("{") else ()


def bridge_command(name: str, *arguments: str) -> tuple[str, ...]:
    """Return the command line of one of our bridges, run by the current interpreter.

    `-P` excludes the bridge's own folder from imports, because its modules have the names of the packages that they
    use.
    """
    return (sys.executable, "-P", str(_BRIDGES / f"{name}.py"), *arguments)


def bridge_readable_paths() -> tuple[Path, ...]:
    """Return the folders that a bridge must be able to read, in any installation."""
    folders = (Path(sys.prefix), Path(sys.base_prefix), _BRIDGES.parent)
    return tuple(dict.fromkeys(folder.absolute() for folder in folders))


def parse_bridge_line(line: str) -> Sequence[SessionEvent]:
    """Return the event in a bridge's line; empty if it does not conform to the table."""
    value = parse_object(line)
    fields = LINE_FIELDS.get(value["type"]) if value is not None and isinstance(value.get("type"), str) else None
    if value is None or fields is None or not all(isinstance(value.get(key), kind) for key, kind in fields.items()):
        return ()
    event = _bridge_event(value)
    return () if event is None else (event,)


def _bridge_event(value: JsonObject) -> SessionEvent | None:
    match value:
        case {"type": "message", "text": text}:
            return AgentMessage(text)
        case {"type": "tool" | "tool_ended"}:
            return _bridge_tool(value)
        case {"type": "spent", "input_tokens": sent, "output_tokens": received, "cost": cost}:
            return UsageReport(as_count(sent), as_count(received), as_cost(cost), is_cumulative=True)
        case {"type": "session", "id": session}:
            return ConversationStarted(session)
        case {"type": "warned" | "planned" as kind, "text": text}:
            return CliWarning(text) if kind == "warned" else AgentPlan(text)
        case {"type": "denied", "tool": tool, "detail": detail, "call": call}:
            return ToolDenied(tool, detail, call=call or None)
        case {"type": "concluded"}:
            return FinalResult(value["text"], _bridge_failure(value))
        case _:
            return None


def _bridge_tool(value: JsonObject) -> SessionEvent:
    if value["type"] == "tool_ended":
        return ToolResult(value["call"], value["failed"], as_text(value.get("output")))
    paths = tuple(path for path in value["paths"] if isinstance(path, str))
    call = as_text(value.get("call")) or None
    return ToolCall(value["name"], value["detail"], paths, call, as_text(value.get("diff")))


def _bridge_failure(value: JsonObject) -> Failed | None:
    if value["failure"] is None:
        return None
    known = value["failure"] in {*FailureClass}
    return Failed(FailureClass(value["failure"]) if known else FailureClass.CRASHED, value["reason"] or "it failed")


def tool_event(
    name: str, given: Mapping[str, Any], path_keys: Sequence[str], detail_keys: Sequence[str], call: Any = None
) -> ToolCall:
    """Return a tool call with the file arguments, other arguments to show, and the changes of an edit."""
    paths = tuple(given[key] for key in path_keys if isinstance(given.get(key), str))
    details = [given[key] for key in detail_keys if isinstance(given.get(key), str)]
    detail = one_line((paths or details or ("",))[0])
    return ToolCall(name, detail, paths, as_text(call) or None, input_diff(given) if paths else "")


def plan_event(steps: Any) -> AgentPlan | None:
    """Return a list of steps with their status as a plan; None if it is anything else."""
    found = [
        (words, "completed" if step.get("completed") is True else as_text(step.get("status")))
        for step in (steps if isinstance(steps, list) else ())
        if isinstance(step, dict)
        and (words := next((step[key] for key in _STEPS if as_text(step.get(key)).strip()), None))
    ]
    return AgentPlan(plan_text(found)) if found else None


def output_text(value: Any) -> str:
    """Return the result of a tool, a string or a list of blocks with text, shortened."""
    parts = value if isinstance(value, list) else [{"text": value}]
    return shorten("\n".join(filter(None, (as_text(part.get("text")) for part in parts if isinstance(part, dict)))))


def concluded_failure(end: SessionEnd) -> Failed | None:
    """Return the failure in the last result, or None if missing or successful."""
    last = next((event for event in reversed(end.events) if isinstance(event, FinalResult)), None)
    return None if last is None else last.failed


def detect_interruption(end: SessionEnd) -> Failed | None:
    """Return a failure if a program exited with 0 but without its final result.

    Returns None if it printed a result, or no conversation started.
    """
    began = any(isinstance(event, ConversationStarted) for event in end.events)
    if end.exit != 0 or not began or any(isinstance(event, FinalResult) for event in end.events):
        return None
    reason = "it exited before it was done, as if interrupted"
    return Failed(FailureClass.CRASHED, reason, unfinished=True)


def as_text(value: Any) -> str:
    """Return a JSON value that should be text; an empty string if it is not."""
    return value if isinstance(value, str) else ""


def as_count(value: Any) -> int:
    """Return a JSON value that should be a count; 0 if it is not."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 < value < _TOO_MANY
    return value if is_count else 0


def as_cost(value: Any) -> float | None:
    """Return a JSON value that should be an amount of money, or None if it is not."""
    is_amount = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _TOO_MANY
    return float(value) if is_amount else None
