"""A run whose state is on a server survives restarts of the server and faults of the network."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any

import anyio
import pytest
import zstandard
from anyio import to_thread

from orchestrator import Council
from orchestrator.domain.events.base import TypedEvent
from orchestrator.domain.events.runs import RunJoined
from orchestrator.domain.events.state import OutageEnded
from orchestrator.errors import StoreUnavailable, StoreUnreachable
from orchestrator.locking.orchestrators import read_orchestrators
from orchestrator.protocols import CommitRecord
from orchestrator.state.documents.log_reader import read_range
from orchestrator.state.stores.postgres import server as postgres
from orchestrator.state.stores.redis import server as redis
from tests.conftest import CommandResult, Repository
from tests.cutting_proxy import CuttingProxy
from tests.faults import SHELL_ADAPTER, files_with, processes_with, read_objects
from tests.integration.runs.test_shared_runs import assert_each_landed_once, ended, shared, states
from tests.integration.stores.test_failing_store import COMMANDS
from tests.pooler import Pooler
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer
from tests.store_kinds import REACHED, SERVERS, Server
from tests.stores import open_store
from tests.waiting import wait_for

#: Seconds after the start of a server until work continues.
RESUMED = 5
#: The seconds after which each server's store reports that it does not answer.
TIMEOUT = 5

Outage = Callable[[], Awaitable[None]]


PASSWORDS = {PostgresServer: postgres.PASSWORD, RedisServer: redis.PASSWORD}


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server | Pooler]:
    """Return a server of the test's own."""
    with REACHED[request.param].started_server() as made:
        yield made


async def wait_for_events(url: str, kind: type[TypedEvent], count: int) -> None:
    """Wait for a number of events of a class."""
    async with open_store(url) as store:
        with anyio.fail_after(60):
            async for record in store.watch():
                count -= sum(event.type == kind.type for event in record.events)
                if count <= 0:
                    return


async def wait_for_commits(url: str, seconds: float) -> None:
    """Wait until the processes of a run commit again."""
    async with open_store(url) as store:
        after = await store.position()
        with anyio.fail_after(seconds):
            async for record in store.watch(after):
                if record.position > after:
                    return


async def read_log(url: str) -> list[CommitRecord]:
    """Return all commits."""
    async with open_store(url) as store:
        return [record async for record in read_range(store, 0, await store.position())]


async def council(repository: Repository, *words: str, failpoints: str = "") -> CommandResult:
    """Run a command while proxies of this process forward."""
    return await to_thread.run_sync(partial(repository.council, *words, failpoints=failpoints))


async def assert_server_is_named(repository: Repository, port: int, reason: str) -> None:
    """Check that `status` shows what is waited for, and how to fix it."""
    shown = await council(repository, "status", "--json")
    assert (shown.code, shown.result["status"]) == (1, "unavailable")
    assert f":{port}/" in shown.result["error"]
    assert reason in shown.result["error"]
    assert shown.result["remedy"]


async def assert_tasks_land_once(
    repository: Repository, store: tuple[str, str], count: int, outages: Sequence[tuple[Outage, float]]
) -> None:
    """Execute tasks by three processes with outages at random moments.

    `store` are the URLs for the processes and for this test. Each outage has the seconds until commits follow its end.
    """
    repository.environ["COUNCIL_STATE"], url = store
    sinks = {"all": {"use": "jsonlines", "file": "all.jsonl"}}
    config, moments = repository.configure(shared(count), capacity=2, sinks=sinks), Random(count)
    children = [repository.start("run", str(config), "--json")]
    await to_thread.run_sync(wait_for, lambda: repository.council("status", "--json").result.get("status") == "running")
    children += [repository.start("work", "--json") for _ in range(2)]
    await wait_for_events(url, RunJoined, 2)
    for number, (outage, seconds) in enumerate(outages):
        least = count * number // len(outages)
        await to_thread.run_sync(wait_for, lambda least=least: count_landed(repository) >= least, 100)
        await anyio.sleep(moments.uniform(0, 0.5))
        acknowledged = await read_log(url)
        await outage()
        await wait_for_commits(url, seconds)
        assert (await read_log(url))[: len(acknowledged)] == acknowledged
    assert await to_thread.run_sync(ended, *children) == [0, 0, 0]
    async with open_store(url) as opened:
        [run] = await opened.list("run")
        members = await read_orchestrators(opened, run.key.id)
    assert [member.reason for member in members.values()] == [None] * 3, "each worker has recovered"
    await assert_each_landed_once(repository, [f"t{number}" for number in range(count)])
    # The outage of a process without tasks may end after the run.
    assert (await council(repository, "resume")).code == 0
    events = [event.type for record in await read_log(url) for event in record.events if "run" in event.data]
    lines = (repository.top.parent / "all.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == [name for name in events if not name.startswith("sink.")]


def count_landed(repository: Repository) -> int:
    """Return the number of landed tasks."""
    return Counter(states(repository).values())["landed"]


@pytest.mark.parametrize("server", REACHED, indirect=True)
@pytest.mark.parametrize(
    ("count", "restarts"),
    [
        pytest.param(9, 2, marks=pytest.mark.extended),
        pytest.param(40, 10, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
async def test_tasks_of_three_processes_land_once_despite_restarts(
    repository: Repository, server: Server | Pooler, count: int, restarts: int
) -> None:
    """Work resumes within seconds; meanwhile `status` names the server that is waited for."""

    async def restart() -> None:
        server.kill()
        # A pooler may accept connections and not answer.
        await assert_server_is_named(repository, server.port, "" if isinstance(server, Pooler) else ": unreachable")
        await to_thread.run_sync(server.start)

    url = server.url()
    # A pooler rejects new clients for a second after a failed login at the server.
    direct = url.replace(f":{server.port}/", f":{server.server.port}/") if isinstance(server, Pooler) else url
    await assert_tasks_land_once(repository, (url, direct), count, [(restart, RESUMED)] * restarts)


@pytest.mark.parametrize(
    ("count", "rounds"),
    [
        pytest.param(9, 1, marks=pytest.mark.extended),
        pytest.param(40, 4, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
async def test_tasks_land_once_through_a_faulty_network(
    repository: Repository, server: Server, count: int, rounds: int
) -> None:
    """It delays all replies, cuts connections, and loses everything for a while."""
    async with CuttingProxy(server.port).serve() as proxy:

        async def delay() -> None:
            proxy.delay = 0.05

        async def cut() -> None:
            proxy.delay = 0
            proxy.cut()

        async def blackhole() -> None:
            proxy.blackhole()
            await assert_server_is_named(repository, proxy.port, f"no answer in {TIMEOUT} s")
            proxy.silent = frozenset()

        direct = server.url()
        url = direct.replace(str(server.port), str(proxy.port))
        # Connections that lost bytes stay silent: each process notices after its time limit.
        outages = [(delay, RESUMED), (cut, RESUMED), (blackhole, RESUMED + TIMEOUT)] * rounds
        await assert_tasks_land_once(repository, (url, direct), count, outages)


@pytest.mark.extended
async def test_workers_survive_an_outage_longer_than_their_leases(repository: Repository, server: Server) -> None:
    """No process considers another one dead that could not send its heartbeats either."""
    repository.environ["COUNCIL_STATE"] = url = server.url()
    gate = repository.spawns.parent / "gate"
    tasks = [{"id": f"t{number}", "prompt": f"await {gate}\nwrite {number}.txt x"} for number in range(4)]
    timing = {
        "heartbeat_interval": "2s",
        "stale_after": "6s",
        "owner_stale_after": "6s",
        "stale_check_interval": "500ms",
    }
    config = repository.configure(tasks, capacity=2, coordination=timing)
    children = [repository.start("run", str(config), "--json")]
    await to_thread.run_sync(wait_for, repository.spawns.exists)
    children.append(repository.start("work", "--json"))
    await to_thread.run_sync(wait_for, lambda: len(repository.spawns.read_text().splitlines()) == 4)
    for seconds in (5.5, 8):  # shorter and longer than a lease, which began before the outage
        server.kill()
        await anyio.sleep(seconds)
        await to_thread.run_sync(server.start)
        await wait_for_commits(url, RESUMED)
    gate.touch()
    assert await to_thread.run_sync(ended, *children) == [0, 0]
    await assert_each_landed_once(repository, [f"t{number}" for number in range(4)])


@pytest.mark.extended
@pytest.mark.parametrize("is_back_in_time", [True, False], ids=["returns", "stays down"])
async def test_run_continues_without_its_server(repository: Repository, server: Server, is_back_in_time: bool) -> None:
    """Everything lands during the outage; the server records it later, in this process or in the next one."""
    repository.environ["COUNCIL_STATE"] = url = server.url()
    gate = repository.spawns.parent / "gate"
    tasks: list[dict[str, Any]] = [
        {"id": "one", "prompt": f"await {gate}\nappend a.txt 1"},
        {"id": "two", "prompt": "append a.txt 2", "needs": ["one"]},
        {"id": "three", "prompt": "append a.txt 3", "needs": ["two"]},
    ]
    if is_back_in_time:
        tasks.append({"id": "last", "prompt": f"await {gate}.last\nappend b.txt 1"})
    config = repository.configure(tasks)
    child = repository.start("run", str(config), "--when-unreachable", "continue")
    await to_thread.run_sync(
        wait_for, lambda: "one" in repository.spawns.read_text() if repository.spawns.exists() else False
    )
    server.kill()
    gate.touch()
    path = repository.top / "a.txt"
    await to_thread.run_sync(wait_for, lambda: path.exists() and path.read_text() == "1\n2\n3\n")
    if not is_back_in_time:
        _, error = await to_thread.run_sync(partial(child.communicate, timeout=60))
        assert "Traceback" not in error
        assert "the state is unreachable; local commits are preserved in" in error
    await to_thread.run_sync(server.start)
    if is_back_in_time:
        await wait_for_events(url, OutageEnded, 1)
        gate.with_name("gate.last").touch()
        assert await to_thread.run_sync(ended, child) == [0]
    else:
        assert (await council(repository, "resume", "--when-unreachable", "continue")).code == 0
    await assert_each_landed_once(repository, [task["id"] for task in tasks])
    assert not list((repository.top / ".council" / "outage").glob("*"))


@pytest.mark.extended_variants
@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "postgresql://admin@127.0.0.1:1/postgres"])
def test_command_without_its_server_fails_with_the_fix(repository: Repository, url: str) -> None:
    """In one line, which names the server."""
    repository.environ["COUNCIL_STATE"] = url
    config = str(repository.configure([{"id": "one", "prompt": "append a.txt 1"}]))
    for words in (["run", config], ["status"], ["cancel", "one"], ["logs", "one"]):
        ended = repository.council(*words)
        assert (ended.code, ended.stdout) == (1, ""), (words, ended)
        [line] = ended.stderr.splitlines()
        assert "127.0.0.1:1/" in line, words
        assert "unreachable" in line, words
        assert "start the server" in line, words


@pytest.mark.extended
@pytest.mark.parametrize("words", [["resume"], ["work", "latest"]], ids=["resume", "work"])
def test_command_waits_for_its_server_and_continues(
    repository: Repository, server: Server, words: Sequence[str]
) -> None:
    """It names the server at once, and executes the run after the start of the server."""
    repository.environ["COUNCIL_STATE"] = server.url()
    config = str(repository.configure([{"id": "one", "prompt": "append a.txt 1"}]))
    assert repository.council("run", config, failpoints="run.leader_elected=kill").code < 0
    server.kill()
    child = repository.start(*words)
    assert child.stderr
    line = child.stderr.readline()
    assert f":{server.port}/" in line
    assert "unreachable" in line
    server.start()
    output, error = child.communicate(timeout=60)
    assert (child.wait(), "Traceback" in error) == (0, False), (output, error)
    assert states(repository) == {"one": "landed"}


@pytest.mark.extended
@pytest.mark.parametrize("is_stopped", [False, True], ids=["returns", "stopped"])
async def test_operations_wait_for_a_server_that_dies_after_the_opening(
    repository: Repository, server: Server, is_stopped: bool
) -> None:
    """Also before a run starts; `stop` ends the wait with the error."""
    outcomes = list[object]()
    async with Council.open(
        repository.top, state=server.url(), environ=repository.environ, on_outage="pause"
    ) as council:
        server.kill()

        async def list_runs() -> None:
            try:
                outcomes.append(await council.runs.list())
            except StoreUnavailable as error:
                outcomes.append(type(error))

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                group.start_soon(list_runs)
                while not council._context.store.outage.is_active:  # type: ignore[attr-defined]
                    await anyio.sleep(0.01)
                assert not outcomes
                if is_stopped:
                    council.stop()
                else:
                    await to_thread.run_sync(server.start)
    assert outcomes == [StoreUnreachable if is_stopped else []]


@pytest.mark.extended
@pytest.mark.parametrize("step", [60, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("command", COMMANDS)
async def test_any_failing_request_costs_only_time(
    repository: Repository, server: Server, command: str, step: int
) -> None:
    """A command ends without a traceback, whichever of its requests fails, and `resume` completes the run."""
    config = str(repository.configure([{"id": "one", "prompt": "append a.txt 1"}]))
    number, is_cut = 0, True
    while is_cut:
        async with CuttingProxy(server.port).serve() as proxy:
            url = server.url().replace(str(server.port), str(proxy.port))
            repository.environ["COUNCIL_STATE"] = url
            if command != "run":
                await council(repository, "run", config, failpoints="run.leader_elected=kill")
            proxy.outage, proxy.requests_left = 0.3, number
            ended = await council(repository, *COMMANDS[command].format(config=config).split(), "--json")
            is_cut, proxy.requests_left = proxy.cuts > 0, -1
            assert ended.code in {0, 1, 2, *([130] if command == "status" else [])}, (number, ended)
            assert "Traceback" not in ended.stderr
            proxy.accept()
            completed = (await council(repository, "resume", "--json")).result
            states = {task["id"]: task["status"] for task in completed.get("tasks", ())}
            assert states == {"one": "landed"} or "there is no run" in completed["error"], (number, ended, completed)
        number += step


@pytest.mark.extended
def test_commands_report_an_unusable_server_in_one_line(repository: Repository, server: Server) -> None:
    """It has the fix; with `--json` both are fields."""
    config = repository.configure([{"id": "one", "prompt": "append a.txt 1"}])
    url, variable = server.url(user=server.guard("right")), PASSWORDS[type(server)]
    for place, password, what, fix in (
        (url.replace("127.0.0.1", "unknown.invalid"), "right", "unknown host 'unknown.invalid'", "in the URL"),
        (url, "wrong", "wrong", f"set {variable}, or {variable}_FILE to"),
    ):
        repository.environ.update({"COUNCIL_STATE": place, variable: password})
        for words in (["status"], ["run", str(config)]):
            ended, shown = repository.council(*words), repository.council(*words, "--json")
            assert ended.code == shown.code in {1, 2}, ended
            assert len(ended.stderr.splitlines()) == 1, ended
            assert f"council: {shown.result['error']}: {shown.result['remedy']}" in ended.stderr
            assert what in shown.result["error"]
            assert fix in shown.result["remedy"]


SHOWN = (
    "where", "where --json", "doctor", "doctor --json", "status", "status --json", "runs", "show one", "logs one",
    "usage", "check", "locks", "state show", "state log --json", "state at now *", "state health",
    "state health --json", "state views", "state export state.zst",
)  # fmt: skip


@pytest.mark.extended
@pytest.mark.parametrize("is_file", [False, True], ids=["variable", "file"])
def test_password_is_shown_nowhere(
    repository: Repository, server: Server, is_file: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Neither in output, state, logs and landed work, nor in other processes; in a file, it can't be redacted."""
    password, file = "hidden-4f1c", tmp_path_factory.mktemp("secret") / "password"
    url, variable = server.url(user=server.guard(password)), PASSWORDS[type(server)]
    given = f"{variable}_FILE" if is_file else variable

    def give(text: str) -> None:
        file.write_text(text)
        repository.environ[given] = str(file) if is_file else text

    give(password)
    repository.environ["COUNCIL_STATE"] = url
    folder = repository.spawns.parent
    waits = f"touch {folder}/started; until [ -e {folder}/go ]; do sleep 0.05; done"
    adapter = {**SHELL_ADAPTER, "writable": [str(folder)]}
    task = {"id": "one", "prompt": f"env | tee env.txt; {waits}", "checks": ["env"]}
    config = repository.configure([task], adapters={"sh": adapter})
    run = repository.start("run", str(config), "--json")
    wait_for((folder / "started").exists)
    assert processes_with(password.encode()) == []
    (folder / "go").touch()
    shown = "".join(run.communicate(timeout=60))
    assert run.returncode == 0, shown
    shown += "".join(repr(repository.council(*words.split())) for words in SHOWN)
    give(f"{password}-wrong")
    for words in ("status", "status --json", f"run {config}", "doctor", "where"):
        shown += (refused := repr(repository.council(*words.split())))
        assert "wrong" in refused or words in {"doctor", "where"}, refused
    give(password)
    server.break_state(url)
    broken = repository.council("state", "log")
    assert broken.code == 3, broken
    assert password not in shown + repr(broken)
    assert files_with(repository.top.parent, password.encode()) == []
    with zstandard.open(repository.top / "state.zst") as export:
        assert password.encode() not in export.read()
    for objects in repository.top.parent.rglob("objects"):
        assert password.encode() not in read_objects(objects.parent)
