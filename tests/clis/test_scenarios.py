"""One task per real CLI: done, resumed, limited, disconnected, killed, without a login."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Final

import pytest

from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.protocols import Capability
from tests.clis.conftest import Stage
from tests.clis.programs import Program
from tests.clis.test_phases import answer
from tests.fakes import mcp_server
from tests.model_server import RecordedRequest, anthropic, gemini, ollama, openai_chat, openai_responses
from tests.waiting import wait_for

pytestmark = [pytest.mark.clis, pytest.mark.timeout(300)]

_DIALECTS: Final = {
    one.name: one
    for one in (anthropic.DIALECT, gemini.DIALECT, ollama.CHAT, openai_chat.DIALECT, openai_responses.DIALECT)
}


async def test_edit_lands_with_its_token_usage(stage: Stage, program: Program) -> None:
    ended = stage.run("write hello.txt hi\nsay It is written.\nusage 120 34")
    assert ended.states == {"task": "landed"}, stage.diagnostics(ended)
    assert stage.repository.git("show", "main:hello.txt") == "hi"
    (task,) = ended.result["tasks"]
    assert task["attempts"] == 1
    least = {True: (120, 34), False: (1, 1), None: (0, 0)}[program.tells_tokens]
    assert task["input_tokens"] >= least[0]
    assert task["output_tokens"] >= least[1]
    await stage.assert_clean()


@pytest.mark.extended
async def test_shell_command_runs_in_the_worktree(stage: Stage, program: Program) -> None:
    if not program.has_shell:
        pytest.skip("it runs no commands")
    ended = stage.run("run pwd | tr a-z A-Z > where.txt\nsay It ran.")
    assert ended.states == {"task": "landed"}, stage.diagnostics(ended)
    assert stage.repository.git("show", "main:where.txt").startswith("/")
    await stage.assert_clean()


async def test_failed_check_is_repaired_in_the_same_conversation(stage: Stage, program: Program) -> None:
    """The model gets the whole conversation, or a new one if the CLI cannot resume."""
    check = "test -e second.txt || { echo write second.txt 2; exit 1; }"
    ended = stage.run("write first.txt 1\nsay The first is written.", checks=[check], allow_failing_base=True)
    assert ended.states == {"task": "landed"}, stage.diagnostics(ended)
    first, second = (await stage.task()).attempts
    assert (first.outcome, first.resumed) == ("checks_failed", False)
    assert (second.outcome, second.resumed) == ("built", program.can(Capability.RESUME))
    if program.can(Capability.RESUME):
        assert first.session == second.session
    assert any(map(_goes_on, stage.server.requests)) is program.can(Capability.RESUME)
    assert stage.repository.git("show", "main:first.txt").startswith("1")
    assert stage.repository.git("show", "main:second.txt") == "2"
    await stage.assert_clean()


async def test_failed_check_keeps_a_session_from_ending(stage: Stage, program: Program) -> None:
    """If the CLI has a stop hook: the model gets the check's output, and its one session lands."""
    if not program.can(Capability.STOP_GATE):
        pytest.skip("it has no stop hook")
    check = "test -e second.txt || { echo write second.txt 2; exit 1; }"
    prompt = "write first.txt 1\nsay The first is written."
    ended = stage.run(prompt, checks=[check], allow_failing_base=True, stop_gate=True)
    assert ended.states == {"task": "landed"}, stage.diagnostics(ended)
    (attempt,) = (await stage.task()).attempts
    assert attempt.outcome == "built"
    assert stage.repository.git("show", "main:second.txt") == "2"
    await stage.assert_clean()


async def test_message_of_the_user_reaches_the_model_after_a_tool_call(
    stage: Stage, program: Program, tmp_path: Path
) -> None:
    """If the CLI has such a hook: once in each later request of its turn, and in the resumed conversation."""
    if not program.can(Capability.POST_TOOL):
        pytest.skip("it has no hook after a tool call")
    folder = tmp_path / "signals"
    folder.mkdir()
    wait = f"touch {folder}/waits; until [ -e {folder}/go ]; do sleep 0.1; done"
    check = "test -e second.txt || { echo write second.txt 2; exit 1; }"
    started = stage.start(
        f"run {wait}\nwrite first.txt 1\nsay The first is written.",
        {"writable": [str(folder)]},
        checks=[check],
        allow_failing_base=True,
    )
    try:
        wait_for((folder / "waits").exists, 150)
        before = len(stage.server.requests)
        assert stage.repository.council("tell", "task", "Speak as plainly as a QUAKER would.").code == 0
        wait_for(lambda: list(Path(stage.repository.environ["COUNCIL_HOME"]).rglob("socket/messages")))
        (folder / "go").touch()
    finally:
        ended = stage.end(started)
    assert ended.states == {"task": "landed"}, stage.diagnostics(ended)
    first, second = (await stage.task()).attempts
    assert (first.session, second.resumed) == (second.session, True)
    counts = [json.dumps(one.body).count("QUAKER") for one in stage.server.requests[before:] if one.dialect]
    assert len(counts) > 2
    assert set(counts) == {1}, counts
    shown = stage.repository.council("show", "task", "--json").result
    assert [message["attempts"] for message in shown["messages"]] == [[1]]
    await stage.assert_clean()


async def test_instructions_and_mcp_servers_reach_the_model(stage: Stage, program: Program, tmp_path: Path) -> None:
    """Instructions appear in its input; a server is started with its variable and listed for tools."""
    log = tmp_path / "servers" / "log"
    log.parent.mkdir()
    stage.repository.environ["LOOKUP_TOKEN"] = "a-word-for-the-server"
    command = [sys.executable, "-S", mcp_server.__file__, str(log)]
    settings = {
        "mcp_servers": {"lookup": {"command": command, "env": ["LOOKUP_TOKEN"]}},
        "writable": [str(log.parent)],
    }
    ended = stage.run("write hello.txt hi", settings, instructions="Speak as plainly as a QUAKER would.")
    assert ended.states == {"task": "landed"}, stage.diagnostics(ended)
    assert any("QUAKER" in json.dumps(one.body) for one in stage.server.requests if one.dialect)
    asked = log.read_text().splitlines() if log.exists() else []
    assert ("a-word-for-the-server" in asked, "tools/list" in asked) == (program.can(Capability.MCP),) * 2, asked
    await stage.assert_clean()


async def test_usage_limit_costs_no_attempt(stage: Stage, program: Program) -> None:
    """The task's only attempt is not used up."""
    ended = stage.run(f"fail 429 {program.calls} 1\nwrite hello.txt hi", attempts=1)
    assert ended.states == {"task": "landed"}, stage.diagnostics(ended)
    (parked,) = [line for line in ended.lines if line.get("event") == "adapter.cooling_down"]
    assert parked["adapter"] in stage.programs
    task = await stage.task()
    assert [one.outcome for one in task.attempts] == ["rate_limited", "built"]
    assert task.failures == 0
    assert ended.result["adapters"] == []
    await stage.assert_clean()


async def test_unreachable_server_costs_no_attempt(unreachable: Stage, program: Program) -> None:
    """Nothing lands, and the failure class is that of the network."""
    ended = unreachable.run(
        "write hello.txt hi", attempts=1, timeout="20s" if program.without_server == "timeout" else "2m"
    )
    (task,) = ended.result["tasks"]
    assert task["failure"] == program.without_server, unreachable.diagnostics(ended)
    assert task["status"] != "landed"
    assert [one.outcome for one in (await unreachable.task()).attempts] == [program.without_server]
    assert unreachable.repository.git("rev-list", "--count", "main") == "1"
    await unreachable.assert_clean()


@pytest.mark.extended
async def test_broken_stream_costs_no_attempt(stage: Stage, program: Program) -> None:
    """Every answer ends in the middle: nothing lands, and the failure class is that of the network."""
    ended = stage.run("drop\nwrite hello.txt hi", attempts=1, timeout="2m")
    (task,) = ended.result["tasks"]
    assert task["failure"] == program.broken_stream, stage.diagnostics(ended)
    assert [one.outcome for one in (await stage.task()).attempts] == [program.broken_stream]
    assert stage.repository.git("rev-list", "--count", "main") == "1"
    await stage.assert_clean()


@pytest.mark.extended
async def test_model_that_never_answers_ends_with_the_timeout(stage: Stage) -> None:
    """With everything that the program started."""
    started = stage.start("delay 600\nwrite hello.txt hi", attempts=1, timeout="45s")
    wait_for(lambda: any(one.dialect for one in stage.server.requests), 150)
    ended = stage.end(started)
    (task,) = ended.result["tasks"]
    assert task["failure"] == "timeout", stage.diagnostics(ended)
    assert [one.outcome for one in (await stage.task()).attempts] == ["timeout"]
    await stage.assert_clean()


@pytest.mark.extended
async def test_interrupted_run_is_resumed(stage: Stage) -> None:
    """The interrupt comes during a model request: the program ends, and its attempt is repeated without a cost."""
    started = stage.start("delay 2\nwrite hello.txt hi", attempts=1)
    try:
        wait_for(lambda: any(one.dialect for one in stage.server.requests), 150)
        started.send_signal(signal.SIGINT)
    finally:
        interrupted = stage.end(started)
    assert interrupted.states != {"task": "landed"}
    wait_for(lambda: not stage.clients())
    resumed = stage.end(stage.repository.start("resume", "--json"))
    assert resumed.states == {"task": "landed"}, stage.diagnostics(resumed)
    assert [one.outcome for one in (await stage.task()).attempts] == ["interrupted", "built"]
    assert stage.repository.git("show", "main:hello.txt") == "hi"
    await stage.assert_clean()


@pytest.mark.extended
async def test_read_only_phase_changes_nothing(stage: Stage) -> None:
    """The file that the model wants to write is refused, or discarded; the next phase may write one."""
    scout = answer({"scout_findings": ["there is a.txt"]})
    prompt = (
        "write hello.txt hi\nsay It is written.\n"
        f"once your result (scout)\nwrite early.txt no\n{scout}\n"
        f"once that you submitted is invalid\n{scout}"
    )
    workflow = [{"scout": {"access": "read", "produces": "scout"}}, {"build": {}}]
    ended = stage.run(prompt, {"workflows": {"two": workflow}}, workflow="two", attempts=1)
    assert ended.states == {"task": "landed"}, stage.diagnostics(ended)
    names = stage.repository.git("ls-tree", "-r", "--name-only", "main").splitlines()
    assert ("hello.txt" in names, "early.txt" in names) == (True, False)
    await stage.assert_clean()


async def test_killed_program_is_a_crash_and_is_retried(stage: Stage) -> None:
    """The kill happens during a model request."""
    started = stage.start("delay 5\nwrite hello.txt hi", attempts=2)
    try:
        wait_for(lambda: any(one.dialect for one in stage.server.requests), 150)
        for process in stage.clients():
            process.kill()
    finally:
        ended = stage.end(started)
    assert ended.states == {"task": "landed"}, stage.diagnostics(ended)
    assert [one.outcome for one in (await stage.task()).attempts] == ["crashed", "built"]
    await stage.assert_clean()


async def test_missing_login_disables_the_adapter_with_a_remedy(logged_out: Stage, program: Program) -> None:
    """The attempt is not used up, and the result has the fix."""
    ended = logged_out.run("write hello.txt hi" if program.keys else "fail 401\nwrite hello.txt hi", attempts=1)
    (adapter,) = ended.result["adapters"]
    assert program.remedy in adapter["disabled_reason"], logged_out.diagnostics(ended)
    assert ended.states == {"task": "blocked"}
    task = await logged_out.task()
    assert (task.status, task.failures) == (TaskStatus.PENDING, 0)
    assert [one.outcome for one in task.attempts] == ["auth"]
    await logged_out.assert_clean()


def _goes_on(request: RecordedRequest) -> bool:
    """Return whether a request has an earlier prompt and its results before the current one."""
    if request.dialect is None:
        return False
    turns = _DIALECTS[request.dialect].read(request.path, request.body).turns
    worked = next((number for number, turn in enumerate(turns) if turn.role == "tool"), len(turns))
    asked = [number for number, turn in enumerate(turns) if "write second.txt" in turn.text]
    return bool(asked) and asked[-1] > worked and any("write first.txt" in turn.text for turn in turns[:worked])
