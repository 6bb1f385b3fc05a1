"""Convert plain Python values to nodes, under the same rules as for a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.config.source.document import MAX_DEPTH, UNREADABLE, Node, find_invalid_character
from orchestrator.config.source.problems import Position, Problems
from orchestrator.config.source.scalars import check_number
from orchestrator.domain.wording import quote_text
from orchestrator.errors import InvalidValue


def read_value(value: Mapping[str, Any], problems: Problems) -> Node | None:
    """Return a mapping as the top node of a run; None if it is nested too deeply.

    Errors are added to `problems`. Supported are None, bool, int, float, str, paths (as text), and lists, tuples and
    mappings of these. Positions are paths of keys and indexes, such as `tasks[0].prompt`.
    """
    try:
        return _Reader(problems).read(value, "", 0)
    except _TooDeep:
        return None


class _TooDeep(Exception):
    """The value is nested too deeply."""


class _Reader:
    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._places = 0

    def read(self, value: Any, path: str, depth: int) -> Node:
        at = self._place(path)
        match value:
            case None | bool():
                return Node(at, value)
            case int() | float():
                return Node(at, self._number(value, at))
            case str():
                return Node(at, self._text(value, at))
            case os.PathLike():
                return Node(at, self._text(os.fsdecode(value), at))
            case Mapping() | list() | tuple():
                return self._collection(value, at, depth)
        self._problems.add(
            at, f"unsupported value of type {type(value).__name__}", "use text, a number, a list or a dict"
        )
        return Node(at, UNREADABLE)

    def _place(self, path: str) -> Position:
        self._places += 1
        return Position(0, self._places, path)

    def _number(self, number: float, at: Position) -> Any:
        try:
            check_number(number)
        except InvalidValue as error:
            self._problems.add(at, error.message, error.remedy)
            return UNREADABLE
        return int(number) if isinstance(number, int) else float(number)

    def _text(self, text: str, at: Position) -> Any:
        text = str.__str__(text)  # the plain text of an enum member
        found = find_invalid_character(text)
        if found is None:
            return text
        self._problems.add(at, f"the text contains the character {found!r}", "remove it")
        return UNREADABLE

    def _collection(self, value: Mapping[Any, Any] | Iterable[Any], at: Position, depth: int) -> Node:
        if depth == MAX_DEPTH:
            self._problems.add(at, f"more than {MAX_DEPTH} nested collections", "reduce the nesting")
            raise _TooDeep
        if isinstance(value, Mapping):
            return self._mapping(value, at, depth)
        children: dict[str | int, Node] = {}
        for index, item in enumerate(value):
            children[index] = self.read(item, f"{at.path}[{index}]", depth + 1)
        return Node(at, [child.value for child in children.values()], children)

    def _mapping(self, value: Mapping[Any, Any], at: Position, depth: int) -> Node:
        children: dict[str | int, Node] = {}
        keys: dict[str, Position] = {}
        for key, item in value.items():
            if not isinstance(key, str) or find_invalid_character(key) is not None:
                self._problems.add(at, f"the key {quote_text(str(key))} is not text", "use a word")
                continue
            name = str.__str__(key)
            path = f"{at.path}.{name}" if at.path else name
            keys[name] = self._place(path)
            children[name] = self.read(item, path, depth + 1)
        return Node(at, {key: child.value for key, child in children.items()}, children, keys)
