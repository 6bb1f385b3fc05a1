"""Parse a strict subset of YAML into plain values with positions.

The subset of YAML 1.2: one document, a mapping at the top, unique text keys, and plain scalars of the core schema.
Aliases, anchors, merge keys and tags are rejected. Values are built without recursion from the parser's event stream,
because only events have the positions of all aliases, tags and keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import yaml

from orchestrator.config.source.problems import Position, Problems
from orchestrator.config.source.scalars import resolve_plain
from orchestrator.domain.wording import quote_text
from orchestrator.errors import InvalidValue

MAX_DEPTH: Final = 64
"""The maximum nesting depth of collections."""

# The YAML reader stops at the first of these characters; they are replaced so that the rest can be read.
_NOT_PRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Escapes in double quotes can still produce characters that are invalid in program arguments and JSON.
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
#: Written as `!!` in a file.
_STANDARD_TAG: Final = "tag:yaml.org,2002:"
_LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_START: Final = Position(1, 1)

#: The first keys of a run's file.
RUN_KEYS: Final = "version, adapters and tasks"

UNREADABLE: Final = object()
"""The value of a rejected node; its problem is already reported."""


_NOTHING: Final[Mapping[Any, Any]] = MappingProxyType({})


class Node(NamedTuple):
    """A value and its start position.

    `value` is plain data: None, bool, int, float, str, list, dict, or UNREADABLE. `children` has the nodes of its
    items by key or index, `keys` the positions of a mapping's keys.
    """

    at: Position
    value: Any
    children: Mapping[str | int, Node] = _NOTHING
    keys: Mapping[str, Position] = _NOTHING

    def get(self, *path: str | int) -> Node | None:
        """Return the node at a path of keys and indexes, None if there is none."""
        node: Node | None = self
        for part in path:
            node = node.children.get(part) if node is not None else None
        return node

    def walk(self) -> Iterator[Node]:
        """Yield this node and all nodes in it."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())


def read_document(text: str, problems: Problems, keys: str = RUN_KEYS) -> Node | None:
    """Return the top mapping; None, with errors in `problems`, if it can't be parsed.

    After a syntax error the rest of the file is unknown, so nothing is returned. `keys` are the first keys of such a
    file, for remedies.
    """
    text = _printable(text, problems)
    builder = _Builder(problems, keys)
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if not builder.take(event):
                break
    except yaml.MarkedYAMLError as error:
        problems.add(*_syntax_error(error, text))
        return None
    except (ValueError, OverflowError):
        # Only in the pure Python reader, which passes escapes such as "\Uffffffff" to chr() unchecked.
        problems.add(builder.last, "an escape after this position is not a valid character", "use the character itself")
        return None
    return builder.result()


def find_invalid_character(text: str) -> str | None:
    """Return the first character invalid in arguments or JSON, or None."""
    found = _NOT_TEXT.search(text)
    return None if found is None else found[0]


def _printable(text: str, problems: Problems) -> str:
    line, begin, seen = 1, 0, 0
    for found in _NOT_PRINTABLE.finditer(text):
        for line_break in _LINE_BREAK.finditer(text, seen, found.start()):
            line, begin = line + 1, line_break.end()
        seen = found.start()
        at = Position(line, seen - begin + 1)
        problems.add(at, f"the character {found[0]!r} is not allowed", "remove it, or use an escape in quotes")
    return _NOT_PRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


class _Refused:
    """The marker of a rejected key, whose value is read and dropped."""


_REFUSED: Final = _Refused()


@dataclass(slots=True)
class _Open:
    """An open collection, and for a mapping the key that waits for its value."""

    at: Position
    value: dict[str, Any] | list[Any]
    children: dict[str | int, Node] = field(default_factory=dict)
    keys: dict[str, Position] = field(default_factory=dict)
    key: str | _Refused | None = None

    def closed(self) -> Node:
        return Node(self.at, self.value, self.children, self.keys)


class _Builder:
    """Builds nodes from events; `last` is the position of the newest event."""

    def __init__(self, problems: Problems, keys: str) -> None:
        self.last = _START
        self._keys = keys
        self._problems = problems
        self._root: Node | None = None
        self._open: list[_Open] = []
        self._documents = 0
        self._too_deep = False

    def result(self) -> Node | None:
        """Return the top mapping."""
        root = self._root
        if self._too_deep:
            return None
        if root is None or root.value is None:
            self._problems.add(_START, "the file is empty", f"add the keys {self._keys}")
            return None
        if root.value is UNREADABLE:
            return None
        if not isinstance(root.value, dict):
            self._problems.add(root.at, "the file is not a mapping", f"start with the keys {self._keys}")
            return None
        return root

    def take(self, event: yaml.Event) -> bool:
        """Handle one event; return False to stop reading."""
        mark = event.start_mark
        self.last = at = Position(mark.line + 1, mark.column + 1) if mark is not None else self.last
        match event:
            case yaml.ScalarEvent():
                self._place(Node(at, self._scalar(event, at)), plain=event.implicit[0] and not event.style)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                return self._start(event, at)
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                self._place(self._open.pop().closed())
            case yaml.AliasEvent():
                self._problems.add(at, "aliases are not supported", f"repeat the value of *{event.anchor} in full")
                self._place(Node(at, UNREADABLE))
            case yaml.DocumentStartEvent():
                return self._start_document(at)
        return True

    def _start_document(self, at: Position) -> bool:
        self._documents += 1
        if self._documents > 1:
            self._problems.add(at, "a second document starts here", "use one file per run")
        return self._documents == 1

    def _start(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent, at: Position) -> bool:
        self._refuse_properties(event, at)
        if len(self._open) == MAX_DEPTH:
            self._problems.add(at, f"more than {MAX_DEPTH} nested collections", "reduce the nesting")
            self._too_deep = True
            return False
        self._open.append(_Open(at, {} if isinstance(event, yaml.MappingStartEvent) else []))
        return True

    def _scalar(self, event: yaml.ScalarEvent, at: Position) -> Any:
        if self._refuse_properties(event, at):
            return UNREADABLE
        if event.style or not event.implicit[0]:
            return self._quoted(event.value, at)
        try:
            return resolve_plain(event.value)
        except InvalidValue as error:
            self._problems.add(at, error.message, error.remedy)
            return UNREADABLE

    def _quoted(self, text: str, at: Position) -> Any:
        found = find_invalid_character(text)
        if found is None:
            return text
        self._problems.add(at, f"the text contains the character {found!r}", "remove that escape")
        return UNREADABLE

    def _refuse_properties(
        self, event: yaml.ScalarEvent | yaml.MappingStartEvent | yaml.SequenceStartEvent, at: Position
    ) -> bool:
        if event.anchor is not None:
            self._problems.add(at, "anchors are not supported", f"remove &{event.anchor}")
        if event.tag is not None:
            tag = quote_text(event.tag.replace(_STANDARD_TAG, "!!", 1))
            self._problems.add(at, "tags are not supported", f"remove {tag}, and quote values that must be text")
        return event.tag is not None

    def _place(self, node: Node, *, plain: bool = False) -> None:
        if not self._open:
            self._root = node
            return
        parent = self._open[-1]
        if isinstance(parent.value, list):
            parent.children[len(parent.value)] = node
            parent.value.append(node.value)
        elif parent.key is None:
            parent.key = self._key(parent.keys, node, plain=plain)
        else:
            if isinstance(parent.key, str):
                parent.children[parent.key] = node
                parent.value[parent.key] = node.value
            parent.key = None

    def _key(self, keys: dict[str, Position], node: Node, *, plain: bool) -> str | _Refused:
        key = node.value
        if key is UNREADABLE:
            return _REFUSED
        if not isinstance(key, str):
            self._problems.add(node.at, "a key must be text", "use a word, in quotes if it looks like another type")
        elif key == "<<" and plain:
            self._problems.add(node.at, "merge keys are not supported", "repeat the keys in full")
        elif key in keys:
            first = keys[key].line
            self._problems.add(
                node.at, f"the key {quote_text(key)} is already defined on line {first}", "keep one of the two"
            )
        else:
            keys[key] = node.at
            return key
        return _REFUSED


_SYNTAX_REMEDIES: Final = (
    ("mapping values are not allowed", "indent the keys of a mapping equally, and quote text that contains ': '"),
    ("cannot start any token", "quote text that begins with @, ` or %"),
    ("',' or '", "close the bracket, with commas between its items"),
    ("unexpected end of stream", "close the quotes"),
    ("escape", "double the backslash, or use single quotes"),
    ("<document start>", "use one file per run"),
)


def _syntax_error(error: yaml.MarkedYAMLError, text: str) -> tuple[Position, str, str]:
    mark = error.problem_mark or error.context_mark
    # An unclosed construct is reported at the end; its start is more helpful.
    if mark is not None and error.context_mark is not None and mark.index >= len(text.rstrip()):
        mark = error.context_mark
    at = Position(mark.line + 1, mark.column + 1) if mark else _START
    message = error.problem or "invalid YAML"
    if mark and text[mark.index : mark.index + 1] == "\t":
        return at, "indentation by a tab", "use spaces"
    found = (remedy for part, remedy in _SYNTAX_REMEDIES if part in message)
    remedy = next(found, "check the indentation and punctuation here, and quote text with punctuation")
    return at, f"{message} ({error.context})" if error.context else message, remedy
