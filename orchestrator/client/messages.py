"""What the orchestrator says, as a person or an agent would read it."""

from __future__ import annotations

import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any


def strip_control_characters(text: str) -> str:
    """Return a text without what a terminal would obey: other sessions wrote parts of it."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


def join_lines(text: str) -> str:
    """Return a text without line breaks: nobody's words are to look like a line of ours."""
    return " ".join(text.split())


def format_result(command: str, result: Mapping[str, Any]) -> str:
    """Return the lines that say a result."""
    lines = list(_LINES[command](result))
    return "".join(f"{line}\n" for line in lines)


def _locked(result: Mapping[str, Any]) -> Iterator[str]:
    yield join_lines(f"locked: {', '.join(result['locked'])}")


def _unlocked(result: Mapping[str, Any]) -> Iterator[str]:
    yield join_lines(f"unlocked: {', '.join(result['unlocked'])}") if result["unlocked"] else "none of that was locked"


def _reported(_result: Mapping[str, Any]) -> Iterator[str]:
    yield "told the others"


def _peers(result: Mapping[str, Any]) -> Iterator[str]:
    for one in result["peers"]:
        facts = [one["status"], one["file"], one["progress"], one["message"]]
        if one["blocked_on"]:
            facts.append(f"blocked on {one['blocked_on']}")
        if one["files"]:
            facts.append(f"has {', '.join(one['files'])}")
        name = f"{one['task']}.{one['attempt']} ({one['adapter']}{', this session' if one['is_me'] else ''})"
        yield join_lines(f"{name}: {', '.join(str(fact) for fact in facts if fact not in {None, ''})}")


def _noted(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"noted as {result['id']}"


def _notes(result: Mapping[str, Any]) -> Iterator[str]:
    if not result["notes"]:
        yield "there are no such notes"
    for one in result["notes"]:
        about = [f"task {one['task']}", *([f"topic {one['topic']}"] if one["topic"] else []), *one["paths"]]
        yield join_lines(f"{one['id']} ({', '.join(about)}):")
        yield from (f"  {line}" for line in one["text"].splitlines())


def _asked(result: Mapping[str, Any]) -> Iterator[str]:
    stats = result["stats"]
    yield f"{result['task']}, session {result['attempt']}: {result['status']}"
    yield f"{stats['commits']} commits, {stats['files']} files, +{stats['added']} -{stats['removed']}"
    for name in ("plan", "diff", "log"):
        if result[name]:
            yield f"\n{name}:"
            yield from str(result[name]).splitlines()
    for one in result["handoffs"]:
        yield f"\nhandoff: {one}"


def _shared(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"shared as version {result['version']} of {result['key']}"


def _value(result: Mapping[str, Any]) -> Iterator[str]:
    value = result["value"]
    yield value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def _listed(result: Mapping[str, Any]) -> Iterator[str]:
    if not result["shared"]:
        yield "nothing is shared"
    for one in result["shared"]:
        yield f"{one['key']}: version {one['version']}, {one['size']} bytes, by {one['writer'] or 'hand'}"


def _submit_handoff(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"handed over: {result['size']} bytes"


_LINES = {
    "lock": _locked,
    "unlock": _unlocked,
    "report": _reported,
    "peers": _peers,
    "note": _noted,
    "notes": _notes,
    "ask": _asked,
    "share_put": _shared,
    "share_get": _value,
    "share_wait": _value,
    "share_list": _listed,
    "submit_handoff": _submit_handoff,
}
