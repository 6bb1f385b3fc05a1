"""`council logs` and `council show` for sessions, during their run and afterwards."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Repository
from tests.waiting import wait_for

#: A program that prints a file line by line, waits for another file, and changes something.
PROGRAM = """\
import json, os, pathlib, sys, time
prompt = json.loads(pathlib.Path(sys.argv[1]).read_text())
for line in prompt["lines"]:
    print(line.replace("@", os.getcwd()), flush=True)
while prompt.get("until") and not pathlib.Path(prompt["until"]).exists():
    time.sleep(0.05)
for line in prompt.get("then", ()):
    print(line, flush=True)
pathlib.Path("made.txt").write_text("x")
sys.exit(prompt.get("exit", 0))
"""
PRINTS = "import sys; print('out'); print('err', file=sys.stderr); open('a.txt', 'w')"
CALLS = (
    {"type": "item.started", "item": {"id": "i0", "type": "command_execution", "command": "make test"}},
    {"type": "item.completed", "item": {"id": "i0", "type": "command_execution", "command": "make test",
                                        "aggregated_output": "x" * 5_000 + "\nno rule\n", "exit_code": 2}},
    {"type": "item.completed", "item": {"id": "i1", "type": "file_change", "changes": [{"path": "@/made.txt"}]}},
)  # fmt: skip
SAID = {"type": "item.completed", "item": {"id": "i2", "type": "agent_message", "text": "I \x1b[31mfixed it. " * 12}}
ENDED = {"type": "turn.completed", "usage": {"input_tokens": 12_000, "output_tokens": 340}}


@pytest.fixture
def codex(repository: Repository, tmp_path: Path) -> dict[str, Any]:
    """Return an adapter for a Codex that prints the given lines."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "codex"
    program.write_text(f"#!{sys.executable} -S\nimport sys\nsys.argv = ['codex', '/dev/stdin']\n{PROGRAM}")
    program.chmod(0o755)
    repository.environ["PATH"] = f"{folder}{os.pathsep}{repository.environ['PATH']}"
    return {"use": "codex"}


def configured(repository: Repository, adapter: dict[str, Any], prompt: dict[str, Any], **more: Any) -> str:
    text = {key: list(map(json.dumps, one)) if key in {"lines", "then"} else one for key, one in prompt.items()}
    task = {"id": "t", "prompt": json.dumps(text), "attempts": 1, **more}
    return str(repository.configure([task], adapters={"it": adapter}, sandbox="off"))


def test_logs_are_readable_and_raw_on_request(repository: Repository, codex: dict[str, Any]) -> None:
    """One line per tool call with paths relative to the worktree, wrapped text, tokens and time at the end."""
    ran = repository.council("run", configured(repository, codex, {"lines": [*CALLS, SAID, ENDED]}, checks=["echo ok"]))
    assert ran.code == 0, ran
    shown = repository.council("logs", "t")
    assert shown.code == 0, shown
    first, *lines, last, check, checked = shown.stdout.splitlines()
    assert first.startswith("session 1, it, started 2")
    cut = f"    {'x' * 75}…"
    output = [cut, "    [3001 characters omitted]", "    no rule"]
    calls = ["> shell make test: failed: exit code 2: no rule", *output, "> edit made.txt: ok"]
    assert lines[: len(calls)] == calls
    words = lines[len(calls) :]
    assert len(words) > 1
    assert all(len(line) <= 80 for line in words)
    assert " ".join(words) == ("I \ufffd[31mfixed it. " * 12).strip()
    assert re.fullmatch(r"session 1 ended after \d:\d\d: built, 12.0k tokens in, 340 out", last), last
    assert (check, checked) == ("check 1:", "ok")
    raw = repository.council("logs", "t", "--raw").stdout
    assert [json.loads(line)["type"] for line in raw.splitlines()[:-1]] == [
        *("item.started", "item.completed", "item.completed", "item.completed", "turn.completed"),
    ]
    reported = repository.council("logs", "t", "--json").lines
    assert [one["kind"] for one in reported] == ["began", "tool", "tool", "text", "ended", "line"]
    assert len(reported[1].pop("output")) < 5_000
    assert reported[1] == {
        "kind": "tool", "text": "make test", "tool": "shell", "outcome": "failed: exit code 2: no rule", "attempt": 1,
        "stream": "stdout", "diff": "",
    }  # fmt: skip
    assert (reported[-2]["outcome"], reported[-2]["input_tokens"], reported[-1]["stream"]) == (
        "built",
        12_000,
        "check1",
    )


def test_running_session_is_followed_with_its_latest_activity(
    repository: Repository, codex: dict[str, Any], tmp_path: Path
) -> None:
    """`-f` shows an unfinished call; `show` prints the last line and its age."""
    gate = tmp_path / "gate"
    prompt = {"lines": CALLS[:1], "until": str(gate), "then": [CALLS[1], ENDED]}
    child = repository.start("run", configured(repository, codex, prompt))
    wait_for(lambda: any(repository.top.glob(".council/logs/*/t.1.stdout")), 60)
    follower = repository.start("logs", "t", "--follow")
    try:
        wait_for(lambda: "make test" in repository.council("show", "t").stdout, 60)
        details = json.loads(repository.council("show", "t", "--json").stdout)
        assert details["latest_activity"]["text"] == "> shell make test"
        assert re.search(r"activity +> shell make test \(\d:\d\d ago\)", repository.council("show", "t").stdout)
        running = repository.council("logs", "t").stdout.splitlines()
        assert (running[1], running[2]) == ("> shell make test", "session 1 running")
    finally:
        gate.touch()
        child.communicate(timeout=60)
        followed = follower.communicate(timeout=60)[0].splitlines()
    assert followed[1:3] == ["> shell make test", "> shell make test: failed: exit code 2: no rule"]
    assert followed[-1].startswith("session 1 ended after ")
    assert json.loads(repository.council("show", "t", "--json").stdout)["latest_activity"] is None


def test_output_of_a_failed_check_is_shown_once(repository: Repository) -> None:
    """The reason is one line that names the check, without its newlines."""
    checks = ["printf 'one\\ntwo\\nthree\\n'; test ! -e a.txt"]
    task = {"id": "t", "prompt": "write a.txt x", "attempts": 1, "checks": checks}
    repository.council("run", str(repository.configure([task])))
    shown = repository.council("logs", "t").stdout
    assert "\N{REPLACEMENT CHARACTER}" not in shown
    assert shown.count("two\n") == 1, shown


@pytest.mark.extended
def test_newest_attempt_of_a_phase_is_shown(repository: Repository) -> None:
    """By its name; an unknown name is rejected with the known ones."""
    workflow = [{"plan": {"access": "read"}}, {"build": {}}]
    task = {"id": "t", "prompt": "in plan print thinking\nin build print building\nin build write a.txt x"}
    path = repository.configure([{**task, "workflow": "two"}], workflows={"two": workflow})
    assert repository.council("run", str(path)).code == 0
    planned = repository.council("logs", "t", "--phase", "plan").stdout.splitlines()
    assert planned[0].startswith("session 1, phase plan, fake, started ")
    assert planned[1] == "thinking"
    assert "building" in repository.council("logs", "t").stdout
    refused = repository.council("logs", "t", "--phase", "review")
    assert (refused.code, "plan, build" in refused.stderr) == (2, True)


def test_readable_log_is_on_standard_output(repository: Repository) -> None:
    """A pager shows all of it; `--raw` keeps the streams apart."""
    adapter = {"use": "command", "argv": [sys.executable, "-c", PRINTS]}
    repository.council("run", str(repository.configure([{"id": "t", "prompt": "x"}], adapters={"py": adapter})))
    shown = repository.council("logs", "t")
    assert ({"out", "err"}.issubset(shown.stdout.splitlines()), shown.stderr) == (True, "")
    raw = repository.council("logs", "t", "--raw")
    assert (raw.stdout, raw.stderr) == ("out\n", "err\n")
