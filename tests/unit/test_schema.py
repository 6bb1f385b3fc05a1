"""The JSON Schema accepts and rejects the same files as the loader, as far as a schema can."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ConfigDict

from adapters.command.adapter import CommandAdapter
from orchestrator.cli.commands.setup.schema import event_schema, result_schema, task_details_schema
from orchestrator.config.json_schema import file_schema
from orchestrator.config.source.document import read_document
from orchestrator.config.source.problems import Problems
from orchestrator.domain.settings.names import (
    BRANCH_PATTERN,
    KEPT_PATTERN,
    NAME_PATTERN,
    PATH_PATTERN,
    check_branch,
    check_kept_path,
    check_name,
    check_path,
)
from orchestrator.domain.settings.quantities import (
    DURATION_PATTERN,
    OPTIONAL_DURATION_PATTERN,
    SIZE_PATTERN,
    parse_duration,
    parse_optional_duration,
    parse_size,
)
from orchestrator.plugins import load_plugins
from tests.unit.test_config_from_value import read
from tests.unit.test_config_load import FULL, SMALLEST, WORKTREES
from tests.unit.test_config_mistakes import ONE_MISTAKE

ROOT = Path(__file__).parents[2]
SCHEMA = file_schema({"command": CommandAdapter})
MINIMAL: dict[str, Any] = {
    "version": 1,
    "adapters": {"x": {"use": "command", "argv": ["x"]}},
    "tasks": [{"id": "a", "prompt": "p"}],
}
EXAMPLES = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/configuration.md").read_text(), re.DOTALL)
EDITOR_LINE = "# yaml-language-server: $schema=council.schema.json\n"

#: Mistakes that a schema cannot detect: they depend on the system, on other parts of the file, or on its notation.
BEYOND = {
    "unknown fallback",
    "unknown adapter", "unknown adapter like a type", "unknown adapter, type with options", "no adapter at all",
    "unknown default adapter", "several adapters, none named", "duplicate id", "same but for case",
    "self-need", "missing need", "missing built need", "circle", "circle of built needs",
    "prompt file missing", "prompt file is a folder", "no folder",
    "unknown scheme", "password in the URL", "remote helper", "option as repo",
    "version 1.0", "long duration", "unknown placeholder",
    "env name", "env key", "git env", "copy and link", "link in a copy", "copy from a URL", "link from a URL",
    "localhost without a port", "hosts without a sandbox", "no network without a sandbox",
    "key in a step", "key in a command", "rule of nothing", "no path in a rule", "no path in a when", "resume of none",
}  # fmt: skip


def faults(value: Any, schema: dict[str, Any] = SCHEMA) -> list[str]:
    return [error.message for error in Draft202012Validator(schema).iter_errors(value)]


def parsed(text: str) -> Any:
    problems = Problems("x")
    node = read_document(text, problems)
    assert node is not None
    assert not problems
    return node.value


def test_schemas_are_valid() -> None:
    """By the dialect that each names."""
    for schema in (SCHEMA, event_schema(), result_schema(), task_details_schema()):
        assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
        Draft202012Validator.check_schema(schema)


def test_shipped_schema_matches_the_code() -> None:
    """`make schema` regenerates it."""
    assert json.loads((ROOT / "configs/council.schema.json").read_text()) == file_schema(load_plugins().adapters)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_files_are_valid_and_name_their_schema(path: Path) -> None:
    """The first line of each file under configs/ names the schema next to it."""
    assert path.read_text().startswith(EDITOR_LINE)
    assert faults(parsed(path.read_text()), file_schema(load_plugins().adapters)) == []


@pytest.mark.parametrize("text", [SMALLEST, FULL, SMALLEST + WORKTREES], ids=["smallest", "full", "worktrees"])
def test_files_that_load_are_valid(text: str) -> None:
    """Each file that another test loads validates."""
    assert faults(parsed(text.removeprefix("%YAML 1.2\n"))) == []


def test_documentation_examples_are_valid() -> None:
    """Each piece of YAML validates once the required keys are added."""
    assert EXAMPLES
    schema = file_schema(load_plugins().adapters)
    for text in EXAMPLES:
        assert faults({**MINIMAL, **parsed(text)}, schema) == [], text


def test_quick_start_file_is_valid_and_names_its_schema() -> None:
    """The first example of the quick start is a complete file."""
    match = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/quick-start.md").read_text(), re.DOTALL)
    assert match
    assert match[1].startswith(EDITOR_LINE)
    assert faults(parsed(match[1]), file_schema(load_plugins().adapters)) == []


@pytest.mark.parametrize("name", ONE_MISTAKE)
def test_mistakes_are_found_by_the_schema(name: str) -> None:
    """The schema rejects every mistake in the shape of values."""
    content = ONE_MISTAKE[name][0]
    value = read(content) if isinstance(content, str) else None
    if value is None:
        return  # the value has no schema violation
    assert bool(faults(value)) is (name not in BEYOND)


def test_rules_beyond_the_schema_are_ours() -> None:
    """The list of exceptions contains real mistakes only."""
    assert set(ONE_MISTAKE) >= BEYOND


def test_duplicate_rules_are_checked_by_us() -> None:
    """A duplicate failure class is accepted, a duplicate need is a mistake."""
    task = MINIMAL["tasks"][0]
    assert faults({**MINIMAL, "defaults": {"retry_on": ["crashed", "crashed"]}}) == []
    assert faults({**MINIMAL, "tasks": [{**task, "needs": ["b", "b"]}]}) != []


def test_unknown_adapter_type_gets_one_message() -> None:
    """Options of an unknown adapter type are not validated."""
    value = {**MINIMAL, "adapters": {"x": {"use": "comand", "whatever": 1}}}
    assert faults(value) == ["'comand' is not one of ['command']"]


class _Limits(BaseModel):
    model_config = ConfigDict(extra="forbid")
    turns: int


class _NestedOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    limits: _Limits | None = None


class _Nested(CommandAdapter):
    """A plugin type whose options contain a model."""

    Options: ClassVar[type[BaseModel]] = _NestedOptions


def test_plugin_options_may_contain_models() -> None:
    """Types are distinguished by name, and each entry is validated by its own type."""
    schema = file_schema({"command": CommandAdapter, "nested": _Nested})

    def is_rejected(entry: dict[str, Any]) -> bool:
        return bool(faults({**MINIMAL, "adapters": {"x": {"capacity": 1, **entry}}}, schema))

    assert not is_rejected({"use": "nested"})
    assert not is_rejected({"use": "nested", "limits": {"turns": 3}})
    assert not is_rejected({"use": "command", "argv": ["x"]})
    assert is_rejected({"use": "nested", "limits": {"turn": 3}})
    assert is_rejected({"use": "nested", "argv": ["x"]})
    assert is_rejected({"use": "command", "argv": ["x"], "limits": {"turns": 3}})


def test_every_key_has_a_description() -> None:
    """Editors show a description for every key of the file and of the adapters."""
    for name, model in {**SCHEMA["$defs"], "file": SCHEMA}.items():
        for key, described in model.get("properties", {}).items():
            if described is not True:
                assert described.get("description") or "$ref" in described, f"{name}.{key}"


def _is_taken(check: Any, text: str) -> bool:
    try:
        check(text)
    except ValueError:
        return False
    return True


_PIECES = (
    "a", "B", "7", ".", "..", "/", "-", "_", "lock", ".lock", "@", "{", "~", "HEAD", "refs/", " ", "\\", "[",
    "\x7f", "é",
)  # fmt: skip


def _texts(pieces: tuple[str, ...]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces), max_size=6).map("".join)


@given(_texts((".", "..", "/", ".git", ".GiT", "\\", "\n", "\0", "a", " ", "é", "*", "?", "[", "]", "-", "~")))
@example("a/")
@example("a\n")
@example("/a")
@example("a/.git/")
def test_path_patterns_match_the_code(text: str) -> None:
    """Editors reject the same paths as the loader."""
    assert (re.search(PATH_PATTERN, text) is not None) == _is_taken(check_path, text)
    assert (re.search(KEPT_PATTERN, text) is not None) == _is_taken(check_kept_path, text)


@given(_texts(_PIECES))
@example("a" * 64)
@example("a" * 65)
def test_name_and_branch_patterns_match_the_code(text: str) -> None:
    """The single pattern for editors matches the validator."""
    assert (re.search(NAME_PATTERN, text) is not None) == _is_taken(check_name, text)
    assert (re.search(BRANCH_PATTERN, text) is not None) == _is_taken(check_branch, text)


_AMOUNTS = ("0", "1", "30", "d", "h", "m", "s", "ms", "K", "M", "i", "B", "GB", "off", " ", ".")


@given(_texts(_AMOUNTS))
@example("1d2h3m4s5ms")
@example("0s")
def test_quantity_patterns_match_the_code(text: str) -> None:
    """For durations and sizes; a pattern has no upper bound."""
    for pattern, parse in (
        (DURATION_PATTERN, parse_duration),
        (OPTIONAL_DURATION_PATTERN, parse_optional_duration),
        (SIZE_PATTERN, parse_size),
    ):
        matched = re.search(pattern, text) is not None
        assert matched or not _is_taken(parse, text)
        if matched:
            assert _is_taken(parse, text) or _is_too_much(parse, text)


def _is_too_much(parse: Any, text: str) -> bool:
    with pytest.raises(ValueError, match=r"too long|out of range"):
        parse(text)
    return True
