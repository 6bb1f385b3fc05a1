"""The event registry: an incomplete event class fails when it is defined."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.domain.events import EVENT_TYPES, TypedEvent
from orchestrator.domain.events.base import RunEvent
from orchestrator.domain.events.runs import RunCreated, RunPaused
from orchestrator.domain.events.tasks import TaskApproved, TaskQueued, TaskStarted
from orchestrator.domain.runs.statuses import Trigger
from orchestrator.protocols import Event
from orchestrator.testing.sink_contract import sample_events
from tests.invariants import find_event_error


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    """Restore the registry afterwards."""
    before = dict(EVENT_TYPES)
    yield
    EVENT_TYPES.clear()
    EVENT_TYPES.update(before)


def define(name: str, **attributes: object) -> type[TypedEvent]:
    """Define an event class with the attributes of its body."""
    return type(name, (RunEvent,), {"__doc__": "It has happened.", **attributes})


@pytest.mark.parametrize(
    ("attributes", "error"),
    [
        ({"sentence": "x"}, "X: give it a `type`, or declare it a base of events by `is_base=True`"),
        ({"type": "x.happened", "sentence": "x", "__doc__": None}, "X: give it a docstring"),
        ({"type": "task.happened", "sentence": "x"}, "X: derive it from TaskEvent"),
        ({"type": "phase.happened", "sentence": "x"}, "X: derive it from PhaseEvent"),
        ({"type": "adapter.happened", "sentence": "x"}, "X: derive it from AdapterEvent"),
        ({"type": "x.happened"}, "X: give it a `sentence`"),
        ({"type": "x.happened", "sentence": ""}, "X: give it a `sentence`"),
        ({"type": "run.created", "sentence": "x"}, "X: its type 'run.created' is that of RunCreated"),
        ({"type": "x.happened", "sentence": "got {size}"}, "X: its sentence names 'size'"),
        ({"type": "x.happened", "sentence": "x", "sentence_without": ("size", "y")}, "X: its sentence names 'size'"),
        (
            {"type": "x.happened", "sentence": "x", "__annotations__": {"time": "float"}},
            "X: rename its field 'time', the name has another meaning",
        ),
    ],
)
def test_event_class_incomplete_raises_type_error(attributes: dict[str, object], error: str) -> None:
    """The message names the class and the mistake."""
    with pytest.raises(TypeError, match=error):
        define("X", **attributes)
    assert "x.happened" not in EVENT_TYPES


def test_event_class_complete_is_registered() -> None:
    """Its type maps to the class, and its fields include inherited ones."""
    kind = define("X", type="x.happened", sentence="got {size}", __annotations__={"size": "int"})
    assert EVENT_TYPES["x.happened"] is kind
    assert list(kind.field_types) == ["run", "size"]


def test_event_with_unknown_or_missing_field_raises_type_error() -> None:
    with pytest.raises(TypeError, match=r"RunPaused: unknown fields \['why'\], missing fields \['reason'\]"):
        RunPaused(why="x", retry_in=1.0)  # type: ignore[call-arg]  # the mistake under test


def test_event_is_frozen() -> None:
    event = RunPaused(reason="x", retry_in=1.0)
    with pytest.raises(AttributeError):
        event.reason = "y"  # type: ignore[misc]  # the mistake under test


def test_event_data_has_given_fields_only() -> None:
    """In class order, as JSON values; omitted optional fields are absent."""
    event = TaskStarted(adapter="fixer", base="abc").within(task="t", run="r", attempt=1, size=3)
    assert list(event.data().items()) == [
        ("run", "r"), ("task", "t"), ("attempt", 1), ("base", "abc"), ("adapter", "fixer"),
    ]  # fmt: skip
    assert TaskQueued(outcome="built", branch=None).data() == {"outcome": "built", "branch": None}
    assert TaskStarted.from_data(event.data()) == event
    assert TaskStarted.from_data({"adapter": "fixer"}) is None


def test_event_without_its_run_is_not_recorded() -> None:
    with pytest.raises(TypeError, match="RunCreated: record it with its 'run'"):
        Event.of(RunCreated(tasks=1, target="main"))


def test_event_with_empty_field_has_other_sentence() -> None:
    """The sentence is defined by `sentence_without`."""
    assert TaskApproved(phase="plan", note="fine").choose_sentence() == "phase {phase} approved: {note}"
    assert TaskApproved(phase="plan", note=None).choose_sentence() == "phase {phase} approved"


def test_triggers_record_events_of_tasks() -> None:
    """Each trigger has a registered event."""
    assert all(EVENT_TYPES[trigger.event.type] is trigger.event for trigger in Trigger)


def test_every_event_is_recorded() -> None:
    """A class that no other module names is documented, but never happens."""
    package = Path(__file__).parents[2] / "orchestrator"
    names = set[str]()
    for module in package.rglob("*.py"):
        if module.parent != package / "domain/events":
            names.update(re.findall(r"\w+", module.read_text()))
    missing = [kind.__name__ for kind in EVENT_TYPES.values() if kind.__name__ not in names]
    assert not missing, f"no module outside orchestrator/domain/events names {missing}: record or remove them"


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (Event("run.paused", {"run": "r", "reason": "x", "retry_in": 1.0}), None),
        (Event("run.paused", {"run": "r", "reason": "x"}), "run.paused has the fields ['reason', 'run'] instead of"),
        (Event("run.paused", {"run": "r", "reason": 3, "retry_in": 1.0}), "run.paused.reason: "),
        (Event("run.invented", {}), "run.invented is in no module of orchestrator.domain.events"),
    ],
)
def test_recorded_event_is_compared_with_its_class(event: Event, error: str | None) -> None:
    """Integration tests compare all recorded events this way, as one of the invariants."""
    found = find_event_error(event)
    assert found is error is None or (found is not None and error is not None and found.startswith(error))


def test_sample_events_of_the_sink_contract_match_their_classes() -> None:
    """Except for the sample of a later version."""
    errors = [find_event_error(one.event) for one in sample_events()]
    assert list(filter(None, errors)) == ["something.new is in no module of orchestrator.domain.events"]
