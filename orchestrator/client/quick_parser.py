"""The fast parser of the session commands.

Help and errors are left to the full command line.
"""

from __future__ import annotations

from orchestrator.client.commands import (
    COMMANDS_BY_WORDS,
    MAX_VERSION,
    OBJECT,
    PATHS,
    SECONDS,
    STANDARD_INPUT,
    VERSION,
    SessionCommand,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


class ParsedCommand:
    """A command with its arguments and its output format."""

    __slots__ = ("arguments", "as_json", "command")

    def __init__(self, command: SessionCommand, arguments: dict[str, Any], *, as_json: bool) -> None:
        self.command, self.arguments, self.as_json = command, arguments, as_json


def is_session_command(words: Sequence[str]) -> bool:
    """Return True if a session command or the hook is invoked.

    Its arguments may be invalid.
    """
    return (
        words[:1] in (["hook"], ["slot"])
        or tuple(words[:1]) in COMMANDS_BY_WORDS
        or tuple(words[:2]) in COMMANDS_BY_WORDS
    )


def parse_words(words: Sequence[str]) -> ParsedCommand | None:
    """Parse the words after `council`; return None unless they are valid."""
    command = COMMANDS_BY_WORDS.get(tuple(words[:1])) or COMMANDS_BY_WORDS.get(tuple(words[:2]))
    if command is None:
        return None
    options = {argument.option: argument for argument in command.arguments if not argument.is_word}
    arguments: dict[str, Any] = {}
    positionals: list[str] = []
    as_json = False
    rest = iter(words[len(command.typed) :])
    for word in rest:
        if word == "--json":
            as_json = True
        elif word == "--":
            positionals += rest
        elif not word.startswith("-") or word == "-":
            positionals.append(word)
        else:
            name, equals, value = word.partition("=")
            option = options.get(name)
            given = value if equals else next(rest, None)
            if option is None or given is None or (option.choices and given not in option.choices):
                return None
            if option.kind == PATHS:
                arguments.setdefault(option.name, []).append(given)
            elif option.kind not in _NUMBERS:
                arguments[option.name] = given
            elif (number := _NUMBERS[option.kind](given)) is not None:
                arguments[option.name] = number
            else:
                return None
    is_valid = _assign_positionals(command, positionals, arguments)
    return ParsedCommand(command, arguments, as_json=as_json) if is_valid else None


def _assign_positionals(command: SessionCommand, positionals: list[str], arguments: dict[str, Any]) -> bool:
    """Assign positional words to their arguments; return True if the number fits."""
    expected = [argument for argument in command.arguments if argument.is_word]
    if expected and expected[0].kind == PATHS:
        arguments[expected[0].name] = positionals
        return bool(positionals)
    if not positionals and [argument.kind for argument in expected] == [OBJECT]:
        positionals = [STANDARD_INPUT]
    arguments.update((argument.name, word) for argument, word in zip(expected, positionals, strict=False))
    return len(positionals) == len(expected)


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _version(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < len(str(MAX_VERSION)) else None


_NUMBERS = {SECONDS: _seconds, VERSION: _version}
