"""What a person reads of an event."""

from __future__ import annotations

import pytest

from orchestrator.cli.output import event_text
from orchestrator.protocols import Event


@pytest.mark.parametrize(
    ("branch", "left"),
    [("council/r/t", "what its session left is on council/r/t"), (None, "its session left no branch")],
)
def test_who_took_over_is_told_with_what_was_left(branch: str | None, left: str) -> None:
    """Where that is nothing, no branch is named."""
    event = Event("task.claim_lost", {"run": "r", "task": "t", "attempt": 1, "by": "box-7-ab", "branch": branch})
    assert event_text(event) == f"t: taken over by box-7-ab; {left}"
