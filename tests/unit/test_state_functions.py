"""docs/function-mapping.md names existing commands, Python names, terms, events and tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from orchestrator.domain.documents.stored import CheckpointOrigin
from orchestrator.domain.events import EVENT_TYPES
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.engine.diagnostics.findings import Level
from orchestrator.engine.reports.report import RunStatus
from tests import replaced_functions
from tests.replaced_functions import ReplacedFunctionsContract

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs/function-mapping.md").read_text()
OUTPUT: Final = (ROOT / "docs/output.md").read_text()
SECTIONS: Final = replaced_functions.sections(PAGE)

#: Other words in code spans: arguments, keys of the file, paths, and terms.
_NO_NAMES: Final = re.compile(
    r"\w+=\w+|\{.*\}|(state|state_dir|memory):|\.council/.*|async \w+|anyio\.\w+|COUNCIL_STATE"
)
_WORDS: Final = {
    *(
        "change",
        "epoch",
        "expected_version",
        "fdatasync",
        "find",
        "landed",
        "max_size",
        "names",
        "recovered_at",
        "remove",
    ),
    *("retention", "run", "idle_timeout", "ttl"),
}


def rows(section: str) -> list[list[str]]:
    """Return the cells of the tables of a section, without headers."""
    return replaced_functions.rows(SECTIONS[section])


FUNCTIONS: Final = [
    row for name in ("Distributed State Module", "State Manager Module", "State Management Framework")
    for row in rows(name)
]  # fmt: skip


STORES: Final = {"Memory": "`memory:`", "File": "file, the default", "Redis": "Redis", "Postgres": "PostgreSQL"}
"""The classes of `tests/contract/test_stores.py`, and their columns."""


def _name_tests(cell: str) -> str:
    """Return the tests of a cell; one of the store contract is named without its file and its classes."""
    classes = [f"`tests/contract/test_stores.py::Test{store}Store::" for store in STORES]
    return re.sub(r"`(test_\w+)`", lambda found: ", ".join(f"{one}{found[1]}`" for one in classes), cell)


FUNCTIONS_PER_STORE: Final = [[row[0], " ".join(row[1:-1]), _name_tests(row[-1])] for row in rows("State per store")]


class TestFunctionsPerStore(ReplacedFunctionsContract):
    """Check the functions of each store."""

    functions = FUNCTIONS_PER_STORE
    fewest = 15

    def is_word(self, name: str) -> bool:
        """Accept terms."""
        return name in _WORDS or _NO_NAMES.fullmatch(name) is not None

    def test_table_has_each_store(self) -> None:
        """In the order of the classes."""
        header = next(line for line in SECTIONS["State per store"].splitlines() if line.startswith("| "))
        assert header.strip("| ").split(" | ")[2:-1] == list(STORES.values())
        assert all(len(row) == len(STORES) + 3 and all(row) for row in rows("State per store"))


class TestFunctions(ReplacedFunctionsContract):
    """Check the functions of the three original modules."""

    functions = FUNCTIONS
    fewest = 80

    def is_word(self, name: str) -> bool:
        """Accept events and other terms."""
        return name in _WORDS or name in EVENT_TYPES or _NO_NAMES.fullmatch(name) is not None


def test_documented_events_and_fields_match_the_code() -> None:
    """Each event and field in a table exists in the code or in docs/output.md."""
    known = {*RunStatus, *TaskStatus, *Level, *CheckpointOrigin}
    words = {word for row in rows("Statuses") for word in re.findall(r"`([^`]+)`", row[1])}
    table = "docs/function-mapping.md, the table in section `Statuses`"
    assert not words - known, f"{table}: nothing is called {sorted(words - known)}"
    missing = sorted({*RunStatus, *TaskStatus} - words)
    assert not missing, f"{table}: add the statuses {missing}"
    reported = {
        word for name in ("Events", "Fields") for row in rows(name) for word in re.findall(r"`([^`]+)`", row[1])
    }
    elsewhere = {"pending", "by_status", "Council.state.subscribe"}
    assert [word for word in sorted(reported - elsewhere - EVENT_TYPES.keys()) if f"`{word}`" not in OUTPUT] == []
