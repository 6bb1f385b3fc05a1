"""Messages to agents while the processes that send and deliver them are killed."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from orchestrator.api.council import Council
from tests.conftest import Repository
from tests.fakes.script import ROOT

TASKS = ("a", "b", "c", "d")
PER_TASK = 250


async def send(top: str, run: str, task: str, log: str) -> None:
    """Send the messages to a task that are missing in the log, and append them."""
    with Path(log).open("a+b", 0) as file:
        file.seek(0)
        lines = file.read().splitlines()
        begun, sent = len(lines), sum(line.startswith(b"sent ") for line in lines)
        async with Council.open(Path(top)) as council:
            for number in range(sent, PER_TASK):
                text = f"<{task}-{number}-{begun}>"
                file.write(f"sending {text}\n".encode())
                await council.tasks.tell(task, text, run=run)
                file.write(f"sent {text}\n".encode())


class Senders:
    """The processes that send messages, one for each task, and are killed again and again."""

    def __init__(self, repository: Repository, run: str, chance: random.Random) -> None:
        self._repository, self._run, self._chance = repository, run, chance
        self._children = dict[str, tuple[subprocess.Popen[bytes], int]]()
        self.kills = 0

    def log(self, task: str) -> Path:
        """Return the log of the messages to a task."""
        return self._repository.top.parent / f"sent-{task}"

    def texts(self, task: str) -> list[str]:
        """Return the texts of the messages that were certainly sent to a task."""
        return [line.split()[1] for line in self._lines(task) if line.startswith("sent ")]

    def _lines(self, task: str) -> list[str]:
        return self.log(task).read_text().splitlines() if self.log(task).exists() else []

    def tick(self) -> bool:
        """Kill senders that have written enough, and start others; return whether messages are left."""
        left = [task for task in TASKS if len(self.texts(task)) < PER_TASK]
        for task in left:
            child, until = self._children.get(task, (None, 0))
            if child is not None and child.poll() is None:
                if len(self._lines(task)) < until:
                    continue
                child.kill()
                child.wait()
                self.kills += 1
            call = (
                f"import asyncio; from tests.crash.test_messages import send; asyncio.run(send{self._arguments(task)})"
            )
            environ = {**self._repository.environ, "PYTHONPATH": str(ROOT)}
            started = subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, env=environ)
            self._children[task] = started, len(self._lines(task)) + self._chance.randint(1, 30)
        return bool(left)

    def _arguments(self, task: str) -> tuple[str, str, str, str]:
        return str(self._repository.top), self._run, task, str(self.log(task))

    def end(self) -> None:
        """End all senders."""
        for child, _ in self._children.values():
            child.kill()
            child.wait()


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(60.0, marks=[pytest.mark.extended, pytest.mark.timeout(600)], id="for a minute"),
        pytest.param(math.inf, marks=[pytest.mark.slow, pytest.mark.timeout(3600)], id="until all are sent"),
    ],
)
async def test_messages_under_kills_are_neither_lost_nor_repeated(claude: Repository, seconds: float) -> None:
    """Each recorded message is in the conversation that landed exactly once, and in no conversation twice."""
    chance, done, log = random.Random(7), claude.top.parent / "done", claude.top.parent / "input"
    claude.environ["INPUT_LOG"] = str(log)
    path = claude.configure(
        [{"id": task, "prompt": f"write {task}.txt 1\nlinger {done}", "attempts": 2} for task in TASKS],
        adapters={"claude": {"use": "claude-code", "env": ["INPUT_LOG"]}},
        sandbox="off",
        readable=[],
    )
    assert claude.council("run", str(path), failpoints="run.seeded=kill").code != 0
    run = claude.council("status", "--json").result["run"]
    senders, run_kills = Senders(claude, run, chance), 0
    try:
        is_left, end = True, time.monotonic() + seconds
        while is_left and time.monotonic() < end:
            with claude.start("resume", "--json") as child:
                until = time.monotonic() + chance.uniform(2.0, 8.0)
                while is_left and time.monotonic() < until:
                    is_left = await anyio.to_thread.run_sync(senders.tick)
                    await anyio.sleep(0.05)
                child.send_signal(signal.SIGKILL)
                child.wait(60)
                run_kills += 1
    finally:
        senders.end()
    done.touch()
    ended = claude.council("resume", "--json", timeout=200)
    assert ended.states == dict.fromkeys(TASKS, "landed"), ended
    received: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    for task in TASKS:
        shown = claude.council("show", task, "--json").result
        recorded = [message["text"] for message in shown["messages"]]
        assert len(recorded) == len(set(recorded)) > 0
        assert set(senders.texts(task)) <= set(recorded), "a sent message is not recorded"
        conversations: list[set[int]] = []
        for session in shown["sessions"]:
            if not session["resumed"]:
                conversations.append(set())
            conversations[-1].add(session["number"])
        counts = Counter[str]()
        for conversation in conversations:
            inputs = [one["text"] for one in received if one["task"] == task and one["attempt"] in conversation]
            counts = Counter(word for text in inputs for word in text.split() if word.startswith("<"))
            assert max(counts.values(), default=0) <= 1, counts.most_common(3)
        assert counts.keys() == set(recorded), "the conversation that landed does not have each message"
    if seconds == math.inf:
        assert sum(len(senders.texts(task)) for task in TASKS) == len(TASKS) * PER_TASK
    assert run_kills >= 3
    assert senders.kills >= 4
    await claude.assert_invariants()
