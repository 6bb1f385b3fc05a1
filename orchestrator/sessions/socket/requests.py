"""Validate session requests, which are untrusted because agents write them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from secrets import compare_digest
from typing import Any, NamedTuple

from orchestrator.client import commands, strict_json
from orchestrator.client.commands import (
    MAX_PATH_CHARS,
    MAX_PATHS,
    MAX_TEXT_CHARS,
    MAX_VERSION,
    MAX_WAIT_SECONDS,
    Argument,
    SessionCommand,
)
from orchestrator.errors import RefusedError
from orchestrator.protocols import JsonObject

_KNOWN = {**commands.SESSION_COMMANDS, **commands.HOOK_REQUESTS}
OWN_COMMAND_REMEDY = "use the `council` command of your own session"
_SEE_HELP = "`council --help` lists the commands of sessions"


class SocketRequest(NamedTuple):
    """A command of `orchestrator.client.commands` with its arguments.

    Paths are relative to the worktree.
    """

    command: str
    arguments: JsonObject


def read_request(line: bytes, token: str, tree: Path) -> SocketRequest:
    """Parse and validate a request line. Raises RefusedError."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("arguments"), dict):
        raise RefusedError("the request is not one line of JSON with a command and its arguments", _SEE_HELP)
    request_token = value.get("token")
    if not isinstance(request_token, str) or not compare_digest(request_token.encode(errors="replace"), token.encode()):
        raise RefusedError("the request is not from this session", OWN_COMMAND_REMEDY)
    command = _KNOWN.get(name) if isinstance(name := value.get("command"), str) else None
    if command is None:
        raise RefusedError("unknown command", _SEE_HELP)
    return SocketRequest(command.name, _arguments(command, value["arguments"], tree))


def _arguments(command: SessionCommand, given: JsonObject, tree: Path) -> JsonObject:
    """Return a command's valid arguments; null means absent, unless null is valid."""
    known = {argument.name: argument for argument in command.arguments}
    values = {argument.name for argument in command.arguments if argument.kind == commands.VALUE}
    arguments: JsonObject = {key: value for key, value in given.items() if value is not None or key in values}
    for key in arguments:
        if key not in known:
            takes = ", ".join(known) or "nothing"
            raise RefusedError(f"{command.name} has no argument {key[:40]!r}", f"its arguments: {takes}")
    for argument in command.arguments:
        if argument.name in arguments:
            arguments[argument.name] = _checked(argument, arguments[argument.name], tree)
        elif argument.is_word:
            raise RefusedError(f"{command.name} needs the argument {argument.name}", argument.help)
    return arguments


def _checked(argument: Argument, value: Any, tree: Path) -> Any:
    match argument.kind:
        case commands.TEXT:
            return _text(argument, value)
        case commands.PATH:
            return _path(argument, value, tree)
        case commands.PATHS:
            if not isinstance(value, Sequence) or isinstance(value, str) or not 0 < len(value) <= MAX_PATHS:
                raise _invalid_argument(argument, f"a list of 1 to {MAX_PATHS} paths")
            return list(dict.fromkeys(_path(argument, path, tree) for path in value))
        case commands.SECONDS | commands.VERSION:
            return _number(argument, value)
        case commands.VALUE:
            return _value(argument, value)
        case commands.OBJECT:
            return _object(argument, value)
        case other:
            raise ValueError(f"unknown kind of argument: {other!r}")


def _text(argument: Argument, value: Any, longest: int = MAX_TEXT_CHARS) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > longest or not _is_plain(value):
        raise _invalid_argument(argument, f"text of 1 to {longest} characters")
    if argument.choices and value not in argument.choices:
        raise _invalid_argument(argument, f"one of {', '.join(argument.choices)}")
    return value


def _number(argument: Argument, value: Any) -> float:
    if argument.kind == commands.VERSION:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_VERSION:
            raise _invalid_argument(argument, "a version: an integer of at least 0")
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MAX_WAIT_SECONDS:
        raise _invalid_argument(argument, f"seconds, from 0 to {MAX_WAIT_SECONDS:g}")
    return float(value)


def _value(argument: Argument, value: Any) -> Any:
    try:
        strict_json.check_value(value)
    except ValueError as error:
        raise RefusedError(f"invalid {argument.name}: {error}", "use plain JSON") from None
    return value


def _object(argument: Argument, value: Any) -> JsonObject:
    if isinstance(value, str):  # models often write objects as text
        try:
            value = strict_json.parse(value.encode())
        except ValueError as error:
            raise RefusedError(f"invalid {argument.name}: {error}", "use a JSON object") from None
    if not isinstance(value, dict):
        raise _invalid_argument(argument, "a JSON object")
    checked: JsonObject = _value(argument, value)
    return checked


def _path(argument: Argument, value: Any, tree: Path) -> str:
    text = _text(argument, value, MAX_PATH_CHARS)
    inside = os.path.relpath(os.path.join(tree, text), tree)  # noqa: PTH118  must not access the disk
    if inside in {os.curdir, os.pardir} or inside.startswith(f"{os.pardir}{os.sep}"):
        raise _invalid_argument(argument, "paths of files or folders in the worktree")
    return inside


def _is_plain(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a surrogate
        return False
    return "\0" not in text


def _invalid_argument(argument: Argument, wanted: str) -> RefusedError:
    return RefusedError(f"invalid {argument.name}", f"give {wanted}")
