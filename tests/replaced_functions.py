"""Pages that map functions of earlier designs: their tables, and the existence of the named replacements."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property, reduce
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, get_type_hints

import click
import pytest
from pydantic import BaseModel

import orchestrator
from orchestrator.cli.main import main


class ReplacedFunctionsContract:
    """The contract of such a page; a subclass defines the rows of its tables."""

    functions: ClassVar[Sequence[Sequence[str]]]
    """The rows: what there was, what is here now, and the tests that show it."""
    fewest: ClassVar[int]
    """How many rows there are at the least."""

    def is_word(self, name: str) -> bool:
        """Return whether a code span is neither a command nor a Python name; defined by subclasses."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrize by everything that the tables name."""
        here = code_spans(self.functions, 1)
        commands = [name for name in here if name.startswith("council ")]
        cases = {
            "line": commands,
            "name": [name for name in here if name not in commands and not self.is_word(name)],
            "test": code_spans(self.functions, 2),
        }
        for argument in cases.keys() & {*metafunc.fixturenames}:
            metafunc.parametrize(argument, cases[argument])

    def test_each_row_names_an_implementation_and_a_test(self) -> None:
        """A replacement without a test is unverified."""
        assert len(self.functions) > self.fewest
        for row in self.functions:
            assert len(row) == 3, row
            assert re.fullmatch(r"(`tests/[\w/]+\.py(::\w+)+`(, )?)+", row[2]), row

    def test_each_documented_test_exists(self, test: str) -> None:
        """By file and name, including tests inherited from a contract."""
        check_test(test)

    def test_each_documented_command_exists(self, line: str) -> None:
        """With the named options."""
        _, *words = line.split()
        command: click.Command = main
        while isinstance(command, click.Group):
            found = command.get_command(click.Context(command), words[0])
            assert found is not None, f"{command.name} has no {words[0]}"
            command, words = found, words[1:]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known

    def test_each_documented_python_name_exists(self, name: str) -> None:
        """A public name, or one in a module of ours, with attributes and fields."""
        owner, steps = _owner(name.split("."))
        for step in steps:
            owner = _attribute(owner, step)


def sections(page: str) -> dict[str, str]:
    """Return the sections of a page by heading."""
    return dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))


def rows(section: str) -> list[list[str]]:
    """Return the cells of the tables of a section, without headers."""
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [
        cells for line in lines if (cells := line.strip("| ").split(" | "))[0] not in {"earlier design", "variable"}
    ]


def code_spans(table: Sequence[Sequence[str]], column: int) -> list[str]:
    """Return the code spans of a column without duplicates."""
    return list(dict.fromkeys(name for row in table for name in re.findall(r"`([^`]+)`", row[column])))


def check_test(name: str) -> None:
    """Check that a test exists by file and name, including tests inherited from a contract."""
    path, *names = name.split("::")
    assert names[-1].startswith("test_")
    module = import_module(path.removesuffix(".py").replace("/", "."))
    assert callable(reduce(getattr, names, module))


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
    found = getattr(owner, name)
    return get_type_hints(found.func)["return"] if isinstance(found, cached_property) else found
