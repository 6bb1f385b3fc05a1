"""The entry point of the session commands, from the command line to the exit code.

Exit codes: 0 success; 1 rejected, for example because another session owns the file; 2 bad input or no active session.
"""

from __future__ import annotations

import json
import os
import sys

from orchestrator.client.commands import MAX_WAIT_SECONDS, OBJECT, PATH, PATHS, SECONDS, VALUE
from orchestrator.client.messages import format_result, join_lines, strip_control_characters
from orchestrator.client.quick_parser import ParsedCommand, parse_words
from orchestrator.client.session import ANSWER_TIMEOUT, SessionConnection, SessionRequestError, find_session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

#: The names of the hooks: `council hook NAME`.
HOOKS = ("pre-edit", "post-tool", "stop")
EXIT_REFUSED = 1
EXIT_BAD_INPUT = 2


def run(words: Sequence[str]) -> int | None:
    """Run a session command and return its exit code; None for other commands."""
    if len(words) == 2 and words[0] == "hook" and words[1] in HOOKS:
        from orchestrator.client import hook  # noqa: PLC0415  only when needed

        return hook.run(words[1], sys.stdin.buffer, sys.stdout)
    if len(words) > 2 and list(words[:2]) == ["slot", "--"]:
        from orchestrator.client import slot  # noqa: PLC0415  only when needed

        return slot.run(words[2:])
    typed = parse_words(words)
    # Outside a session, the full command line handles commands that are available everywhere.
    return None if typed is None or (typed.command.is_for_all and not is_in_session()) else run_session_command(typed)


def is_in_session() -> bool:
    """Return True if this process is part of an active session."""
    try:
        find_session(os.environ, os.getcwd())  # noqa: PTH109  pathlib takes 10 ms
    except (SessionRequestError, FileNotFoundError):
        return False
    return True


def run_session_command(typed: ParsedCommand) -> int:
    """Send a command to the orchestrator, print the result, and return the exit code."""
    try:
        result = ask_current_session(typed)
    except SessionRequestError as error:
        code = EXIT_REFUSED if error.is_refused else EXIT_BAD_INPUT
        if typed.as_json:
            _print({"status": "refused", "error": error.message, "remedy": error.remedy, "exit": code})
        else:
            sys.stderr.write(strip_control_characters(f"council: {join_lines(str(error))}\n"))
        return code
    if typed.as_json:
        _print({**result, "exit": 0})
    else:
        sys.stdout.write(strip_control_characters(format_result(typed.command.name, result)))
    return 0


def ask_current_session(typed: ParsedCommand) -> Mapping[str, Any]:
    """Send a command on behalf of this process's session.

    Raises SessionRequestError.
    """
    try:
        cwd = os.getcwd()  # noqa: PTH109  pathlib takes 10 ms
    except FileNotFoundError:
        raise SessionRequestError("the current folder no longer exists", "cd to an existing folder") from None
    session = find_session(os.environ, cwd)
    if any(argument.kind in {VALUE, OBJECT} for argument in typed.command.arguments):
        from orchestrator.client.values import resolve_arguments  # noqa: PLC0415  only when needed

        typed = ParsedCommand(typed.command, resolve_arguments(typed.command, typed.arguments), as_json=typed.as_json)
    return ask_session(session, typed, cwd)


def ask_session(session: SessionConnection, typed: ParsedCommand, cwd: str) -> Mapping[str, Any]:
    """Send a command on behalf of a session; paths are relative to `cwd`.

    Raises SessionRequestError.
    """
    arguments = dict(typed.arguments)
    for argument in typed.command.arguments:
        value = arguments.get(argument.name)
        if argument.kind == PATH and isinstance(value, str):
            arguments[argument.name] = _relative_path(session, value, cwd)
        elif argument.kind == PATHS and isinstance(value, list):
            arguments[argument.name] = [_relative_path(session, path, cwd) for path in value]
    wait_name = next((argument.name for argument in typed.command.arguments if argument.kind == SECONDS), None)
    # Without an explicit wait, the run's setting applies, which is not known here.
    wait = 0.0 if wait_name is None else arguments.get(wait_name, MAX_WAIT_SECONDS)
    return session.ask(typed.command.name, arguments, ANSWER_TIMEOUT + (wait if isinstance(wait, int | float) else 0))


def _relative_path(session: SessionConnection, path: Any, cwd: str) -> Any:
    """Return a path relative to the worktree; return other values unchanged."""
    if not isinstance(path, str) or "\0" in path:
        return path
    relative = session.relative_path(path, cwd)
    if relative is None:
        raise SessionRequestError(f"{path} is outside this session's worktree", f"use a path in {session.tree}")
    return relative


def _print(value: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
