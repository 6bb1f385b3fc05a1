"""The text output of the session commands."""

from __future__ import annotations

import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any


def strip_control_characters(text: str) -> str:
    """Return text of other sessions without control characters."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


def join_lines(text: str) -> str:
    """Return text of other sessions as one line, so that it can't imitate output."""
    return " ".join(text.split())


def format_result(command: str, result: Mapping[str, Any]) -> str:
    """Return the result of a command as lines of text."""
    lines = list(_LINES[command](result))
    return "".join(f"{line}\n" for line in lines)


def _locked(result: Mapping[str, Any]) -> Iterator[str]:
    yield join_lines(f"locked: {', '.join(result['locked'])}")


def _unlocked(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        join_lines(f"unlocked: {', '.join(result['unlocked'])}") if result["unlocked"] else "none of these were locked"
    )


def _reported(_result: Mapping[str, Any]) -> Iterator[str]:
    yield "reported"


def _peers(result: Mapping[str, Any]) -> Iterator[str]:
    for peer in result["peers"]:
        facts = [peer["status"], peer["file"], peer["progress"], peer["message"]]
        if peer["blocked_on"]:
            facts.append(f"blocked on {peer['blocked_on']}")
        if peer["files"]:
            facts.append(f"has {', '.join(peer['files'])}")
        name = f"{peer['task']}.{peer['attempt']} ({peer['adapter']}{', this session' if peer['is_me'] else ''})"
        yield join_lines(f"{name}: {', '.join(str(fact) for fact in facts if fact not in {None, ''})}")


def _noted(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"saved as note {result['id']}"


def _notes(result: Mapping[str, Any]) -> Iterator[str]:
    if not result["notes"]:
        yield "no notes found"
    for note in result["notes"]:
        about = [f"task {note['task']}", *([f"topic {note['topic']}"] if note["topic"] else []), *note["paths"]]
        yield join_lines(f"{note['id']} ({', '.join(about)}):")
        yield from (f"  {line}" for line in note["text"].splitlines())


def _asked(result: Mapping[str, Any]) -> Iterator[str]:
    stats = result["stats"]
    yield f"{result['task']}, session {result['attempt']}: {result['status']}"
    yield f"{stats['commits']} commits, {stats['files']} files, +{stats['added']} -{stats['removed']}"
    for name in ("plan", "diff", "log"):
        if result[name]:
            yield f"\n{name}:"
            yield from str(result[name]).splitlines()
    for handoff in result["handoffs"]:
        yield f"\nhandoff: {handoff}"


def _shared(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"shared {result['key']}: version {result['version']}"


def _value(result: Mapping[str, Any]) -> Iterator[str]:
    value = result["value"]
    yield value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def _listed(result: Mapping[str, Any]) -> Iterator[str]:
    if not result["shared"]:
        yield "no shared values"
    for value in result["shared"]:
        writer = value["writer"] or "a user"
        yield f"{value['key']}: version {value['version']}, {_size(value)}, by {writer}"


def _submit_handoff(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"handoff accepted: {_size(result)}"


def _size(value: Mapping[str, Any]) -> str:
    return "1 byte" if value["size"] == 1 else f"{value['size']} bytes"


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
