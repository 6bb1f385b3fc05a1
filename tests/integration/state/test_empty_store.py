"""Every command and call works on an empty state, and says that it is empty."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import click
import pytest

from orchestrator import Council
from orchestrator.api.topics.health import Health
from orchestrator.cli.commands.state.state import state
from orchestrator.protocols import Commit, Event
from tests.conftest import Repository

#: The arguments of commands that need any; none of these names exists.
ARGUMENTS: dict[str, list[str]] = {
    "history": ["task/a"],
    "at": ["now"],
    "diff": ["0", "now"],
    "export": ["out.jsonl.zst"],
    "import": ["nothing.jsonl.zst"],
    "copy": [".council/state", "copy"],
    "resolve": ["task/a", "--take", "1"],
}
#: Exit code 0: everything listed; 2: nothing of that name found.
CODES = {0, 2}


@pytest.fixture
def repository(repository: Repository) -> Repository:
    """A repository with an open store without commits."""
    (repository.top / ".council/state").mkdir(mode=0o700, parents=True)
    return repository


def test_each_command_works_on_an_empty_store(repository: Repository) -> None:
    """In a process of its own; only `log --follow` never ends by itself."""
    assert isinstance(state, click.Group)
    for name in state.list_commands(click.Context(state)):
        ended = repository.council("state", name, *ARGUMENTS.get(name, []), timeout=15)
        assert ended.code in CODES, (name, ended)
        assert "internal" not in ended.stderr, (name, ended)
    for name in ("status", "runs", "where", "locks"):
        assert repository.council(name, timeout=15).code in CODES, name


@pytest.mark.parametrize("url", [None, "memory:"])
async def test_each_python_call_works_on_an_empty_store(repository: Repository, url: str | None) -> None:
    """On files and in memory; an empty folder becomes an empty store."""
    async with Council.open(repository.top, state=url, environ=repository.environ) as council:
        looks: list[Callable[[], Awaitable[Any]]] = [
            council.state.verify,
            council.state.repair,
            council.state.compact,
            council.runs.list,
            council.runs.ids,
            council.checkpoints.list,
            council.state.conflicts,
            council.locks.list,
            council.state.paths,
            lambda: council.history.at(0),
            lambda: council.history.position_at(0.0),
            lambda: council.history.newest_commits(10, until=1),
            council.state.check_health,  # the last one: it makes a commit
        ]
        with anyio.fail_after(10):
            for look in looks:
                await look()
            assert [one async for one in council.history.commits(until=9)] != []


async def test_health_works_during_writes(repository: Repository) -> None:
    """Concurrent commits neither delay it nor are waited for."""
    async with (
        Council.open(repository.top, environ=repository.environ) as council,
        Council.open(repository.top, environ=repository.environ) as other,
        anyio.create_task_group() as group,
    ):

        async def write() -> None:
            while True:
                await other._context.store.commit(Commit([], [Event("a")], durable=False))
                await anyio.sleep(0)  # cancellable here

        group.start_soon(write)
        with anyio.fail_after(10):
            assert (await Health(council._context).examine()).findings
        group.cancel_scope.cancel()
