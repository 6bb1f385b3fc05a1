"""Many processes on one store of a server: nothing lost or repeated, whatever process dies, also the server."""

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import postgres_server, redis_server
from tests.integration.test_claim_processes import FEW, SOME, run_queue
from tests.integration.test_file_store_processes import PATIENCE, Start, check_log, finish, parse, start
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer

__all__ = ["start"]

Server = PostgresServer | RedisServer
SERVERS = {"postgres": postgres_server, "redis": redis_server}


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Return a server of the test's own."""
    with SERVERS[request.param].started_server() as made:
        yield made


@pytest.fixture(params=SERVERS)
def state(request: pytest.FixtureRequest) -> str:
    """Return the URL of an empty store on a shared server."""
    url: str = SERVERS[request.param].empty_store_url()
    return url


@pytest.mark.extended_but_first
@pytest.mark.parametrize(("writers", "readers"), [(3, 6), pytest.param(8, 50, marks=pytest.mark.slow)])
async def test_writers_and_readers_of_a_server_agree(start: Start, state: str, writers: int, readers: int) -> None:
    """Writers lose nothing and repeat nothing; concurrent followers all read one same sequence."""
    each = 20
    reading = start("read", state, writers * each, readers)
    writing = [start("write", state, f"w{number}", each) for number in range(writers)]
    acknowledged = parse(line for process in writing for line in finish(process))
    assert Counter(acknowledged.values()) == {f"w{number}": each for number in range(writers)}
    assert await check_log(state, acknowledged) == acknowledged
    seen = finish(reading)
    assert len(seen) == readers
    assert len(set(seen)) == 1
    assert seen[0].startswith("True ")


@pytest.mark.extended_but_first
async def test_killed_writer_of_a_server_loses_and_blocks_nothing(start: Start, state: str) -> None:
    """No acknowledged commit is lost; the others finish."""
    survivor = start("write", state, "survivor", 100)
    lines: list[str] = []
    for number in range(3):
        victim = start("write", state, f"victim{number}", 1_000_000)
        assert victim.stdout
        lines += [victim.stdout.readline() for _ in range(5 + 3 * number)]
        victim.kill()
        lines += victim.stdout.readlines()
        victim.wait(PATIENCE)
    acknowledged = parse(lines + finish(survivor))
    authors = await check_log(state, acknowledged)
    assert len(authors) - len(acknowledged) <= 3


@pytest.mark.extended_but_first
async def test_killed_server_keeps_every_acknowledged_commit(start: Start, server: Server) -> None:
    """Writers that lose their connection fail with one error; what they printed is in the log once."""
    state = server.url()
    lines: list[str] = []
    for turn in range(4):
        writer = start("write", state, f"w{turn}", 1_000_000)
        assert writer.stdout
        lines += [writer.stdout.readline() for _ in range(5 + 7 * turn)]
        server.kill()
        lines += writer.stdout.readlines()
        writer.wait(PATIENCE)
        server.start()
    acknowledged = parse(lines)
    authors = await check_log(state, acknowledged)
    # For each kill there may be one commit that was not acknowledged.
    assert len(authors) - len(acknowledged) <= 4


@pytest.mark.extended_but_first
async def test_stopped_server_delays_writers_only(start: Start, server: Server) -> None:
    """After a stop that is shorter than the time limit, writers continue."""
    state = server.url()
    writer = start("write", state, "w", 50)
    assert writer.stdout
    lines = [writer.stdout.readline() for _ in range(5)]
    server.signal(signal.SIGSTOP)
    server.signal(signal.SIGCONT)
    assert await check_log(state, parse(lines + finish(writer))) != {}


@pytest.mark.extended_but_first
@pytest.mark.parametrize(
    ("fates", "tasks"), [pytest.param(FEW, 60, id="two"), pytest.param(SOME, 300, id="eight", marks=pytest.mark.slow)]
)
async def test_every_task_of_a_queue_on_a_server_is_done_once(
    tmp_path: Path, state: str, fates: list[str], tasks: int
) -> None:
    """Killed processes are taken over at once, stopped ones in time; late writes of these are rejected."""
    await run_queue(state, tmp_path / "locks", fates, tasks, 2.0)
