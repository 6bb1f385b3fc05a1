"""Warnings appear exactly where they apply."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from adapters.codex import CodexAdapter
from adapters.command.adapter import CommandAdapter
from orchestrator.config.load import load_value
from orchestrator.config.model import make_adapters
from orchestrator.config.warnings import RepositoryPaths, find_warnings
from orchestrator.protocols import AdapterType

TYPES: Mapping[str, AdapterType] = {"command": CommandAdapter, "codex": CodexAdapter}
CHECKED = {"checks": ["true"]}


def warnings(
    tmp_path: Path, around: RepositoryPaths, adapter: Mapping[str, Any] | None = None, **settings: Any
) -> list[str]:
    """Return the warnings for a file with these settings."""
    value = {
        "version": 1,
        "adapters": {"x": {"use": "command", "argv": ["x"], **(adapter or {})}},
        "defaults": CHECKED,
        "tasks": [{"id": "a", "prompt": "p"}, {"id": "b", "prompt": "p"}],
        **settings,
    }
    config = load_value(value, tmp_path, TYPES)
    return [str(found) for found in find_warnings(config, around, make_adapters(config.adapters, TYPES))]


@pytest.mark.parametrize(
    ("target", "checkout", "many"), [("main", "here", 1), ("main", None, 0), ("other", "here", 0), (None, "here", 0)]
)
def test_checked_out_base_as_target_causes_a_warning(
    tmp_path: Path, target: str | None, checkout: str | None, many: int
) -> None:
    """Otherwise landings change no checked-out files, or the user chose a branch for them."""
    around = RepositoryPaths(target_checkout=None if checkout is None else tmp_path / checkout)
    settings: dict[str, Any] = {} if target is None else {"target": target}
    found = warnings(tmp_path, around, **settings)
    assert len(found) == many
    assert all("is the base, and is checked out in" in one for one in found)


@pytest.mark.parametrize(
    ("writable", "many"), [(".npm", 1), (".cache", 1), (".cache/pip", 1), (".some-cli", 0), ("cache/x", 0)]
)
def test_writable_shared_by_sessions_and_checks_is_warned_about(tmp_path: Path, writable: str, many: int) -> None:
    """Checks execute code from a shared package cache, unless only sessions write it or there are no checks."""
    (tmp_path / writable).mkdir(parents=True)
    found = warnings(tmp_path, RepositoryPaths(), writable=[writable])
    assert len(found) == many
    assert all("from which setup and checks may run programs" in one for one in found)
    assert warnings(tmp_path, RepositoryPaths(), {"writable": [writable]}) == []
    assert len(warnings(tmp_path, RepositoryPaths(), writable=[writable], defaults={})) == 1, "there are no checks"


@pytest.mark.parametrize(
    ("writable", "many"), [("repo", 1), (".", 1), ("repo/.git", 1), ("repo/build", 0), ("elsewhere", 0)]
)
@pytest.mark.parametrize("is_adapters", [False, True], ids=["of all", "of an adapter"])
def test_writable_path_that_contains_the_repository_causes_a_warning(
    tmp_path: Path, writable: str, many: int, is_adapters: bool
) -> None:
    """A subfolder may be intended; the top, the git directory and their parents are not."""
    for folder in ("repo/.git", "repo/build", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    around = RepositoryPaths(tmp_path / "repo", tmp_path / "repo/.git")
    reach: dict[str, Any] = {"writable": [writable]}
    found = warnings(tmp_path, around, reach) if is_adapters else warnings(tmp_path, around, **reach)
    assert len(found) == many
    assert all("which contains the repository itself: list only the folders" in one for one in found)


@pytest.mark.parametrize(
    ("capacity", "worktrees", "most"),
    [(4, {}, None), (4, {"max": 4}, None), (4, {"max": 3}, 3), (17, {}, None), (17, {"max": 16}, 16)],
)
def test_fewer_worktrees_than_sessions_are_warned_about(
    tmp_path: Path, capacity: int, worktrees: dict[str, Any], most: int | None
) -> None:
    """`capacity` cannot be used with a lower `max` of worktrees; without `max` there are enough."""
    found = warnings(tmp_path, RepositoryPaths(), capacity=capacity, worktrees=worktrees)
    assert len(found) == (most is not None)
    assert all(f"at most {most} sessions can run at once: set `max: {capacity}`" in one for one in found)


def test_no_task_with_checks_is_warned_about(tmp_path: Path) -> None:
    """One task with checks is enough: others may need none."""
    [found] = warnings(tmp_path, RepositoryPaths(), defaults={})
    assert found.startswith("no task has checks: work lands unverified: add ")
    tasks = [{"id": "a", "prompt": "p"}, {"id": "b", "prompt": "p", **CHECKED}]
    assert warnings(tmp_path, RepositoryPaths(), defaults={}, tasks=tasks) == []


COMMAND = {"use": "command", "argv": ["x"]}
SERVERS = {"tickets": {"command": ["tickets-mcp"]}}


@pytest.mark.parametrize(
    ("fallback", "again"),
    [(["b"], None), (["b", "c"], None), (["a"], "'a'"), (["b", "b", "a"], "'b', 'a'"), (["b", "c", "b"], "'b'")],
)
def test_fallback_to_the_same_adapter_causes_a_warning(tmp_path: Path, fallback: list[str], again: str | None) -> None:
    """One warning for all tasks with the same list."""
    tasks = [{"id": f"t{n}", "prompt": "p", "adapter": "a", "fallback": fallback} for n in range(7)]
    tasks.append({"id": "alone", "prompt": "p", "adapter": "a"})
    found = warnings(tmp_path, RepositoryPaths(), adapters=dict.fromkeys("abc", COMMAND), tasks=tasks)
    assert len(found) == (again is not None)
    beginning = f"`fallback` of 't0', 't1', 't2', 't3', 't4' and 2 more repeats {again},"
    assert all(one.startswith(beginning) for one in found)


@pytest.mark.parametrize(
    ("servers", "adapter", "fallback", "reported"),
    [
        (SERVERS, "able", [], None),
        (SERVERS, "plain", [], "adapters 'plain' do not support `mcp_servers`: 'tickets'"),
        (SERVERS, "able", ["other", "plain"], "adapters 'other', 'plain' do not support"),
        ({}, "plain", [], None),
    ],
)
def test_unsupported_servers_are_warned_about(
    tmp_path: Path, servers: dict[str, Any], adapter: str, fallback: list[str], reported: str | None
) -> None:
    """Only with servers configured, and only for adapters that tasks may use, fallbacks included."""
    adapters = {"plain": COMMAND, "other": COMMAND, "able": {"use": "codex"}}
    tasks = [{"id": "t", "prompt": "p", "adapter": adapter, "fallback": fallback}]
    found = warnings(tmp_path, RepositoryPaths(), adapters=adapters, mcp_servers=servers, tasks=tasks)
    assert len(found) == (reported is not None)
    assert all(one.startswith(str(reported)) for one in found)


@pytest.mark.parametrize(
    ("defaults", "task", "many"),
    [
        ({"adapter": "a", "fallback": ["b", "c"]}, {"adapter": "b"}, 0),
        ({"adapter": "a", "fallback": ["b", "c", "b"]}, {"adapter": "a"}, 1),
        ({"adapter": "a", "fallback": ["a", "c"]}, {}, 1),
        ({"adapter": "a", "fallback": ["b", "c"]}, {"adapter": "b", "fallback": ["b"]}, 1),
    ],
)
def test_default_fallback_may_contain_the_chosen_adapter(
    tmp_path: Path, defaults: dict[str, Any], task: dict[str, Any], many: int
) -> None:
    """The default list applies to tasks with other adapters too; other repetitions are mistakes."""
    tasks, adapters = [{"id": "t", "prompt": "p", **task}], dict.fromkeys("abc", COMMAND)
    found = warnings(tmp_path, RepositoryPaths(), adapters=adapters, defaults=CHECKED | defaults, tasks=tasks)
    assert len(found) == many
    assert all(", which has no effect" in one for one in found)


def test_phase_fallback_to_the_same_adapter_causes_a_warning(tmp_path: Path) -> None:
    """The warning names the phase."""
    workflows = {"w": [{"look": {"adapter": "x", "fallback": ["codex", "x"]}}, {"build": {"adapter": "codex"}}]}
    (found,) = warnings(
        tmp_path, RepositoryPaths(), workflows=workflows, tasks=[{"id": "a", "prompt": "p", "workflow": "w"}]
    )
    assert found.startswith("`fallback` of phase 'look' repeats 'x',")
