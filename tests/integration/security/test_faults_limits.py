"""Machine limits, output floods, prompts for input and signals: bounded, quick, and no process survives."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandResult, Repository
from tests.faults import PYTHON_ADAPTER, SHELL_ADAPTER, processes_with
from tests.waiting import wait_for

pytestmark = pytest.mark.extended

MIB = 1 << 20


def peak_memory(pid: int) -> int:
    """Return the peak memory (bytes) of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


FLOOD = """
import os
os.write(1, b"begins\\n")
block = (b"0123456789abcdef" * {width})[:-1] + b"\\n"
block *= 65536 // {width}
for _ in range({blocks}): os.write(1, block)
os.write(1, b"x" * 3_000_000 + b"\\n\\xff\\xfe\\x80 caf\\xe9 \\x1b[2J\\x1b]52;c;eA==\\x07 \\xed\\xa0\\x80\\n")
os.write(2, b"y" * 3_000_000 + b"\\xc3")
os.write(1, b"ends\\n")
open("done-" + os.environ["COUNCIL_TASK"], "w").write("x")
"""


@pytest.mark.parametrize(("blocks", "width"), [(30, 32), pytest.param(100, 1, marks=pytest.mark.slow)])
async def test_output_flood_takes_bounded_memory_and_files(repository: Repository, blocks: int, width: int) -> None:
    """Many MB, lines of 3 MB and bytes that are no text, from several sessions at once and from a check."""
    tasks: list[dict[str, Any]] = [
        {"id": name, "prompt": FLOOD.format(blocks=blocks, width=width)} for name in ("a", "b")
    ]
    tasks.append(
        {"id": "checked", "prompt": "open('c', 'w').write('c')", "checks": [f"yes 12345678 | head -c {blocks}000000"]}
    )
    config = repository.configure(tasks, adapters={"py": PYTHON_ADAPTER})
    child = repository.start("run", str(config), "--json")
    peak = 0
    while child.poll() is None:
        peak = max(peak, peak_memory(child.pid))
        try:
            child.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    stdout, stderr = child.communicate()
    ended = CommandResult(child.returncode, stdout, stderr)
    assert ended.states == dict.fromkeys(("a", "b", "checked"), "landed"), [
        task["reason"] for task in ended.result["tasks"]
    ]
    assert 0 < peak < 200 * MIB
    assert len(stdout) < MIB
    logs = list((repository.top / ".council/logs" / ended.result["run"]).iterdir())
    assert max(log.stat().st_size for log in logs) < 20 * MIB
    assert sum(file.stat().st_size for file in (repository.top / ".council/state").rglob("*") if file.is_file()) < MIB
    shown = repository.council("logs", "a", "--raw")
    assert shown.code == 0
    assert shown.stdout.startswith("begins\n")
    assert shown.stdout.endswith("ends\n")
    assert "bytes left out" in shown.stdout
    await repository.assert_invariants()


async def test_program_that_asks_fails_immediately(repository: Repository) -> None:
    """Standard input is closed and there is no terminal, so that it does not wait."""
    tasks = [
        {"id": "stdin", "prompt": "printf 'Proceed? [y/N] '; read answer || exit 3; echo $answer > a.txt"},
        {"id": "tty", "prompt": "printf 'Password: ' > /dev/tty && read answer < /dev/tty && echo x > b.txt"},
        {"id": "python", "prompt": f"exec {sys.executable} -c 'import getpass; getpass.getpass()' 2>/dev/null"},
        {"id": "git", "prompt": "git fetch https://user@localhost:1/x.git"},
    ]
    limits = {"attempts": 1, "timeout": "60s"}
    config = repository.configure([{**task, **limits} for task in tasks], adapters={"sh": SHELL_ADAPTER})
    ended = repository.council("run", str(config), "--json", timeout=50)
    assert set(ended.states.values()) == {"failed"}, ended
    assert all("exit code" in task["reason"] for task in ended.result["tasks"]), ended
    await repository.assert_invariants()


def nothing_lives(repository: Repository) -> bool:
    """Return whether no process of council's or of a session's refers to this test."""
    return not processes_with(bytes(repository.top.parent))


STUBBORN = "stubborn\ndaemon daemon.txt\nwrite half.txt half\nhang"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
async def test_run_at_the_first_signal_ends_cleanly(repository: Repository, number: signal.Signals) -> None:
    """Exit code 130, reported in JSON, with the work preserved and no process alive; resume continues."""
    task = {"id": "one", "prompt": "write half.txt half\nattempt 1 hang"}
    child = repository.start("run", str(repository.configure([task])), "--json")
    wait_for(lambda: list(Path(repository.environ["COUNCIL_HOME"]).glob("*/sessions/*/one.1/slot/tree/half.txt")))
    child.send_signal(number)
    stdout, stderr = child.communicate(timeout=30)
    ended = CommandResult(child.returncode, stdout, stderr)
    assert (ended.code, ended.result["exit"], ended.result["status"]) == (130, 130, "interrupted"), ended
    assert nothing_lives(repository), processes_with(bytes(repository.top.parent))
    assert repository.council("salvage", "list").stdout.count("one/1") == 1
    assert repository.council("resume", "--json").states == {"one": "landed"}
    await repository.assert_invariants()


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGHUP)])
async def test_second_signal_ends_immediately(
    repository: Repository, first: signal.Signals, second: signal.Signals
) -> None:
    """After one signal a program that ignores SIGTERM would get its grace period; after two all end within 2 s."""
    task = {"id": "one", "prompt": "\n".join(f"attempt 1 {line}" for line in STUBBORN.splitlines()) + "\nwrite b b"}
    child = repository.start("run", str(repository.configure([task])))
    wait_for(lambda: list(Path(repository.environ["COUNCIL_HOME"]).glob("*/sessions/*/one.1/slot/tree/half.txt")))
    child.send_signal(first)
    assert child.stderr is not None
    assert "press Ctrl-C again to stop now" in child.stderr.readline()
    child.send_signal(second)
    assert child.wait(timeout=10) == 130
    child.communicate()
    wait_for(lambda: nothing_lives(repository), limit=10)
    assert repository.council("resume", "--json").states == {"one": "landed"}
    await repository.assert_invariants()


async def test_signal_during_a_push_lets_it_finish(repository: Repository) -> None:
    """Target and checkout agree afterwards, whenever the signal arrived; the landing is not interrupted."""
    hook = repository.top / ".git/hooks/pre-receive"
    hook.parent.mkdir(exist_ok=True)
    flag = repository.top.parent / "pushing"
    hook.write_text(f"#!/bin/sh\ntouch {flag}\nwhile [ -e {flag} ]; do sleep 0.05; done\n")
    hook.chmod(0o755)
    repository.remember()
    tasks: list[dict[str, Any]] = [
        {"id": "one", "prompt": "write one.txt 1"},
        {"id": "two", "prompt": "write 2 2", "needs": ["one"]},
    ]
    child = repository.start("run", str(repository.configure(tasks)))
    try:
        wait_for(flag.exists)
        child.send_signal(signal.SIGINT)
        assert child.stderr is not None
        assert "stopping" in child.stderr.readline()
    finally:
        flag.unlink()
    child.communicate(timeout=30)
    assert child.returncode == 130
    assert repository.council("status", "--json").states == {"one": "landed", "two": "pending"}
    assert nothing_lives(repository)
    await repository.assert_invariants()
    hook.unlink()
    repository.remember()
    assert repository.council("resume", "--json").code == 0


async def test_thousand_sessions_under_a_low_descriptor_limit_work(repository: Repository) -> None:
    """As many run as fit, the report has the fix, and all land; if not even one fits, the run is rejected."""
    tasks = [{"id": f"t{number}", "prompt": f"write {number}.txt x"} for number in range(5)]
    config = repository.configure(tasks, capacity=1000)

    def limited(most: int) -> CommandResult:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.cli.main", "run", str(config), "--json"],
            cwd=repository.top, env=repository.environ, capture_output=True, text=True, check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)),
        )  # fmt: skip
        return CommandResult(done.returncode, done.stdout, done.stderr)

    ended = limited(64)
    assert (ended.code, set(ended.states.values())) == (0, {"landed"}), ended
    event = next(line for line in ended.lines if line.get("event") == "run.capacity_limited")
    assert 1 <= event["sessions"] < 5
    assert "ulimit -n" in event["reason"]
    starts = [line["event"] for line in ended.lines if line.get("event") in {"task.started", "task.queued"}]
    running = [starts[:end].count("task.started") - starts[:end].count("task.queued") for end in range(len(starts))]
    assert max(running) <= event["sessions"]
    await repository.assert_invariants()
    config = repository.configure([{"id": "more", "prompt": "write more.txt x"}], capacity=1000)
    refused = limited(40)
    assert (refused.code, refused.result["status"]) == (2, "refused"), refused
    assert "ulimit -n" in refused.result["remedy"]
    short = limited(24)  # too few for a command that looks up programs
    assert (short.code, short.result["status"]) in {(1, "unavailable"), (2, "refused")}, short
    assert "open" in short.result["error"]
    assert "ulimit" in short.result["remedy"]
    assert "(reason=" not in short.stdout


async def test_too_much_requested_memory_is_rejected(repository: Repository) -> None:
    """With the numbers and the fix, before any program starts."""
    config = repository.configure([{"id": "one", "prompt": "write a.txt a"}], session_memory="100TiB")
    refused = repository.council("run", str(config), "--json")
    assert (refused.code, refused.result["status"]) == (2, "refused"), refused
    assert "MiB of memory available" in refused.result["error"]
    assert refused.result["remedy"]
    assert not repository.spawns.exists()
