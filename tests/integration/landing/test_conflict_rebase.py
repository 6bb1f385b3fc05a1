"""With `on_predicted_conflict: rebase`, a task continues on top of landed work with which a conflict was predicted."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.command_server import StartedCommand
from tests.conftest import Repository
from tests.fakes.script import ROOT
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest


@contextmanager
def predicted(claude: Repository, failpoints: str = "") -> Iterator[StartedCommand]:
    """Run two tasks with a conflict, then let `auth` land, whose work is being checked while `web` adds a conflict.

    The session of `web` never ends by itself. A message has the steps of its next session.
    """
    gates = {name: claude.top.parent / name for name in ("built", "checked", "added")}
    claude.commit({"a.txt": "line\n", "b.txt": "line\n"})
    claude.remember()
    tasks = [
        {"id": "auth", "prompt": f"write a.txt auth\nwrite b.txt auth\nawait {gates['built']}"},
        {
            "id": "web",
            "prompt": f"write a.txt web\nattempt 1 work {gates['added']}\nwrite b.txt web\nattempt 1 hang",
            "adapter": "claude",
        },
    ]
    check = f"grep -q line a.txt || until [ -e {gates['checked']} ]; do sleep 0.05; done"  # passes on the base
    path = claude.configure(
        tasks,
        adapters={"fake": claude.fake_adapter(), "claude": {"use": "claude-code"}},
        defaults={"attempts": 1, "timeout": "60s", "adapter": "fake", "checks": [check]},
        readable=[str(claude.top.parent), sys.prefix, str(ROOT / "tests")],
        sandbox="off",
        capacity=2,
        merge={"on_predicted_conflict": "rebase"},
    )
    child = claude.start("run", str(path), failpoints=failpoints)
    try:
        wait_for(lambda: "a.txt" in claude.council("conflicts").stdout)
        gates["built"].touch()
        wait_for(lambda: {one["id"]: one["status"] for one in status(claude)["tasks"]}["auth"] == "checking")
        gates["added"].touch()
        wait_for(lambda: [one["conflicts"] for one in status(claude)["sessions"]] == [{"auth": ["a.txt", "b.txt"]}])
        sent = claude.council("tell", "web", "write c.txt both\ntell input.json")
        assert sent.code == 0, sent
        gates["checked"].touch()
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            child.communicate()


def status(claude: Repository) -> dict[str, Any]:
    return claude.council("status", "--json").result


def sessions(claude: Repository) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = claude.council("show", "web", "--json").result["sessions"]
    return found


async def test_session_continues_on_the_landed_work_in_its_conversation(claude: Repository) -> None:
    """It is stopped once, and learns what conflicted; its earlier work is in the prompt."""
    with predicted(claude) as child:
        refused = claude.council("queue", "release", "web")
        assert "task 'web' is not held" in refused.stderr
        child.communicate(timeout=90)
    first, second = sessions(claude)
    assert (first["outcome"], second["outcome"], second["resumed"]) == ("paused", "built", True)
    assert first["reason"] == "auth landed, and a merge conflict with its work was predicted"
    assert claude.git("show", "main:a.txt", "main:b.txt", "main:c.txt") == "auth\nauth\nboth"
    assert claude.git("rev-parse", f"{second['base']}:a.txt") == claude.git("rev-parse", "main^1:a.txt")
    prompt = json.loads(claude.git("show", "main:input.json"))["prompt"]
    assert "the work of auth has landed" in prompt
    assert "conflicted with it in a.txt, b.txt." in prompt
    assert "+web" in prompt
    await claude.assert_invariants()


@pytest.mark.parametrize("failpoint", ["session.ended", "attempt.ended", "attempt.recorded"])
async def test_rebase_killed_at_a_failpoint_happens_once(claude: Repository, failpoint: str) -> None:
    """A session that was not recorded as stopped is interrupted: its work is salvaged, and the task starts again."""
    hit = 3 if failpoint == "attempt.recorded" else 2
    with predicted(claude, failpoints=f"{failpoint}=kill@{hit}") as child:
        child.communicate(timeout=90)
        assert child.returncode == -signal.SIGKILL
    ended = claude.council("resume", "--json")
    assert ended.states == {"auth": "landed", "web": "landed"}, ended
    outcomes = [one["outcome"] for one in sessions(claude)]
    assert outcomes[0] == ("interrupted" if failpoint == "session.ended" else "paused"), outcomes
    assert outcomes.count("paused") <= 1
    assert claude.git("show", "main:c.txt") == "both"
    assert sessions(claude)[0]["branch"] is not None
    await claude.assert_invariants()
