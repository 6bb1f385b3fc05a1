"""Workers for the tests of a store across processes: `python store_worker.py JOB ARGS…`."""

import hashlib
import itertools
import os
import signal
import sys
from pathlib import Path

import anyio

from orchestrator.errors import VersionConflict
from orchestrator.protocols import Commit, Event, Key, Write
from orchestrator.state.log import snapshot
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.stores import open_store

SHARED = Key("counter", "shared")
SEGMENT_BYTES = 5_000  # so small that the log has many segments


def say(text: str) -> None:
    """Print a line with one write: several processes share this output."""
    os.write(1, f"{text}\n".encode())


async def write(state: str, name: str, count: str) -> None:
    """Commit `count` times to an own and to a shared document, and print each success."""
    async with open_store(state, segment_bytes=SEGMENT_BYTES) as store:
        own = Key("own", name)
        done = 0
        while done < int(count):
            shared, mine = await store.get(SHARED), await store.get(own)
            total = shared.value["n"] if shared else 0
            writes = [
                Write(SHARED, shared.version if shared else 0, {"n": total + 1}),
                Write(own, mine.version if mine else 0, {"n": (mine.value["n"] if mine else 0) + 1}),
            ]
            try:
                position = await store.commit(Commit(writes, [Event("counted", {"by": name})]))
            except VersionConflict:
                continue
            done += 1
            say(f"{name} {position}")


async def read(state: str, until: str) -> None:
    """Follow the log up to position `until`; print each position and the content's digest."""
    digest, positions = hashlib.sha256(), []
    async with open_store(state, segment_bytes=SEGMENT_BYTES) as store:
        async for record in store.watch():
            positions.append(record.position)
            digest.update(repr((record.position, sorted(record.documents.items()), record.events)).encode())
            if record.position == int(until):
                break
    say(f"{positions == list(range(1, int(until) + 1))} {digest.hexdigest()}")


async def churn(folder: str, name: str) -> None:
    """Commit until killed, durably or not, with occasional compression and compaction; print each success."""
    clock, own = SystemClock(), Key("own", name)
    async with FileStore.open(Path(folder), clock, segment_bytes=SEGMENT_BYTES) as store:
        for step in itertools.count():
            mine = await store.get(own)
            version = mine.version if mine else 0
            write = Write(own, version, {"n": version + 1, "text": "x" * (step % 7) * 60})
            event = Event("counted", {"by": name})
            position = await store.commit(Commit([write], [event], durable=step % 3 == 0))
            say(f"{name} {version + 1} {position}")
            if step % 10 == 9:
                await store.compact(clock.now() - 1.0, 40_000)


async def snapshots(folder: str, name: str) -> None:
    """Commit until killed, with a snapshot of each segment."""
    snapshot.MIN_NEW_BYTES = 1  # type: ignore[misc]  # even this small log gets a snapshot
    async with FileStore.open(Path(folder), SystemClock(), segment_bytes=SEGMENT_BYTES) as store:
        for version in range(200):
            write = Write(Key("own", name), version, {"n": version + 1, "text": "x" * 300})
            say(f"{name} {version + 1} {await store.commit(Commit([write]))}")


def churn_by_many(folder: str) -> None:
    """Run `churn` in one process per name read, forked after the imports; print its id."""
    snapshot.MIN_NEW_BYTES = 1  # type: ignore[misc]  # even this small log gets a snapshot
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for these processes
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            anyio.run(churn, folder, line.strip())
            os._exit(1)
        say(f"started {line.strip()} {child}")


def read_by_many(state: str, until: str, processes: str) -> None:
    """Run `read` in many processes, forked after the imports, which take most of the time."""
    children = []
    for _ in range(int(processes)):
        child = os.fork()
        if child == 0:
            anyio.run(read, state, until)
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    job, *arguments = sys.argv[1:]
    if job == "read":
        read_by_many(*arguments)
    elif job == "churn":
        churn_by_many(*arguments)
    elif job == "snapshots":
        directory, who = arguments
        anyio.run(snapshots, directory, who)
    else:
        directory, who, times = arguments
        anyio.run(write, directory, who, times)
