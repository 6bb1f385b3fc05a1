"""The commands that a program in a session types, from its words to the exit code.

0 done · 1 refused, for example because another session has the file · 2 bad input, or no session to ask
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

EXIT_REFUSED = 1
EXIT_BAD_INPUT = 2


def run(words: Sequence[str]) -> int | None:
    """Do what the words after `council` ask for, and return the exit code; None where they are for somebody else."""
    if words[:2] == ["hook", "pre-edit"] and len(words) == 2:
        from orchestrator.client import hook

        return hook.run(sys.stdin.buffer, sys.stdout)
    typed = parse_words(words)
    # What others can ask for, too, is theirs where there is no session.
    return None if typed is None or (typed.command.is_for_all and not is_in_session()) else run_session_command(typed)


def is_in_session() -> bool:
    """Whether this process is part of a session that is at work."""
    try:
        find_session(os.environ, os.getcwd())
    except (SessionRequestError, FileNotFoundError):
        return False
    return True


def run_session_command(typed: ParsedCommand) -> int:
    """Ask the orchestrator, print what it says, and return the exit code."""
    try:
        result = ask_current_session(typed)
    except SessionRequestError as error:
        code = EXIT_REFUSED if error.is_refused else EXIT_BAD_INPUT
        if typed.as_json:
            _print({"status": "refused", "error": error.what, "remedy": error.remedy, "exit": code})
        else:
            sys.stderr.write(strip_control_characters(f"council: {join_lines(str(error))}\n"))
        return code
    if typed.as_json:
        _print({**result, "exit": 0})
    else:
        sys.stdout.write(strip_control_characters(format_result(typed.command.name, result)))
    return 0


def ask_current_session(typed: ParsedCommand) -> Mapping[str, Any]:
    """Ask as the session that this process is in; raises AskError."""
    try:
        cwd = os.getcwd()
    except FileNotFoundError:
        raise SessionRequestError("the current folder does not exist any more", "cd to one that does") from None
    session = find_session(os.environ, cwd)
    if any(one.kind in {VALUE, OBJECT} for one in typed.command.arguments):
        from orchestrator.client.values import resolve_arguments

        typed = ParsedCommand(typed.command, resolve_arguments(typed.command, typed.arguments), as_json=typed.as_json)
    return ask_session(session, typed, cwd)


def ask_session(session: SessionConnection, typed: ParsedCommand, cwd: str) -> Mapping[str, Any]:
    """Ask as a session, with paths as they are typed in `cwd`; raises AskError."""
    arguments = dict(typed.arguments)
    for one in typed.command.arguments:
        value = arguments.get(one.name)
        if one.kind == PATH and isinstance(value, str):
            arguments[one.name] = _within(session, value, cwd)
        elif one.kind == PATHS and isinstance(value, list):
            arguments[one.name] = [_within(session, path, cwd) for path in value]
    waits = next((one.name for one in typed.command.arguments if one.kind == SECONDS), None)
    # Who does not say how long is waited for as long as the run says.
    wait = 0.0 if waits is None else arguments.get(waits, MAX_WAIT_SECONDS)
    return session.ask(typed.command.name, arguments, ANSWER_TIMEOUT + (wait if isinstance(wait, int | float) else 0))


def _within(session: SessionConnection, path: Any, cwd: str) -> Any:
    """Return a path from the worktree's top; what is none the orchestrator refuses."""
    if not isinstance(path, str) or "\0" in path:
        return path
    found = session.within(path, cwd)
    if found is None:
        raise SessionRequestError(f"{path} is not in this session's worktree", f"name files in {session.tree}")
    return found


def _print(value: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
