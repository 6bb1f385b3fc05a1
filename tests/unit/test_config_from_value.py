"""A run config from code is validated like a file; mistakes are reported by path."""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import Any

import pytest

from adapters.command.adapter import CommandAdapter
from orchestrator.config.load import load_config, load_value
from orchestrator.config.source.document import read_document
from orchestrator.config.source.problems import Problems, TooManyProblems
from orchestrator.errors import ConfigError
from tests.unit.test_config_mistakes import MANY, ONE_MISTAKE

TYPES = {"command": CommandAdapter}
RUN: dict[str, Any] = {"version": 1, "adapters": {"x": {"use": "command", "argv": ["x"]}}}


class _Word(enum.StrEnum):
    A = "a"


def mistakes(value: dict[str, Any], folder: Path) -> list[str]:
    """Return the mistakes of a value, one sentence each."""
    with pytest.raises(ConfigError) as caught:
        load_value(value, folder, TYPES)
    assert all((one.line, one.column) == (0, 0) for one in caught.value.problems)
    return str(caught.value).splitlines()


def read(text: str) -> dict[str, Any] | None:
    """Return the value of a text, or None if it has mistakes."""
    problems = Problems("x")
    try:
        node = read_document(text, problems)
    except TooManyProblems:
        return None
    return None if node is None or problems else node.value


def test_value_and_file_give_the_same_run(tmp_path: Path) -> None:
    """Tuples, enum members and paths are converted; relative paths start at the given folder."""
    (tmp_path / "p.md").write_text("Do.")
    path = tmp_path / "council.yaml"
    path.write_text(
        "version: 1\nadapters: {x: {use: command, argv: [x]}}\n"
        "tasks: [{id: a, prompt_file: p.md}, {id: b, prompt: p, needs: [a], timeout: 2s}]\n"
    )
    tasks = (
        {"id": _Word.A, "prompt_file": Path("p.md")},
        {"id": "b", "prompt": "p", "needs": (_Word.A,), "timeout": "2s"},
    )
    assert load_value({**RUN, "tasks": tasks}, tmp_path, TYPES, name=path.name) == load_config(path, TYPES)


def test_mistakes_have_their_path(tmp_path: Path) -> None:
    """Paths are written as in Python, in the order of the value."""
    tasks = [{"id": "a", "prompt": " "}, {"id": "a", "prompt": {1}, 3: 4}, {"id": "b", "prompt": "p", "needs": ["c"]}]
    value = {**RUN, "tasks": tasks, "session_memory": float("inf"), "defaults": {"timeout": 30, "checks": ["\0"]}}
    assert mistakes(value, tmp_path) == [
        "<run>: tasks[0].prompt: the prompt is empty: describe the task",
        "<run>: tasks[1]: the key '3' is not text: use a word",
        "<run>: tasks[1].id: the task 'a' is already defined at tasks[0].id: give each task a unique id",
        "<run>: tasks[1].prompt: unsupported value of type set: use text, a number, a list or a dict",
        "<run>: tasks[2].needs[0]: there is no task 'c': the tasks are a, b",
        "<run>: session_memory: this number is not finite: use a finite number, or quote it if it is text",
        "<run>: defaults.timeout: a duration can't be the bare number 30: add its unit, such as 30s or 30m",
        "<run>: defaults.checks[0]: the text contains the character '\\x00': remove it",
    ]


def test_missing_key_at_the_root_has_no_path(tmp_path: Path) -> None:
    assert mistakes({**RUN}, tmp_path) == ["<run>: the key 'tasks' is missing: add `tasks:` here"]


def test_recursive_value_is_rejected(tmp_path: Path) -> None:
    """Reading stops at a nesting limit, for any number of cycles."""
    knot: list[Any] = []
    knot += [knot, knot]
    [reported] = mistakes({**RUN, "tasks": knot}, tmp_path)
    assert reported.endswith("more than 64 nested collections: reduce the nesting")


def test_mistakes_of_a_file_and_a_value_are_equal(tmp_path: Path) -> None:
    """The same mistakes are reported for a file and for its parsed value."""
    compared = 0
    path = tmp_path / "council.yaml"
    for content in [*(content for content, *_ in ONE_MISTAKE.values()), MANY]:
        value = read(content) if isinstance(content, str) else None
        if value is None:
            continue
        path.write_text(str(content))
        with pytest.raises(ConfigError) as of_file:
            load_config(path, TYPES)
        with pytest.raises(ConfigError) as of_value:
            load_value(value, tmp_path, TYPES)
        assert sorted(_facts(of_value.value)) == sorted(_facts(of_file.value))
        compared += 1
    assert compared > 50


def _facts(error: ConfigError) -> list[tuple[str, str]]:
    # Only the positions of duplicates are reported differently.
    return [
        (re.split(", on line| on line | at tasks| at worktrees", one.message)[0], one.remedy) for one in error.problems
    ]


def test_entry_is_named_after_its_type(tmp_path: Path) -> None:
    """Without `use`, the name of the entry is its type; errors in its keys are reported as usual."""
    tasks = [{"id": "t", "prompt": "x"}]
    run = {"version": 1, "tasks": tasks, "adapters": {"command": {"argv": ["x"], "capacity": 2}}}
    config = load_value(run, tmp_path, TYPES)
    assert (config.adapters["command"].use, config.adapters["command"].capacity) == ("command", 2)
    assert mistakes({**run, "adapters": {"command": {"argv": []}}}, tmp_path) != []
    assert any("'use' is missing" in line for line in mistakes({**run, "adapters": {"it": {"argv": ["x"]}}}, tmp_path))
