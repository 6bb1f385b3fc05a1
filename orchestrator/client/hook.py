"""The hooks that CLIs run.

Before an edit, to deny edits of files of other sessions; after a tool call, to show messages of the user to the agent;
before they end, for such messages and to run checks.

They read a JSON object with `hook_event_name` and, before an edit, `tool_input` from standard input. They print a
denial, a warning about a predicted merge conflict, messages, or nothing, in the format of Claude Code
(https://code.claude.com/docs/en/hooks), which other CLIs adopted, or that of Gemini CLI
(https://geminicli.com/docs/hooks/reference), which has no warnings before an edit. On any error of the hook or the
orchestrator the edit or the end is allowed: changes are checked again when they land.
"""

from __future__ import annotations

import json
import os
import signal

from orchestrator.client.commands import BEGIN_STOP, CHECK_EDIT, MAX_REQUEST_BYTES, TAKE_MESSAGES
from orchestrator.client.session import SessionRequestError, find_session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, BinaryIO, TextIO

_TIMEOUT = 5.0  # seconds; the agent waits for the answer at each edit
_MESSAGE_TIMEOUT = 60.0  # a message whose delivery is recorded must arrive
_MAX_INPUT_BYTES = 1 << 26  # the input contains the whole new text of the file
_MAX_PATHS = 200
_MAX_OUTPUT_BYTES = 8192  # of a failed check: the end of its output
_GEMINI_EVENT = "BeforeTool"
_PATHS = ("file_path", "notebook_path", "path", "filePath", "absolute_path")
_TEXTS = ("command", "input", "patch", "patchText")
_PATCH = ("*** Add File: ", "*** Update File: ", "*** Delete File: ", "*** Move to: ")


def run(name: str, stdin: BinaryIO, stdout: TextIO) -> int:
    """Answer one call of the hook `pre-edit`, `post-tool` or `stop`; return the exit code, which is always 0."""
    try:
        call = json.loads(stdin.read(_MAX_INPUT_BYTES))
        if name == "stop":
            reason = _continuation_reason(call)
            answer = None if reason is None else {"decision": "block", "reason": reason}
        elif name == "post-tool":
            answer = _tool_answer(call)
        else:
            answer = _edit_answer(call)
        if answer is not None:
            stdout.write(json.dumps(answer) + "\n")
    except (SessionRequestError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # a failing hook must not block the agent
    return 0


def _edit_answer(call: dict[str, Any]) -> dict[str, Any] | None:
    """Return the denial of an edit, or a warning with its permission; None if neither applies.

    Raises SessionRequestError, and any error caused by malformed input.
    """
    cwd = call.get("cwd") or os.getcwd()  # noqa: PTH109  pathlib takes 10 ms
    paths = dict.fromkeys(_paths(call["tool_input"]))
    if not paths:
        return None
    session, event, warning = find_session(os.environ, cwd), call.get("hook_event_name"), None
    for path in list(paths)[:_MAX_PATHS]:
        inside = session.relative_path(path, cwd)
        if inside is None or len(inside) > MAX_REQUEST_BYTES:
            continue
        answer = session.ask(CHECK_EDIT.name, {"path": inside}, _TIMEOUT)
        if answer["allowed"] is False:
            owner = answer["owner"] or "another session"
            reason = f": {answer['reason']}" if answer["reason"] else ""
            remedy = f"Work on other files, or wait for it with `council lock {inside} --wait 60`."
            return _denial(event, f"{inside} belongs to {owner}{reason}. {remedy}")
        warning = answer["warning"] or warning
    if warning is None or event == _GEMINI_EVENT:
        return None
    return {"hookSpecificOutput": {"hookEventName": "PreToolUse", "additionalContext": warning}}


def _paths(tool_input: dict[str, Any]) -> Iterator[str]:
    for name in _PATHS:
        if isinstance(tool_input.get(name), str):
            yield tool_input[name]
    for name in _TEXTS:
        text = tool_input.get(name)
        if isinstance(text, str) and "*** Begin Patch" in text:
            for line in text.splitlines():
                yield from (line.removeprefix(mark).strip() for mark in _PATCH if line.startswith(mark))


def _tool_answer(call: dict[str, Any]) -> dict[str, Any] | None:
    """Return new messages of the user for the agent, if any; raises like `_edit_answer`."""
    if call.get("agent_id") is not None:  # a subagent, whose conversation ends before that of the session
        return None
    event = str(call["hook_event_name"])  # an error after the request would lose a message
    session = find_session(os.environ, call.get("cwd") or os.getcwd())  # noqa: PTH109  pathlib takes 10 ms
    message = session.ask(TAKE_MESSAGES.name, {}, _MESSAGE_TIMEOUT)["message"]
    if message is None:
        return None
    return {"hookSpecificOutput": {"hookEventName": event, "additionalContext": message}}


def _continuation_reason(call: dict[str, Any]) -> str | None:
    """Return why the agent must continue: a message or a failed check. None if it may end.

    Raises like `_edit_answer`.
    """
    session = find_session(os.environ, call.get("cwd") or os.getcwd())  # noqa: PTH109  pathlib takes 10 ms
    answer = session.ask(BEGIN_STOP.name, {}, _MESSAGE_TIMEOUT)
    if answer["message"] is not None:
        return str(answer["message"])
    for command in answer["checks"]:
        failed = _run_check(command, answer["timeout"], session.tree)
        if failed is not None:
            return f"The check `{command}` {failed}\nFix this before you end: your work can't land until it succeeds."
    return None


def _run_check(command: str, timeout: float, folder: str) -> str | None:
    """Run a command in a folder; return how it failed, with the end of its output, or None."""
    import subprocess  # noqa: PLC0415  only when needed
    import tempfile  # noqa: PLC0415  only when needed

    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        if code == 0:
            return None
        output.seek(max(output.seek(0, os.SEEK_END) - _MAX_OUTPUT_BYTES, 0))
        text = output.read(_MAX_OUTPUT_BYTES).decode(errors="replace").strip()
    how = f"did not end within {timeout:g} s" if code is None else f"failed with exit code {code}"
    return f"{how}:\n{text}" if text else f"{how}."


def _denial(event: object, reason: str) -> dict[str, Any]:
    if event == _GEMINI_EVENT:
        return {"decision": "deny", "reason": reason}
    denied = {"hookEventName": "PreToolUse", "permissionDecision": "deny", "permissionDecisionReason": reason}
    return {"hookSpecificOutput": denied}
