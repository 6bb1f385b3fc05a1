"""Warnings are few and sure: each is there where it holds, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from adapters.command import CommandAdapter
from orchestrator.config.load import load_value
from orchestrator.config.warnings import Surroundings, find_warnings

CHECKED = {"checks": ["true"]}


def warnings(
    tmp_path: Path, around: Surroundings, adapter: Mapping[str, Any] | None = None, **settings: Any
) -> list[str]:
    """Return what is told of a file with these settings."""
    value = {
        "version": 1,
        "adapters": {"x": {"use": "command", "argv": ["x"], **(adapter or {})}},
        "defaults": CHECKED,
        "tasks": [{"id": "a", "prompt": "p"}, {"id": "b", "prompt": "p"}],
        **settings,
    }
    return [str(found) for found in find_warnings(load_value(value, tmp_path, {"command": CommandAdapter}), around)]


@pytest.mark.parametrize(
    ("target", "checkout", "many"), [("main", "here", 1), ("main", None, 0), ("other", "here", 0), (None, "here", 0)]
)
def test_target_that_is_the_base_and_checked_out(
    tmp_path: Path, target: str | None, checkout: str | None, many: int
) -> None:
    """Both must hold: else landings touch no files that anyone works in, or the user has chosen a branch for them."""
    around = Surroundings(target_checkout=None if checkout is None else tmp_path / checkout)
    settings: dict[str, Any] = {} if target is None else {"target": target}
    found = warnings(tmp_path, around, **settings)
    assert len(found) == many
    assert all("also the base, and checked out in" in one for one in found)


@pytest.mark.parametrize(
    ("writable", "many"), [("repo", 1), (".", 1), ("repo/.git", 1), ("repo/build", 0), ("elsewhere", 0)]
)
@pytest.mark.parametrize("is_adapters", [False, True], ids=["of all", "of an adapter"])
def test_writable_that_holds_the_repository(tmp_path: Path, writable: str, many: int, is_adapters: bool) -> None:
    """A folder in it may be meant; its top, its git directory, or what they are in never is."""
    for folder in ("repo/.git", "repo/build", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    around = Surroundings(tmp_path / "repo", tmp_path / "repo/.git")
    reach: dict[str, Any] = {"writable": [writable]}
    found = warnings(tmp_path, around, reach) if is_adapters else warnings(tmp_path, around, **reach)
    assert len(found) == many
    assert all("and with it the repository itself: name only the folders" in one for one in found)


@pytest.mark.parametrize(
    ("capacity", "worktrees", "most"),
    [(4, {}, None), (4, {"max": 4}, None), (4, {"max": 3}, 3), (17, {}, None), (17, {"max": 16}, 16)],
)
def test_fewer_worktrees_than_sessions(
    tmp_path: Path, capacity: int, worktrees: dict[str, Any], most: int | None
) -> None:
    """`capacity` can't be used where `max` allows of fewer worktrees; where that is not written there are enough."""
    found = warnings(tmp_path, Surroundings(), capacity=capacity, worktrees=worktrees)
    assert len(found) == (most is not None)
    assert all(f"at most {most} sessions can run at once: set `max: {capacity}`" in one for one in found)


def test_no_task_with_checks(tmp_path: Path) -> None:
    """One task with checks is enough: the rest may need none."""
    [found] = warnings(tmp_path, Surroundings(), defaults={})
    assert found.startswith("no task has checks: nothing proves the work: add ")
    tasks = [{"id": "a", "prompt": "p"}, {"id": "b", "prompt": "p", **CHECKED}]
    assert warnings(tmp_path, Surroundings(), defaults={}, tasks=tasks) == []
