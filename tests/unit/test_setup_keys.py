"""Cache keys of setup steps."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.domain.settings.run_settings import SetupStep
from orchestrator.sessions.setup.worktree_setup import compute_setup_keys, first_step_to_run

STEPS = (SetupStep(run="make venv", inputs=("requirements.txt",)), SetupStep(run="make data"))
THERE = {"requirements.txt": "100644 blob 1"}


def keys(**changes: Any) -> tuple[str, ...]:
    """Return the keys of the steps after a change."""
    facts: dict[str, Any] = {"steps": STEPS, "entries": THERE, "sparse": (), "env": ()} | changes
    return compute_setup_keys(**facts)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, 2),
        ({"entries": {"requirements.txt": "100644 blob 2"}}, 0),
        ({"entries": {"requirements.txt": "100755 blob 1"}}, 0),
        ({"entries": {}}, 0),
        ({"entries": {**THERE, "else": "100644 blob 3"}}, 2),
        ({"steps": (STEPS[0], SetupStep(run="make data2"))}, 1),
        ({"steps": (STEPS[0], SetupStep(run="make data", inputs=("data.csv",)))}, 1),
        ({"steps": (STEPS[0], SetupStep(run="make data", timeout=1.0))}, 2),
        ({"steps": STEPS[::-1]}, 0),
        ({"sparse": ("src",)}, 0),
        ({"env": ("TOKEN",)}, 0),
    ],
)
def test_steps_run_again_from_the_first_change(changes: dict[str, Any], first: int) -> None:
    """Inputs, the command and shared settings count; the timeout does not."""
    assert first_step_to_run(keys(), keys(**changes)) == first


def test_new_steps_run() -> None:
    """A new worktree starts at the first step, an interrupted one at the first incomplete step."""
    assert first_step_to_run((), keys()) == 0
    assert first_step_to_run(keys()[:1], keys()) == 1
    assert first_step_to_run((), ()) == 0


def test_order_of_empty_steps_is_ignored() -> None:
    """Folders, variables and inputs are sets."""
    one = (SetupStep(run="x", inputs=("a", "b")),)
    other = (SetupStep(run="x", inputs=("b", "a", "b")),)
    assert keys(steps=one, sparse=("c", "d"), env=("E", "F")) == keys(steps=other, sparse=("d", "c"), env=("F", "E"))
