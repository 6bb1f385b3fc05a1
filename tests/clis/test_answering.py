"""CLIs that answer in text and change no files: one read-only phase per scenario."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import pytest

from tests.clis.conftest import NOWHERE, SELECTED, Stage
from tests.clis.test_phases import answer
from tests.clis.test_reviewing import SCOUT
from tests.conftest import Repository
from tests.model_server import ModelServer
from tests.waiting import wait_for

pytestmark = [pytest.mark.clis, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Scenario:
    """The model's directives before its answer, and the outcomes of the attempts; {calls} is that of the CLI."""

    outcomes: Sequence[str]
    directives: str = ""
    timeout: str = "2m"
    is_dead: bool = False
    is_interrupted: bool = False


SCENARIOS: Final = {
    "answer": Scenario(["completed"]),
    "limited": Scenario(["rate_limited", "completed"], "fail 429 {calls} 1\n"),
    "no-login": Scenario(["auth"], "fail 401\n"),
    "dead-server": Scenario(["transient"], is_dead=True),
    "broken-stream": Scenario(["transient"], "drop\n"),
    "hang": Scenario(["timeout"], "delay 600\n", timeout="30s"),
    "interrupted": Scenario(["interrupted", "completed"], "delay 2\n", is_interrupted=True),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", [name for name, program in SELECTED.items() if not program.edits])
async def test_phase_of_a_cli_that_only_answers(
    repository: Repository, server: ModelServer, name: str, scenario: str
) -> None:
    """Its answer is the handoff; a limit, an unreachable server and an interrupt cost no attempt."""
    program, wanted = SELECTED[name], SCENARIOS[scenario]
    stage = Stage(repository, server, {name: program}, NOWHERE if wanted.is_dead else server.url)
    stage.set_up()
    look = {"look": [{"scout": {"access": "read", "produces": "scout"}}]}
    prompt = f"{wanted.directives.format(calls=program.calls)}{answer(SCOUT)}"
    started = stage.start(prompt, {"workflows": look}, workflow="look", attempts=1, timeout=wanted.timeout)
    if wanted.is_interrupted:
        wait_for(lambda: any(one.dialect for one in server.requests), 150)
        started.send_signal(signal.SIGINT)
    ended = stage.end(started)
    if wanted.is_interrupted:
        ended = stage.end(repository.start("resume", "--json"))
    task = await stage.task()
    assert [one.outcome for one in task.attempts] == wanted.outcomes, stage.diagnostics(ended)
    assert (task.status == "done") is (wanted.outcomes[-1] == "completed")
    await stage.assert_clean()
