"""Stores for the contracts: each kind, on a clock driven by tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from orchestrator.protocols import Store
from orchestrator.testing.clock import ManualClock
from tests.store_kinds import ALL_KINDS, open_kind


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave slow tests of what all profiles share with `command` to the extended ones."""
    slow = "test_verdict_on_any_output_is_a_failure_class_or_none"
    for item in items:
        if item.path.name in {"test_profiles.py", "test_aider_adapter.py"} and item.name.startswith(slow):
            item.add_marker(pytest.mark.extended)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=ALL_KINDS)
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Store]:
    """Return each kind of store."""
    async with open_kind(request.param, tmp_path / "state", clock) as store:
        yield store
