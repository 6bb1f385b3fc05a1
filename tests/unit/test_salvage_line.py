"""Descriptions of salvaged work."""

from __future__ import annotations

import pytest

from orchestrator.api.topics.changes import PreservedWork
from orchestrator.cli.commands.runs.salvage import _applied, _lines


@pytest.mark.parametrize("committed", [99_999_999_999_999, 2**63, -(2**63)])
def test_commit_of_any_time_can_be_listed(committed: int) -> None:
    one = PreservedWork("build/1/other", "run", "build", "landed", "subject", "0" * 40, committed, None)
    run, line = _lines([one], {})
    assert (run, line.split()) == ("run run", ["build/1/other", "task", "landed", "?", "subject"])


@pytest.mark.parametrize(
    ("name", "changed", "branch", "reported"),
    [
        ("build/1", ["a", "b"], None, "changed a, b, not committed"),
        ("build/1", [], None, "no changes"),
        ("build/1", ["mine"], "mine", "created branch mine"),
        (
            "build/conflict",
            ["mine"],
            "mine",
            "created branch mine: switch to it, resolve the conflicts, commit, and merge it into the target",
        ),
    ],
)
def test_applied_work_is_reported(name: str, changed: list[str], branch: str | None, reported: str) -> None:
    assert _applied(name, changed, branch) == reported
