"""docs/state-functions.md names commands, Python names, words, events and tests that there are."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import click
import pytest
from pydantic import BaseModel

import orchestrator
from orchestrator.cli.main import main
from orchestrator.domain.model import TaskStatus
from orchestrator.engine.findings import Level
from orchestrator.engine.report import RunStatus
from orchestrator.state.checkpoints import Maker

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs/state-functions.md").read_text()
OUTPUT: Final = (ROOT / "docs/output.md").read_text()
SECTIONS: Final = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))

#: What may stand in code beside names: arguments, keys of the file, places, and words that a sentence is about.
_NO_NAMES: Final = re.compile(
    r"\w+=\w+|\{.*\}|(state|state_dir|memory):|\.council/.*|async \w+|anyio\.\w+|COUNCIL_STATE"
)
_WORDS: Final = {
    *("change", "epoch", "expected_version", "find", "landed", "max_size", "names", "recovered_at", "remove"),
    *("retention", "run", "silence", "ttl"),
}


def rows(section: str) -> list[list[str]]:
    """Return the cells of the tables of a section, without their heads."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("| ")]
    return [cells for line in lines if (cells := line.strip("| ").split(" | "))[0] != "there"]


FUNCTIONS: Final = [
    row for name in ("Distributed State Module", "State Manager Module", "State Management Framework")
    for row in rows(name)
]  # fmt: skip


def named(*, column: int) -> list[str]:
    """Return all that stands in code in a column of the tables of functions, each once."""
    return list(dict.fromkeys(name for row in FUNCTIONS for name in re.findall(r"`([^`]+)`", row[column])))


COMMANDS: Final = [name for name in named(column=1) if name.startswith("council ")]
_OTHERS: Final = {*COMMANDS, *_WORDS, *re.findall(r"^\| `(\w+\.\w+)`", OUTPUT, re.MULTILINE)}  # these are events
PYTHON: Final = [name for name in named(column=1) if name not in _OTHERS and not _NO_NAMES.fullmatch(name)]


def test_each_row_says_what_is_here_and_what_shows_it() -> None:
    """A row without a test promises what nobody has seen."""
    assert len(FUNCTIONS) > 80
    for row in FUNCTIONS:
        assert len(row) == 3, row
        assert re.fullmatch(r"(`tests/[\w/]+\.py(::\w+)+`(, )?)+", row[2]), row


@pytest.mark.parametrize("name", named(column=2))
def test_each_test_is_there(name: str) -> None:
    """By its file and its name, also where it is of a contract that the file's class has inherited."""
    path, *names = name.split("::")
    assert names[-1].startswith("test_")
    module = import_module(path.removesuffix(".py").replace("/", "."))
    assert callable(reduce(getattr, names, module))


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_is_there(line: str) -> None:
    """With the options that are named."""
    _, *words = line.split()
    command: click.Command = main
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"{command.name} has no {words[0]}"
        command, words = found, words[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("name", PYTHON)
def test_each_name_of_python_is_there(name: str) -> None:
    """A public name, or one within a module of ours, with attributes and fields."""
    owner, steps = _owner(name.split("."))
    for step in steps:
        owner = _attribute(owner, step)


def _owner(steps: list[str]) -> tuple[Any, list[str]]:
    if steps[0] in orchestrator.__all__:
        return getattr(orchestrator, steps[0]), steps[1:]
    module = "orchestrator"
    while steps and find_spec(f"{module}.{steps[0]}"):
        module, steps = f"{module}.{steps[0]}", steps[1:]
        if not hasattr(import_module(module), "__path__"):
            break
    assert module != "orchestrator", f"neither public nor a module: {steps[0]}"
    return import_module(module), steps


def _attribute(owner: Any, name: str) -> Any:
    if is_dataclass(owner) and name in {one.name for one in fields(owner)}:
        return None
    if isinstance(owner, type) and issubclass(owner, BaseModel) and name in owner.model_fields:
        return None
    return getattr(owner, name)


def test_words_events_and_fields_are_ours() -> None:
    """Each that stands on our side of a table is one that the code knows, or docs/output.md has."""
    known = {*RunStatus, *TaskStatus, *Level, *Maker}
    words = {word for row in rows("Words") for word in re.findall(r"`([^`]+)`", row[1])}
    assert words <= known
    assert {*RunStatus, *TaskStatus} <= words
    told = {word for name in ("Events", "Fields") for row in rows(name) for word in re.findall(r"`([^`]+)`", row[1])}
    metrics = {"pending", "by_status"}
    assert [word for word in sorted(told - metrics) if f"`{word}`" not in OUTPUT and word != "Council.subscribe"] == []
