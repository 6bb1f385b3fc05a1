"""A fake Claude Code 2.1: `claude -p --output-format stream-json --verbose …` with the prompt on stdin.

Steps: `write PATH TEXT`, `fail auth|overloaded|turns|drop|plain|silently`, `fail limit SECONDS`, `hang` until
interrupted, `spend TOKENS` (a model call, reported twice), `tell PATH` (write its arguments and the prompt), `run
COMMAND`, `deny COMMAND` (refuse to run it), `stopped PATH TEXT` (a write when a hook keeps it from ending: one each
time), `work PATH` (call a tool again and again until the file exists), `linger PATH` (the same, and end its turn each
time). It appends its input to the file INPUT_LOG. Before and after a write and at its end it calls the hooks in its
settings. It stores its conversation in its folder,
and resumes it by id in the same worktree only.

Without `-p` it talks to a user on its terminal: each line is a step and a turn; `size` prints the size of the terminal,
and `leave CODE` ends.
"""

# ruff: noqa: T201  a program that prints

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fakes.script import steps, write

SESSION = "e4176175-ef9d-4a2f-bffa-f270f179ef19"
USAGE = {"input_tokens": 10, "cache_creation_input_tokens": 200, "cache_read_input_tokens": 3000, "output_tokens": 42}


def emit(type_: str, **fields: Any) -> None:
    print(json.dumps({"type": type_, **fields, "session_id": SESSION}), flush=True)


def result(**fields: Any) -> None:
    usual = {"subtype": "success", "is_error": False, "api_error_status": None, "result": "Done."}
    emit("result", **{**usual, "total_cost_usd": 0.0125, "usage": USAGE, "permission_denials": [], **fields})


def fail(kind: str, rest: str) -> None:
    match kind:
        case "auth":
            emit("system", subtype="api_retry", attempt=1, max_retries=3, retry_delay_ms=504.9, error_status=401,
                 error="authentication_failed")  # fmt: skip
            reported = "Failed to authenticate. API Error: 401 stub says authentication_error"
            result(is_error=True, api_error_status=401, result=reported)
        case "limit":
            until = int(time.time() + float(rest or 3600))
            emit("rate_limit_event", rate_limit_info={"status": "rejected", "resetsAt": until,
                                                      "rateLimitType": "five_hour"})  # fmt: skip
            result(is_error=True, api_error_status=429, result="You've hit your session limit · resets 3pm")
        case "overloaded":
            result(is_error=True, api_error_status=529, result="API Error: 529 stub says overloaded_error.")
        case "silently":
            sys.exit(0)
        case "turns":
            result(subtype="error_max_turns", is_error=True, result=None)
        case "plain":
            print("--dangerously-skip-permissions cannot be used with root/sudo privileges for security reasons")
    sys.exit(1)


def hang() -> None:
    """Hang until SIGINT, with a result, or SIGTERM, without one."""

    def conclude(*_: object) -> None:
        result(subtype="error_during_execution", is_error=True, result=None)
        sys.exit(1)

    signal.signal(signal.SIGINT, conclude)
    while True:
        time.sleep(0.02)  # Python handles a signal that arrives just before a sleep only after it


def spend(tokens: int, call: int) -> None:
    """Report a model call in progress, and again when it is done."""
    for output in (1, tokens - 10):
        usage = {"input_tokens": 10, "output_tokens": output}
        emit("assistant", message={"id": f"msg_{call}", "model": "claude-opus-4-8", "content": [], "usage": usage})


def deny(command: str) -> dict[str, Any]:
    """Refuse a command as its permission mode does; return the denial that the result repeats."""
    denial = {"tool_name": "Bash", "tool_use_id": "d", "tool_input": {"command": command}}
    call = {"type": "tool_use", "id": "d", "name": "Bash", "input": denial["tool_input"]}
    emit("assistant", message={"role": "assistant", "content": [call]})
    reason = "This command requires approval"
    emit("system", subtype="permission_denied", tool_name="Bash", tool_use_id="d", message=reason)
    return denial


def is_denied(path: str) -> bool:
    """Return whether a hook in its settings denies a write."""
    reported = {"file_path": str(Path.cwd() / path), "content": "…"}
    for answer in call_hooks("PreToolUse", tool_name="Write", tool_input=reported):
        specific = answer.get("hookSpecificOutput", {})
        if specific.get("permissionDecision") == "deny":
            say(specific["permissionDecisionReason"])
            return True
    return False


def stop(prompt: str) -> None:
    """End, unless a hook prevents it."""
    writes = [(first, rest) for word, first, rest in steps(prompt) if word == "stopped"]
    for file in [first for word, first, _ in steps(prompt) if word == "linger"]:
        while not Path(file).exists():
            read_context("Bash")
            must_continue()
            time.sleep(0.2)
    while must_continue():
        if writes:
            write(*writes.pop(0))
    say("Done.")


def must_continue() -> bool:
    """Return whether a hook in its settings keeps it from ending."""
    for answer in call_hooks("Stop", stop_hook_active=False):
        if answer.get("decision") == "block":
            say(answer["reason"])
            log_input(answer["reason"])
            return True
    return False


def read_context(tool: str) -> None:
    """Read the text that hooks in its settings add after a tool call."""
    for answer in call_hooks("PostToolUse", tool_name=tool):
        if text := answer.get("hookSpecificOutput", {}).get("additionalContext"):
            say(text)
            log_input(text)


def log_input(text: str) -> None:
    """Append its input to a log, if there is one."""
    if (log := os.environ.get("INPUT_LOG")) is not None:
        line = {"task": os.environ["COUNCIL_TASK"], "attempt": int(os.environ["COUNCIL_ATTEMPT"]), "text": text}
        with Path(log).open("ab", 0) as file:
            file.write(json.dumps(line).encode() + b"\n")


def call_hooks(event: str, **fields: Any) -> Iterator[dict[str, Any]]:
    """Yield the answers of the hooks in its settings."""
    if "--settings" not in sys.argv:
        return
    settings = json.loads(Path(sys.argv[sys.argv.index("--settings") + 1]).read_text())
    call = json.dumps({"cwd": str(Path.cwd()), "hook_event_name": event, **fields})
    for group in settings["hooks"].get(event, ()):
        if re.fullmatch(group.get("matcher", ".*"), fields.get("tool_name", "")):
            for hook in group["hooks"]:
                done = subprocess.run(
                    hook["command"], shell=True, input=call, capture_output=True, text=True, check=True
                )
                yield json.loads(done.stdout or "{}")


def say(text: str) -> None:
    emit("assistant", message={"role": "assistant", "content": [{"type": "text", "text": text}]})


def continue_conversation(prompt: str) -> None:
    """Store the conversation; exit if the one to resume is unknown."""
    folder = os.environ.get("CLAUDE_CONFIG_DIR")
    place = None if folder is None else Path(folder) / "projects" / str(Path.cwd()).replace("/", "-")
    if "--resume" in sys.argv:
        wanted = sys.argv[sys.argv.index("--resume") + 1]
        if place is None or not (place / f"{wanted}.jsonl").exists():
            sys.exit(f"No conversation found with session ID: {wanted}")
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
        with (place / f"{SESSION}.jsonl").open("a") as file:
            file.write(json.dumps(prompt) + "\n")


def converse() -> None:
    """Continue a conversation with the user of the terminal."""
    assert all(map(os.isatty, range(3)))
    os.tcgetpgrp(0)  # fails unless it is the controlling terminal
    continue_conversation("attached")
    print(f"resumed {sys.argv[sys.argv.index('--resume') + 1]}", flush=True)
    for line in sys.stdin:
        for word, first, rest in steps(line):
            if word == "leave":
                sys.exit(int(first or 0))
            elif word == "write":
                write(first, rest)
            elif word == "run":
                print(f"exit {subprocess.run(f'{first} {rest}', shell=True, check=False).returncode}", flush=True)
            elif word == "size":
                size = os.get_terminal_size()
                print(f"size {size.columns} {size.lines}", flush=True)
        for answer in call_hooks("Stop", stop_hook_active=False):
            if answer.get("decision") == "block":
                print(answer["reason"], flush=True)
        print("ready", flush=True)


def call_tool(word: str, first: str, rest: str) -> None:
    """Perform a step with tools."""
    if word == "write":
        call = {"type": "tool_use", "id": "t", "name": "Write", "input": {"file_path": first, "content": rest}}
        emit("assistant", message={"role": "assistant", "content": [call]})
        if not is_denied(first):
            write(first, rest)
        read_context("Write")
    elif word == "run":
        subprocess.run(f"{first} {rest}", shell=True, check=True)
    else:
        while not Path(first).exists():
            read_context("Bash")
            time.sleep(0.05)


def main() -> None:
    assert sys.argv[1:5] == ["-p", "--output-format", "stream-json", "--verbose"], sys.argv
    assert "HOME" in os.environ
    assert os.environ["DISABLE_AUTOUPDATER"] == "1"
    emit("system", subtype="init", cwd=str(Path.cwd()), tools=["Edit", "Write"], model="claude-opus-4-8[1m]")
    prompt, spent = sys.stdin.read(), 0
    denied: list[dict[str, Any]] = []
    continue_conversation(prompt)
    log_input(prompt)
    for number, (word, first, rest) in enumerate(steps(prompt)):
        if word == "spend":
            spend(int(first), number)
            spent += int(first)
        elif word == "tell":
            Path(first).write_text(json.dumps({"argv": sys.argv[1:], "prompt": prompt}))
        elif word in {"run", "write"} or (word == "work" and not rest):  # also begins a line of our prompts
            call_tool(word, first, rest)
        elif word == "deny":
            denied.append(deny(f"{first} {rest}"))
        elif word == "fail":
            fail(first, rest)
        elif word == "hang":
            hang()
    stop(prompt)
    used = {"usage": {"input_tokens": spent}, "total_cost_usd": spent / 1000} if spent else {}
    result(permission_denials=denied, **used)


if __name__ == "__main__":
    if sys.argv[1:] == ["--version"]:
        print("2.1.197 (Claude Code)")
    elif sys.argv[1:] == ["auth", "status"]:
        print(json.dumps({"loggedIn": "ANTHROPIC_API_KEY" in os.environ}))
        sys.exit("ANTHROPIC_API_KEY" not in os.environ)
    elif "-p" in sys.argv:
        main()
    else:
        converse()
