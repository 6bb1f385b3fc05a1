"""Run a task in a worktree with Auto-Claude; print events as JSON lines.

    python3 -P auto_claude.py --program FOLDER --python PYTHON --prompt-file FILE --worktree FOLDER --spec NAME
        [OPTION]...

Auto-Claude first writes a spec (`runners/spec_runner.py`) and then builds and reviews it (`run.py`), in the worktree
itself (`--direct`) instead of one of its own. Its phases, messages and tools are lines of its output with a marker; the
verdict of its QA and its subtasks are in `implementation_plan.json`; tokens and API errors are in the conversations of
Claude Code, which it runs. Its exit code does not show failures of the build.

--model MODEL, --complexity TIER    passed on
--skip-qa                           build only
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final

from adapters.bridges.http_status import failure_name_for_status
from adapters.bridges.lines import BridgeExit, write_line

#: The folder of its specs in a worktree, and a file in it that prevents a commit of changes to `.gitignore`.
_FOLDER, _MARKER = ".auto-claude", ".gitignore_checked"
#: Its files in a worktree (gitignore(5)), which are not part of the work.
OWN_FILES: Final = (
    "/.auto-claude/",
    "/.auto-claude-security.json",
    "/.auto-claude-status",
    "/.claude_settings.json",
    "/.security-key",
    "/.worktrees/",
    "/logs/security/",
)
_MARKED: Final = re.compile(r"__(EXEC_PHASE|TASK_LOG_[A-Z_]+)__:(\{.*\})\s*$")
#: Lines with the reason for its end.
_REASON: Final = re.compile(r"\s*(?:Error(?: during agent session)?|Fatal error|Unexpected error): (?P<reason>.+)")
_STATUS: Final = re.compile(r"\b([45][0-9]{2})\b")
#: The names of API errors in conversations (`error`), without a status.
_API_ERRORS: Final = {
    "authentication_failed": "auth",
    "billing_error": "auth",
    "invalid_request": "invalid",
    "rate_limit": "rate_limited",
    "server_error": "overloaded",
}
#: It retries all errors without a limit: these end it immediately, others if they are repeated.
_LASTING: Final = frozenset({"auth", "rate_limited", "invalid"})
_MOST_ERRORS: Final = 3
#: The number of issues of its QA in the outcome.
_MOST_ISSUES: Final = 5
_MAX_BYTES: Final = 16 << 20


class _Conversations:
    """The tokens and API errors that the conversations of Claude Code have reported since the start."""

    def __init__(self) -> None:
        self._folder = Path(os.environ.get("CLAUDE_CONFIG_DIR") or Path.home() / ".claude") / "projects"
        self._offsets = {file: file.stat().st_size for file in self._folder.rglob("*.jsonl")}
        self._usage: dict[str, tuple[int, int]] = {}
        self._shown = (0, 0)
        self.errors: list[tuple[str, str]] = []
        """The failure class and text of the API errors since the last successful call."""

    def read(self) -> None:
        """Read the new lines, and print the tokens if they have changed."""
        for file in sorted(self._folder.rglob("*.jsonl")):
            for value in self._new_lines(file):
                self._add(value)
        total = (sum(sent for sent, _ in self._usage.values()), sum(received for _, received in self._usage.values()))
        if total != self._shown:
            self._shown = total
            write_line("spent", input_tokens=total[0], output_tokens=total[1], cost=None)

    def _new_lines(self, file: Path) -> Iterator[Any]:
        offset = self._offsets.get(file, 0)
        with file.open("rb") as source:
            source.seek(offset)
            lines = source.read(_MAX_BYTES)
        lines = lines[: lines.rfind(b"\n") + 1]
        self._offsets[file] = offset + len(lines)
        for line in lines.splitlines():
            yield _parse(line)

    def _add(self, value: Any) -> None:
        match value:
            case {"type": "assistant", "isApiErrorMessage": True, "message": {"content": content}}:
                text = " ".join(_texts(content))
                self.errors.append((_failure_name(text, value.get("error")), text))
            case {"type": "assistant", "message": {"id": str(call), "usage": dict(usage)}}:
                cached = _count(usage, "cache_creation_input_tokens") + _count(usage, "cache_read_input_tokens")
                self._usage[call] = (_count(usage, "input_tokens") + cached, _count(usage, "output_tokens"))
                self.errors.clear()
            case _:
                pass


def _parse(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _texts(content: Any) -> Iterator[str]:
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            yield " ".join(block["text"].split())


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if type(value) is int and value > 0 else 0


def _failure_name(text: str, error: Any) -> str:
    status = _STATUS.search(text)
    if status is not None and (name := failure_name_for_status(int(status[1]))) is not None:
        return name
    if re.search(r"limit", text, re.IGNORECASE):
        return "rate_limited"
    if re.search(r"log ?in|api key|authenticat|oauth", text, re.IGNORECASE):
        return "auth"
    return _API_ERRORS.get(error, "transient") if isinstance(error, str) else "transient"


class _Program:
    """Auto-Claude's programs, one after the other, and their output."""

    def __init__(self, python: str, conversations: _Conversations) -> None:
        self._python, self._conversations = python, conversations
        self._running: subprocess.Popen[str] | None = None
        self.reason = ""
        """The last reason for a failure that was printed."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, number: int, _: FrameType | None) -> None:
        """End at a signal, like any program; an interrupted Auto-Claude would ask a question."""
        if self._running is not None:
            self._running.kill()
        self._conversations.read()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def run(self, argv: Sequence[str], worktree: Path) -> int:
        """Run a program to its end, or to an API error that lasts; return its exit code."""
        with subprocess.Popen(
            [self._python, *argv],
            cwd=worktree,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as running:
            self._running = running
            for line in running.stdout or ():
                self._show(line)
                errors = self._conversations.errors
                if errors and (errors[-1][0] in _LASTING or len(errors) >= _MOST_ERRORS):
                    running.kill()
                    break  # programs that it started may have the pipe open
            code = running.wait()
            self._running = None
        self._conversations.read()
        return code

    def _show(self, line: str) -> None:
        marked = _MARKED.search(line)
        if marked is None:
            reason = _REASON.match(line)
            self.reason = self.reason if reason is None else reason["reason"].strip()
            return
        self._conversations.read()
        value = _parse(marked[2])
        match marked[1], value:
            case "EXEC_PHASE", {"phase": str(phase), "message": str(message)}:
                write_line("message", text=f"{phase}: {message}" if message else phase)
            case "TASK_LOG_TEXT", {"content": str(text), "type": "error"}:
                write_line("warned", text=text)
            case "TASK_LOG_TEXT", {"content": str(text)} if text.strip():
                write_line("message", text=text)
            case "TASK_LOG_TOOL_START", {"name": str(name)}:
                shown = value.get("input")
                detail = shown if isinstance(shown, str) else ""
                # A longer path is shortened.
                paths = [detail] if name in {"Edit", "MultiEdit", "Write"} and not detail.startswith("...") else []
                write_line("tool", name=name, detail=detail, paths=paths, call=None, diff=None)
            case _:
                pass


def _exclude_own_files(worktree: Path) -> None:
    """Keep its files out of commits, and prevent it from committing a change to `.gitignore`."""
    (worktree / _FOLDER).mkdir(exist_ok=True)
    (worktree / _FOLDER / _MARKER).touch()
    found = subprocess.run(
        ["git", "rev-parse", "--git-path", "info/exclude"],  # noqa: S607
        cwd=worktree,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    exclude = worktree / found.stdout.rstrip("\n")
    exclude.parent.mkdir(exist_ok=True)
    with exclude.open("a") as file:
        file.write("".join(f"{pattern}\n" for pattern in ("", *OWN_FILES)))


def _conclude(spec: Path, *, is_reviewed: bool) -> BridgeExit:
    """Return the outcome in the plan of a build that ended by itself."""
    plan = None
    with suppress(OSError):
        plan = _parse((spec / "implementation_plan.json").read_bytes()[:_MAX_BYTES])
    statuses = [one.get("status") for phase in _dicts(plan, "phases") for one in _dicts(phase, "subtasks")]
    done = statuses.count("completed")
    if not statuses or done < len(statuses):
        return BridgeExit(f"it completed {done} of {len(statuses)} subtasks of its plan", "crashed")
    signed = plan.get("qa_signoff") if isinstance(plan, dict) else None
    status = signed.get("status") if isinstance(signed, dict) else None
    issues = [one["title"] for one in _dicts(signed, "issues_found") if isinstance(one.get("title"), str)]
    text = "; ".join((f"{done} subtasks completed, QA: {status or 'not run'}", *issues[:_MOST_ISSUES]))
    return BridgeExit(text, "crashed" if is_reviewed and status != "approved" else None)


def _dicts(value: Any, key: str) -> list[dict[str, Any]]:
    """Return the objects in a list of an object; empty if the value is anything else."""
    found = value.get(key) if isinstance(value, dict) else None
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _perform(options: argparse.Namespace) -> BridgeExit:
    worktree: Path = options.worktree
    spec = worktree / _FOLDER / "specs" / options.spec
    model = ("--model", options.model) if options.model else ()
    tier = ("--complexity", options.complexity) if options.complexity else ()
    place = ("--project-dir", str(worktree))
    steps = (
        (
            *(str(options.program / "runners/spec_runner.py"), "--task-file", str(options.prompt_file), *place),
            *("--spec-dir", str(spec), "--auto-approve", "--no-build", *model, *tier),
        ),
        (
            *(str(options.program / "run.py"), "--spec", options.spec, *place, "--direct", "--auto-continue", *model),
            *(("--skip-qa",) if options.skip_qa else ()),
        ),
    )
    try:
        _exclude_own_files(worktree)
        conversations = _Conversations()
        program = _Program(options.python, conversations)
        for argv in steps:
            if code := program.run(argv, worktree):
                outcome = _failed(program.reason, code)
                break
        else:
            outcome = _conclude(spec, is_reviewed=not options.skip_qa)
    except FileNotFoundError as error:
        return BridgeExit(f"{error.filename} was not found", "missing")
    except (OSError, subprocess.CalledProcessError) as error:
        return BridgeExit(str(error), "crashed")
    if outcome.failure is not None and conversations.errors:
        failure, text = conversations.errors[-1]
        return BridgeExit(text, failure)
    return outcome


def _failed(reason: str, code: int) -> BridgeExit:
    if "OAuth token" in reason:
        return BridgeExit(f"{reason}: set CLAUDE_CODE_OAUTH_TOKEN (`claude setup-token`)", "auth")
    failure = "invalid" if "Required Python package" in reason else "crashed"
    return BridgeExit(reason or f"it exited with {code}", failure)


def main() -> int:
    """Perform one task; return 0 if it was built, and approved by the QA, otherwise 1."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("--prompt-file", type=Path, required=True)
    parser.add_argument("--worktree", type=Path, required=True)
    parser.add_argument("--spec", required=True)
    parser.add_argument("--model")
    parser.add_argument("--complexity")
    parser.add_argument("--skip-qa", action="store_true")
    return _perform(parser.parse_args()).report()


if __name__ == "__main__":
    sys.exit(main())
