"""docs/state-functions.md names commands, Python names, words, events and tests that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from orchestrator.domain.model import TaskStatus
from orchestrator.engine.findings import Level
from orchestrator.engine.report import RunStatus
from orchestrator.state.checkpoints import Maker
from tests import functions
from tests.functions import check_command, check_name, check_row, check_test, in_code

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs/state-functions.md").read_text()
OUTPUT: Final = (ROOT / "docs/output.md").read_text()
SECTIONS: Final = functions.sections(PAGE)

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
    return functions.rows(SECTIONS[section])


FUNCTIONS: Final = [
    row for name in ("Distributed State Module", "State Manager Module", "State Management Framework")
    for row in rows(name)
]  # fmt: skip


COMMANDS: Final = [name for name in in_code(FUNCTIONS, 1) if name.startswith("council ")]
_OTHERS: Final = {*COMMANDS, *_WORDS, *re.findall(r"^\| `(\w+\.\w+)`", OUTPUT, re.MULTILINE)}  # these are events
PYTHON: Final = [name for name in in_code(FUNCTIONS, 1) if name not in _OTHERS and not _NO_NAMES.fullmatch(name)]


def test_each_row_says_what_is_here_and_what_shows_it() -> None:
    """A row without a test promises what nobody has seen."""
    assert len(FUNCTIONS) > 80
    for row in FUNCTIONS:
        check_row(row)


@pytest.mark.parametrize("name", in_code(FUNCTIONS, 2))
def test_each_test_is_there(name: str) -> None:
    """By its file and its name, also where it is of a contract that the file's class has inherited."""
    check_test(name)


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_is_there(line: str) -> None:
    """With the options that are named."""
    check_command(line)


@pytest.mark.parametrize("name", PYTHON)
def test_each_name_of_python_is_there(name: str) -> None:
    """A public name, or one within a module of ours, with attributes and fields."""
    check_name(name)


def test_words_events_and_fields_are_ours() -> None:
    """Each that stands on our side of a table is one that the code knows, or docs/output.md has."""
    known = {*RunStatus, *TaskStatus, *Level, *Maker}
    words = {word for row in rows("Words") for word in re.findall(r"`([^`]+)`", row[1])}
    assert words <= known
    assert {*RunStatus, *TaskStatus} <= words
    told = {word for name in ("Events", "Fields") for row in rows(name) for word in re.findall(r"`([^`]+)`", row[1])}
    metrics = {"pending", "by_status"}
    assert [word for word in sorted(told - metrics) if f"`{word}`" not in OUTPUT and word != "Council.subscribe"] == []
