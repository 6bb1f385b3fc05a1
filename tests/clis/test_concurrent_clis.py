"""All real CLIs run concurrently on one repository."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.clis.conftest import SELECTED, Stage
from tests.conftest import Repository
from tests.model_server import ModelServer

pytestmark = [pytest.mark.clis, pytest.mark.timeout(300)]

#: Distinguished by type rather than by protocol.
_PROGRAMS = ("claude-code", "codex", "gemini", "opencode", "aider")
_TASKS = 15


async def test_concurrent_clis_land_all_their_tasks(repository: Repository, server: ModelServer) -> None:
    """Five CLIs, three tasks each, five sessions at once: each file on the target is from its own attempt."""
    programs = {name: SELECTED[name] for name in _PROGRAMS if name in SELECTED}
    if not programs:
        pytest.skip(f"none of {', '.join(_PROGRAMS)} is chosen by CLIS")
    stage = Stage(repository, server, programs, server.url)
    stage.set_up()
    names = list(programs)
    tasks = [
        {
            "id": f"task-{number}",
            "adapter": names[number % len(names)],
            "prompt": f"write out/{number}.txt {number}\nsay Number {number} is written.",
        }
        for number in range(_TASKS)
    ]
    checks = {"checks": ["test -s README.md"], "timeout": "3m"}
    path = stage.configure(tasks, capacity=5, session_memory="64MiB", defaults=checks)
    ended = stage.end(repository.start("run", str(path), "--json"))
    assert Counter(ended.states.values()) == {"landed": _TASKS}, stage.diagnostics(ended)
    assert [len(task.attempts) for task in await stage.tasks()] == [1] * _TASKS
    written = {number: repository.git("show", f"main:out/{number}.txt") for number in range(_TASKS)}
    assert written == {number: str(number) for number in range(_TASKS)}
    await stage.assert_clean()
