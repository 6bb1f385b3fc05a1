"""Messages of the user to the agents of a task (`council tell`)."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.system.process_table import process_stat
from tests.command_server import StartedCommand
from tests.conftest import CommandResult, Repository
from tests.fakes.script import ROOT, install
from tests.waiting import wait_for


def configured(claude: Repository, prompt: str, **more: Any) -> Path:
    """Write a file with one task for the fake `claude`."""
    return claude.configure(
        [{"id": "one", "prompt": prompt, "attempts": 2}],
        adapters={"claude": {"use": "claude-code"}},
        readable=[str(claude.top.parent), sys.prefix, str(ROOT / "tests")],
        sandbox="off",
        **more,
    )


def send(repository: Repository, text: str, *options: str) -> CommandResult:
    """Send a message to the task."""
    return repository.council("tell", "one", text, "--json", *options)


@pytest.mark.extended
async def test_message_reaches_a_running_agent_before_it_ends(claude: Repository) -> None:
    """In the same session, which continues with it; and the landed work has it."""
    go = claude.top.parent / "go"
    prompt = f"run until test -e {go}; do sleep 0.05; done\nstopped a.txt right"
    with claude.start("run", str(configured(claude, prompt)), "--json") as child:
        wait_for(lambda: list((claude.top / ".council/logs").glob("*/one.1.stdout")))
        sent = send(claude, "make it right")
        assert (sent.code, sent.result["receiver"]) == (0, "session"), sent
        go.touch()
        assert child.wait(60) == 0
    shown = claude.council("show", "one", "--json").result
    assert [(one["text"], one["attempts"]) for one in shown["messages"]] == [("make it right", [1])]
    assert len(shown["sessions"]) == 1
    assert "make it right" in claude.council("logs", "one", "--raw").stdout
    assert claude.git("show", "main:a.txt") == "right"
    await claude.assert_invariants()


async def test_message_reaches_a_running_agent_after_a_tool_call(claude: Repository) -> None:
    """While its turn continues, and only once."""
    go = claude.top.parent / "go"
    with claude.start("run", str(configured(claude, f"work {go}\nwrite a.txt 1")), "--json") as child:
        wait_for(lambda: list((claude.top / ".council/logs").glob("*/one.1.stdout")))
        sent = send(claude, "be quick")
        assert "after its agent's next tool call" in sent.result["delivery"], sent
        wait_for(lambda: "be quick" in claude.council("logs", "one", "--raw").stdout)
        go.touch()
        assert child.wait(60) == 0
    shown = claude.council("show", "one", "--json").result
    assert [(one["text"], one["attempts"]) for one in shown["messages"]] == [("be quick", [1])]
    assert len(shown["sessions"]) == 1
    assert claude.council("logs", "one", "--raw").stdout.count("be quick") == 1
    await claude.assert_invariants()


@pytest.mark.extended
async def test_message_reaches_an_acp_agent_in_the_same_connection(repository: Repository, tmp_path: Path) -> None:
    """As the next prompt, after its turn; the tokens of both turns count."""
    install(tmp_path / "bin", "acp-agent", "tests.fakes.acp_agent")
    repository.environ["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{repository.environ['PATH']}"
    go = repository.top.parent / "go"
    path = repository.configure(
        [{"id": "one", "prompt": f"write a.txt wrong\nawait {go}"}],
        adapters={"acp": {"use": "acp", "argv": ["acp-agent"]}},
        readable=[],
        sandbox="off",
    )
    with repository.start("run", str(path), "--json") as child:
        log = repository.top / ".council/logs"
        wait_for(lambda: any("session" in file.read_text() for file in log.glob("*/one.1.stdout")))
        sent = send(repository, "write a.txt right")
        assert (sent.code, sent.result["receiver"]) == (0, "session"), sent
        assert "about to end its turn" in sent.result["delivery"]
        go.touch()
        assert child.wait(60) == 0
    shown = repository.council("show", "one", "--json").result
    assert [one["attempts"] for one in shown["messages"]] == [[1]]
    assert [(one["input_tokens"], one["output_tokens"], one["cost"]) for one in shown["sessions"]] == [(80, 40, 1.0)]
    assert repository.git("show", "main:a.txt") == "right"
    await repository.assert_invariants()


@pytest.mark.extended
async def test_message_before_the_first_session_is_in_its_prompt(claude: Repository) -> None:
    path = configured(claude, "tell input.json")
    assert claude.council("run", str(path), failpoints="run.seeded=kill").code != 0
    sent = send(claude, "and be quick")
    assert (sent.code, sent.result["receiver"]) == (0, "next_session"), sent
    assert claude.council("resume", "--json").states == {"one": "landed"}
    assert "and be quick" in json.loads(claude.git("show", "main:input.json"))["prompt"]
    await claude.assert_invariants()


async def test_message_that_no_session_received_keeps_work_from_landing(repository: Repository) -> None:
    """A CLI without a stop hook gets another session, which starts from the work of the first."""
    go = repository.top.parent / "go"
    prompt = f"attempt 1 write a.txt first\nattempt 1 await {go}\nattempt 2 append a.txt second"
    path = repository.configure([{"id": "one", "prompt": prompt}], readable=[str(repository.top.parent)], sandbox="off")
    with repository.start("run", str(path), "--json") as child:
        wait_for(lambda: list((repository.top / ".council/logs").glob("*/one.1.stdout")))
        sent = send(repository, "add a line")
        assert sent.result["receiver"] == "next_session", sent
        assert "another session follows" in sent.result["delivery"]
        go.touch()
        assert child.wait(60) == 0
    shown = repository.council("show", "one", "--json").result
    assert [one["attempts"] for one in shown["messages"]] == [[2]]
    assert [one["outcome"] for one in shown["sessions"]] == ["built", "built"]
    assert repository.git("show", "main:a.txt") == "first\nsecond"
    await repository.assert_invariants()


@pytest.mark.extended
async def test_message_to_an_interrupted_session_names_the_resume_that_delivers_it(claude: Repository) -> None:
    """No session is running, although the task was recorded as running when its process was killed."""
    go = claude.top.parent / "go"
    path = configured(claude, f"attempt 1 await {go}\nattempt 2 tell input.json")
    with claude.start("run", str(path)) as child:
        wait_for(lambda: list((claude.top / ".council/logs").glob("*/one.1.stdout")))
        child.kill()
    run = claude.council("status", "--json").result["run"]
    sent = send(claude, "and be quick")
    assert (sent.code, sent.result["receiver"]) == (0, "next_session"), sent
    assert f"`council resume {run}`" in sent.result["delivery"]
    assert claude.council("resume", "--json").states == {"one": "landed"}
    assert [one["attempts"] for one in claude.council("show", "one", "--json").result["messages"]] == [[2]]
    await claude.assert_invariants()


async def test_message_to_finished_work_is_refused_and_not_kept(repository: Repository) -> None:
    """With what to do instead."""
    path = repository.configure([{"id": "one", "prompt": "write a.txt 1"}])
    assert repository.council("run", str(path)).code == 0
    late = repository.council("tell", "one", "too late")
    assert late.code == 2
    assert "is landed" in late.stderr
    assert "new run" in late.stderr
    assert repository.council("show", "one", "--json").result["messages"] == []


@pytest.mark.parametrize("text", [" ", "x" * 10_001, "use sk-ant-api03-" + "a" * 90])
def test_unusable_text_is_refused(repository: Repository, text: str) -> None:
    """An empty text, one that is too long, and one with a secret."""
    path = repository.configure([{"id": "one", "prompt": "write a.txt 1"}])
    assert repository.council("run", str(path), failpoints="run.seeded=kill").code != 0
    assert send(repository, text).code == 2


@pytest.mark.extended
async def test_messages_under_kills_are_neither_lost_nor_repeated(claude: Repository) -> None:
    """Each is in each conversation once, wherever `tell` or the run is killed."""
    path = configured(claude, "tell input.json")
    assert claude.council("run", str(path), failpoints="run.seeded=kill").code != 0
    texts = [f"message-{number}." for number in range(6)]
    for number, text in enumerate(texts):
        is_killed = number % 3 == 0
        sent = claude.council("tell", "one", text, failpoints="message.sent=kill" if is_killed else "")
        assert (sent.code == -signal.SIGKILL) is is_killed, sent
    for point in ("attempt.recorded", "session.spawned"):
        assert claude.council("resume", failpoints=f"{point}=kill").code != 0
    assert claude.council("resume", "--json").states == {"one": "landed"}
    prompt = json.loads(claude.git("show", "main:input.json"))["prompt"]
    recorded = [one["text"] for one in claude.council("show", "one", "--json").result["messages"]]
    assert recorded == texts, "a kill after the commit loses nothing"
    assert [prompt.count(text) for text in texts] == [1] * len(texts)
    await claude.assert_invariants()


@pytest.mark.extended
async def test_message_whose_delivery_was_interrupted_arrives_in_the_next_session(claude: Repository) -> None:
    """The run was killed after recording the delivery, before the agent had the message."""
    go = claude.top.parent / "go"
    prompt = f"run until test -e {go}; do sleep 0.05; done\ntell input.json\nattempt 1 stopped lost.txt x"
    path = configured(claude, prompt)
    with claude.start("run", str(path), "--json", failpoints="message.delivered=kill") as child:
        wait_for(lambda: list((claude.top / ".council/logs").glob("*/one.1.stdout")))
        assert send(claude, "make it right").code == 0
        go.touch()
        assert child.wait(60) == -signal.SIGKILL
    assert claude.council("resume", "--json").states == {"one": "landed"}
    assert json.loads(claude.git("show", "main:input.json"))["prompt"].count("make it right") == 1
    (message,) = claude.council("show", "one", "--json").result["messages"]
    assert message["attempts"] == [1, 2]
    await claude.assert_invariants()


@contextmanager
def told_while_built(claude: Repository, failpoints: str) -> Iterator[tuple[StartedCommand, StartedCommand]]:
    """Yield a run and a `tell`, which continues at its first failpoint once the run has stopped with built work."""
    go = claude.top.parent / "go"
    path = configured(
        claude, f"run until test -e {go}; do sleep 0.05; done\nwrite a.txt 1", coordination={"tools": False}
    )
    with claude.start("run", str(path), "--json", failpoints="work.recorded=stop") as child:
        wait_for(lambda: list((claude.top / ".council/logs").glob("*/one.1.stdout")))
        with claude.start("tell", "one", "be quick", failpoints=failpoints) as tell:
            wait_for(lambda: is_stopped(tell.pid))
            go.touch()
            wait_for(lambda: is_stopped(child.pid))
            tell.send_signal(signal.SIGCONT)
            yield child, tell


@pytest.mark.extended
async def test_message_is_not_withdrawn_once_the_task_continues_for_it(claude: Repository) -> None:
    """`tell` finds the task queued to land, while the run has just seen the message."""
    with told_while_built(claude, "message.sent=stop,message.withdrawing=stop") as (child, tell):
        wait_for(lambda: is_stopped(tell.pid))
        child.send_signal(signal.SIGCONT)
        wait_for(lambda: list((claude.top / ".council/logs").glob("*/one.2.stdout")))
        tell.send_signal(signal.SIGCONT)
        assert tell.wait(60) == 0
        assert child.wait(60) == 0
    shown = claude.council("show", "one", "--json").result
    assert [(one["text"], one["attempts"]) for one in shown["messages"]] == [("be quick", [2])]
    assert shown["status"] == "landed"
    await claude.assert_invariants()


@pytest.mark.extended
async def test_message_withdrawn_before_the_task_continues_is_refused(claude: Repository) -> None:
    """The run lands the work without another session."""
    with told_while_built(claude, "message.sent=stop") as (child, tell):
        assert tell.wait(60) == 2
        child.send_signal(signal.SIGCONT)
        assert child.wait(60) == 0
    shown = claude.council("show", "one", "--json").result
    assert (shown["messages"], len(shown["sessions"]), shown["status"]) == ([], 1, "landed")
    await claude.assert_invariants()


def is_stopped(pid: int) -> bool:
    """Return whether a failpoint has stopped a process."""
    stat = process_stat(pid)
    return stat is not None and stat.is_stopped
