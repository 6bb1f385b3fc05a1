"""Many processes on one store: nothing lost or repeated, one order for all, even if any process or the server dies."""

import fcntl
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from orchestrator.protocols import Commit, Key, Write
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.store_kinds import SERVERS, Server, empty_state
from tests.stores import open_store

pytestmark = pytest.mark.extended

WORKER = Path(__file__).with_name("store_worker.py")
SHARED = Key("counter", "shared")
PATIENCE = 60  # seconds

Worker = subprocess.Popen[str]
Start = Callable[..., Worker]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start workers that are killed at the end of the test."""
    with ExitStack() as stack:

        def start(*arguments: object) -> Worker:
            argv = [sys.executable, str(WORKER), *map(str, arguments)]
            process = stack.enter_context(
                subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
            )
            stack.callback(kill_group, process)
            return process

        yield start


def kill_group(process: Worker) -> None:
    """Kill a worker and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def finish(process: Worker) -> list[str]:
    """Wait for a worker's success and return its output lines."""
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    return output.splitlines()


async def check_log(state: str, acknowledged: dict[int, str]) -> dict[int, str]:
    """Check that the log has each acknowledged commit once, by its author, without gaps."""
    async with open_store(state) as store:
        assert not any(one.keys is None or one.keys for one in store.damage)
        end = await store.position()
        authors: dict[int, str] = {}
        own: Counter[str] = Counter()
        async for record in store.watch():
            (event,) = record.events
            name = event.data["by"]
            own[name] += 1
            authors[record.position] = name
            assert record.position == len(authors)
            assert dict(record.documents) == {
                SHARED: (record.position, {"n": record.position}),
                Key("own", name): (own[name], {"n": own[name]}),
            }
            if record.position == end:
                break
        assert {position: authors[position] for position in acknowledged} == acknowledged
        return authors


def parse(lines: Iterable[str]) -> dict[int, str]:
    """Return the acknowledged commits, position -> name, and check that positions are unique."""
    pairs = [line.split() for line in lines]
    found = {int(position): name for name, position in pairs}
    assert len(found) == len(pairs)
    return found


@pytest.fixture
def state(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the folder or URL of an empty store."""
    return empty_state(request.param, tmp_path)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Return a server of the test's own."""
    with SERVERS[request.param].started_server() as made:
        yield made


@pytest.mark.parametrize(
    ("state", "writers", "readers"),
    [
        ("file", 3, 15),
        ("postgres", 3, 6),
        pytest.param("redis", 3, 6, marks=pytest.mark.extended),
        *(pytest.param(kind, 8, 50, marks=pytest.mark.slow) for kind in ("file", *SERVERS)),
    ],
    indirect=["state"],
)
async def test_writers_and_readers_agree(start: Start, state: str, writers: int, readers: int) -> None:
    """Writers lose nothing and repeat nothing; concurrent followers all read one same sequence."""
    each = 20
    reading = start("read", state, writers * each, readers)
    writing = [start("write", state, f"w{number}", each) for number in range(writers)]
    acknowledged = parse(line for process in writing for line in finish(process))
    assert Counter(acknowledged.values()) == {f"w{number}": each for number in range(writers)}
    assert await check_log(state, acknowledged) == acknowledged
    if "://" not in state:
        assert len(list(Path(state).glob("*.jsonl"))) > 2
    seen = finish(reading)
    assert len(seen) == readers
    assert len(set(seen)) == 1
    assert seen[0].startswith("True ")


@pytest.mark.parametrize(
    "state", ["file", "postgres", pytest.param("redis", marks=pytest.mark.extended)], indirect=True
)
async def test_killed_writer_loses_and_blocks_nothing(start: Start, state: str) -> None:
    """No acknowledged commit is lost; the others finish."""
    survivor = start("write", state, "survivor", 150)
    lines: list[str] = []
    for number in range(4):
        victim = start("write", state, f"victim{number}", 1_000_000)
        assert victim.stdout
        lines += [victim.stdout.readline() for _ in range(5 + 3 * number)]
        victim.kill()
        lines += victim.stdout.readlines()  # with the lines that were read before, which `communicate` does not return
        victim.wait(PATIENCE)
    acknowledged = parse(lines + finish(survivor))
    authors = await check_log(state, acknowledged)
    # For each killed author there may be one commit that it could not acknowledge.
    assert len(authors) - len(acknowledged) <= 4


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


async def test_stopped_server_delays_writers_only(start: Start, server: Server) -> None:
    """After a stop that is shorter than the time limit, writers continue."""
    state = server.url()
    writer = start("write", state, "w", 50)
    assert writer.stdout
    lines = [writer.stdout.readline() for _ in range(5)]
    server.signal(signal.SIGSTOP)
    server.signal(signal.SIGCONT)
    assert await check_log(state, parse(lines + finish(writer))) != {}


async def test_follower_sees_commits_of_another_store_immediately(tmp_path: Path) -> None:
    """The idle follower shares only the files with the writer."""
    async with (
        FileStore.open(tmp_path, SystemClock()) as ours,
        FileStore.open(tmp_path, SystemClock()) as theirs,
    ):
        with anyio.fail_after(PATIENCE):
            await theirs.commit(Commit([Write(SHARED, 0, {"n": 1})]))
            async for record in ours.watch():
                if record.position == 3:
                    break
                await theirs.commit(Commit([Write(SHARED, record.position, {"n": record.position + 1})]))
        document = await ours.get(SHARED)
        assert document is not None
        assert document.value == {"n": 3}
        assert await ours.commit(Commit([Write(SHARED, 3, {"n": 4})])) == 4


async def test_reader_waits_for_no_writer(tmp_path: Path) -> None:
    """Reads work while another process has the log's lock; a commit waits for it."""
    async with (
        FileStore.open(tmp_path, SystemClock()) as ours,
        FileStore.open(tmp_path, SystemClock()) as theirs,
    ):
        await theirs.commit(Commit([Write(SHARED, 0, {"n": 1})]))
        assert await ours.position() == 1
        async with anyio.create_task_group() as group:
            # Closed, and so unlocked, before the group waits for the commit, regardless of the outcome.
            with (tmp_path / "lock").open() as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                group.start_soon(theirs.commit, Commit([Write(SHARED, 1, {"n": 2})]))
                with anyio.fail_after(PATIENCE):
                    for _ in range(100):
                        document = await ours.get(SHARED)
                        assert document is not None
                        assert document.value == {"n": 1}
                        assert [one.version for one in await ours.history(SHARED)] == [1]
                        await anyio.lowlevel.checkpoint()
        document = await ours.get(SHARED)
        assert document is not None
        assert document.value == {"n": 2}
