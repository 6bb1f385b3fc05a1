"""How kept work is told to a person."""

from __future__ import annotations

import pytest

from orchestrator.archive import KeptWork
from orchestrator.cli.salvage import _line


@pytest.mark.parametrize("committed", [99_999_999_999_999, 2**63, -(2**63)])
def test_a_commit_of_any_time_can_be_listed(committed: int) -> None:
    """An agent may date its commits beyond what a calendar has."""
    one = KeptWork("build/1/other", "run", "build", "landed", "subject", "0" * 40, committed, None)
    assert _line(one).split() == ["run", "build/1/other", "landed", "?", "subject"]
