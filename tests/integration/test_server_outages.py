"""A run whose state is on a server survives restarts of the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

import anyio
import pytest
from anyio import to_thread

from orchestrator.domain.events.runs import RunJoined
from tests import postgres_server, redis_server
from tests.conftest import CommandResult, Repository
from tests.cutting_proxy import CuttingProxy
from tests.integration.test_shared_runs import ended, shared, states
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer
from tests.stores import open_store
from tests.waiting import wait_for

#: Seconds after the start of a server until work continues.
RESUMED = 5


Server = PostgresServer | RedisServer
SERVERS = {"postgres": postgres_server, "redis": redis_server}


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Return a server of the test's own."""
    with SERVERS[request.param].started_server() as made:
        yield made


async def wait_for_workers(url: str, count: int) -> None:
    """Wait until workers have joined the run."""
    async with open_store(url) as store:
        with anyio.fail_after(60):
            async for record in store.watch():
                count -= sum(event.type == RunJoined.type for event in record.events)
                if count == 0:
                    return


async def wait_for_commits(url: str) -> None:
    """Wait until the processes of a run commit again."""
    async with open_store(url) as store:
        after = await store.position()
        with anyio.fail_after(RESUMED):
            async for record in store.watch(after):
                if record.position > after:
                    return


@pytest.mark.parametrize(
    ("count", "restarts"),
    [pytest.param(9, 2, marks=pytest.mark.extended), pytest.param(40, 10, marks=pytest.mark.slow)],
)
def test_tasks_of_three_processes_land_once_despite_restarts(
    repository: Repository, server: Server, count: int, restarts: int
) -> None:
    """Work resumes within seconds; meanwhile `status` names the server that is waited for."""
    url = repository.environ["COUNCIL_STATE"] = server.url()
    config = repository.configure(shared(count), capacity=2)
    children = [repository.start("run", str(config), "--json")]
    wait_for(lambda: repository.council("status", "--json").result.get("status") == "running")
    children += [repository.start("work", "--json") for _ in range(2)]
    anyio.run(wait_for_workers, url, 2)
    for number in range(restarts):
        done = count * number // restarts
        wait_for(lambda least=done: Counter(states(repository).values())["landed"] >= least, 60)  # type: ignore[misc]
        server.kill()
        shown = repository.council("status", "--json")
        assert (shown.code, shown.result["status"]) == (1, "unavailable")
        assert f":{server.port}/" in shown.result["error"]
        assert ": unreachable" in shown.result["error"]
        assert shown.result["remedy"].startswith("start the server")
        server.start()
        anyio.run(wait_for_commits, url)
    assert ended(*children) == [0, 0, 0]
    assert set(states(repository).values()) == {"landed"}
    landed = repository.git("log", "--format=%(trailers:key=Council-Task,valueonly)", "main").split()
    assert Counter(name.rpartition("/")[2] for name in landed) == {f"t{number}": 1 for number in range(count)}


@pytest.mark.extended
@pytest.mark.parametrize("step", [60, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", ["run", "resume", "work", "status"])
async def test_any_failing_request_costs_only_time(
    repository: Repository, server: Server, command: str, step: int
) -> None:
    """A command ends without a traceback, whichever of its requests fails, and `resume` completes the run."""
    config = str(repository.configure([{"id": "one", "prompt": "append a.txt 1"}]))

    async def council(*words: str) -> CommandResult:
        return await to_thread.run_sync(partial(repository.council, *words, "--json"))

    number, is_cut = 0, True
    while is_cut:
        async with CuttingProxy(server.port).serve() as proxy:
            url = server.url().replace(str(server.port), str(proxy.port))
            repository.environ["COUNCIL_STATE"] = url
            if command != "run":
                await council("run", config)
            proxy.outage, proxy.requests_left = 0.3, number
            ended = await council(*([command, config] if command == "run" else [command]))
            is_cut, proxy.requests_left = proxy.cuts > 0, -1
            assert ended.code in {0, 1, 2}, (number, ended)
            assert "Traceback" not in ended.stderr
            proxy.accept()
            completed = (await council("resume")).result
            states = {task["id"]: task["status"] for task in completed.get("tasks", ())}
            assert states == {"one": "landed"} or "there is no run" in completed["error"], (number, ended, completed)
        number += step


@pytest.mark.parametrize("server", ["redis"], indirect=True)
def test_password_is_shown_nowhere(repository: Repository, server: RedisServer) -> None:
    """Neither in the output, nor in the state, the logs or the events."""
    password = "hidden-4f1c"
    anyio.run(server.set_password, password)
    repository.environ["COUNCIL_STATE"], repository.environ["COUNCIL_REDIS_PASSWORD"] = server.url(), password
    config = repository.configure([{"id": "one", "prompt": "append a.txt 1"}])
    shown = [repository.council("run", str(config)), repository.council("run", str(config), "--json")]
    shown += [repository.council(*words) for words in (["where"], ["status"], ["state", "health"], ["state", "log"])]
    repository.environ["COUNCIL_REDIS_PASSWORD"] = f"{password}-wrong"
    shown.append(repository.council("status"))
    assert "password of user 'default' is missing or wrong" in shown[-1].stderr
    assert not any(password in one.stdout + one.stderr for one in shown)
    for path in repository.top.parent.rglob("*"):
        assert not path.is_file() or password.encode() not in path.read_bytes(), path
