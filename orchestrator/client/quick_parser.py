"""What is typed, read the quick way: whatever is not plain is left to the full command line, which explains it."""

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
    """A command with its arguments, and whether JSON is wanted."""

    __slots__ = ("arguments", "as_json", "command")

    def __init__(self, command: SessionCommand, arguments: dict[str, Any], *, as_json: bool) -> None:
        self.command, self.arguments, self.as_json = command, arguments, as_json


def parse_words(words: Sequence[str]) -> ParsedCommand | None:
    """Return what the words after `council` ask for; None where they are none of these commands, or not right."""
    command = COMMANDS_BY_WORDS.get(tuple(words[:1])) or COMMANDS_BY_WORDS.get(tuple(words[:2]))
    if command is None:
        return None
    options = {one.option: one for one in command.arguments if not one.is_word}
    found: dict[str, Any] = {}
    plain: list[str] = []
    as_json = False
    rest = iter(words[len(command.typed) :])
    for word in rest:
        if word == "--json":
            as_json = True
        elif word == "--":
            plain += rest
        elif not word.startswith("-") or word == "-":
            plain.append(word)
        else:
            name, equals, value = word.partition("=")
            option = options.get(name)
            given = value if equals else next(rest, None)
            if option is None or given is None or (option.choices and given not in option.choices):
                return None
            if option.kind == PATHS:
                found.setdefault(option.name, []).append(given)
            elif option.kind not in _NUMBERS:
                found[option.name] = given
            elif (number := _NUMBERS[option.kind](given)) is not None:
                found[option.name] = number
            else:
                return None
    return ParsedCommand(command, found, as_json=as_json) if _assign_positionals(command, plain, found) else None


def _assign_positionals(command: SessionCommand, plain: list[str], found: dict[str, Any]) -> bool:
    """Put plain words where they belong; return whether that is right."""
    places = [one for one in command.arguments if one.is_word]
    if places and places[0].kind == PATHS:
        found[places[0].name] = plain
        return bool(plain)
    if not plain and [one.kind for one in places] == [OBJECT]:
        plain = [STANDARD_INPUT]
    found.update((one.name, word) for one, word in zip(places, plain, strict=False))
    return len(plain) == len(places)


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _version(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < len(str(MAX_VERSION)) else None


_NUMBERS = {SECONDS: _seconds, VERSION: _version}
