"""Event texts for people."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.cli.render.events import event_text, is_shown
from orchestrator.domain.events import EVENT_TYPES, TypedEvent
from orchestrator.domain.events.runs import RepositoryChanged
from orchestrator.protocols import Event
from orchestrator.system.clock import format_local_time


@pytest.mark.parametrize(
    ("adapters", "approvals", "awaited"),
    [
        (["a", "b"], [], "waiting for a, b (cooling down), at least until {until}"),
        ([], ["t", "u"], "waiting for your approval of t, u"),
        (["a"], ["t"], "waiting for a (cooling down), and for your approval of t, at least until {until}"),
    ],
)
def test_waiting_run_names_what_it_waits_for(adapters: list[str], approvals: list[str], awaited: str) -> None:
    """Parked adapters with the earliest end of a cooldown; approvals by people have no time."""
    until = 1e9 if adapters else None
    event = Event("run.waiting", {"run": "r", "until": until, "adapters": adapters, "approvals": approvals})
    assert event_text(event) == awaited.format(until=format_local_time(1e9))


@pytest.mark.parametrize(
    ("type_", "facts", "words"),
    [
        ("task.awaiting_approval", {},
         "t: waiting for your approval: `council approve t --run r`, or `council reject t --note TEXT --run r`"),
        ("task.approved", {"phase": "plan", "note": None}, "t: phase plan approved"),
        ("task.rejected", {"phase": "plan", "note": "keep\nit", "reason": "rejected"},
         "t: phase plan rejected, will be repeated: keep: it"),
        ("task.changes_discarded", {"paths": ["a", "b"]},
         "t: discarded changes of a read-only phase: a, b"),
        ("claims.taken_over", {"tasks": [], "count": 1, "orchestrator": "vm-1", "reason": "process exited"},
         "t: took over 1 task from worker vm-1 (process exited)"),
        ("claims.taken_over", {"tasks": [], "count": 0, "orchestrator": "vm-1", "reason": "no heartbeat for 4 s"},
         "t: lost worker vm-1 (no heartbeat for 4 s)"),
        ("task.host_denied", {"host": "example.com:443"},
         "t: its session was denied example.com:443, which `network.allow` does not cover"),
        ("task.tools_denied", {"count": 1, "tools": ["Bash(make)"], "reason": "1 tool denied: Bash(make): allow it"},
         "t: 1 tool denied: Bash(make): allow it"),
        ("phase.skipped", {"phase": "plan", "visit": 1, "reason": "its condition is false"},
         "t: phase plan skipped: its condition is false"),
    ],
)  # fmt: skip
def test_phase_events_are_described(type_: str, facts: dict[str, object], words: str) -> None:
    """With the comment of the person, if there is one."""
    assert event_text(Event(type_, {"run": "r", "task": "t", **facts})) == words


@pytest.mark.parametrize(
    ("branch", "left"),
    [("council/r/t/1", "the work of its session was saved as t/1"), (None, "its session had no work to save")],
)
def test_takeover_names_the_leftovers(branch: str | None, left: str) -> None:
    """Without leftovers no branch is named."""
    event = Event(
        "task.claim_lost", {"run": "r", "task": "t", "attempt": 1, "orchestrator": "box-7-ab", "branch": branch}
    )
    assert event_text(event) == f"t: taken over by box-7-ab; {left}"


@pytest.mark.parametrize("kind", EVENT_TYPES.values(), ids=lambda kind: kind.type)
def test_every_event_reads_as_a_sentence(kind: type[TypedEvent]) -> None:
    """With a value for each field, and without the field named by `sentence_without`."""
    fields: dict[str, Any] = {name: _some_value(of) for name, of in kind.field_types.items()}
    texts = [event_text(Event.of(kind(**fields)))]
    if kind.sentence_without is not None:
        empty = 0 if kind.field_types[kind.sentence_without[0]] == "int" else None
        texts.append(event_text(Event.of(kind(**{**fields, kind.sentence_without[0]: empty}))))
    assert len(set(texts)) == len(texts)
    assert not [text for text in texts if kind.type in text or "{" in text or "None" in text]


def _some_value(annotation: str) -> object:
    """Return a value of an annotated type."""
    known = {"int": 3, "float": 3.0, "bool": True, "str": "word", "Instant": 1e9}
    kind = annotation.partition("[")[0].partition(" ")[0]
    return known.get(kind, {"a": ["b"]} if kind == "Mapping" else ["a", "b"])


@pytest.mark.parametrize(
    ("event", "places"),
    [
        (Event("run.paused", {}), (True, True)),
        (Event("task.landed", {}), (True, False)),
        (Event("task.salvaged", {}), (True, True)),
        (Event("task.landing", {}), (False, False)),
        (Event("some.plugin", {}), (False, False)),
    ],
)
def test_event_is_shown_according_to_the_class(event: Event, places: tuple[bool, bool]) -> None:
    assert (is_shown(event), is_shown(event, above_table=True)) == places


def test_event_of_unknown_type_or_shape_is_named() -> None:
    """A log may contain events of another version or a plugin."""
    assert event_text(Event("some.plugin", {"task": "t"})) == "t: some.plugin"
    assert event_text(Event("run.paused", {"run": "r"})) == "run.paused"


def test_repository_change_without_sessions_has_a_complete_sentence() -> None:
    """It may happen while no session runs."""
    text = event_text(Event.of(RepositoryChanged(run="r", changes=["HEAD was changed"], sessions=[])))
    assert text == "your repository was changed by something other than council: HEAD was changed"
