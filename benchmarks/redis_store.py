"""The store on a Redis server, compared with plain Redis commands.

python -m benchmarks.redis_store [--quick], with COUNCIL_TEST_REDIS_URL or an installed server. The client does the same
writes in one script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import IO, Final

import anyio
from redis.asyncio import Redis

from benchmarks.measure import BenchmarkRow, Cost, argument_parser, measure_cost, measure_pairs, median, print_table
from benchmarks.state import make_document
from orchestrator.protocols import Commit, Event, Key, Write
from orchestrator.state.log.codec import encode_commit
from orchestrator.state.stores.redis.records import encode_key
from orchestrator.state.stores.redis.store import RedisStore
from tests.redis_server import empty_store_url

LIMIT: Final = 1 / 0.7
PROCESSES: Final = 8
#: The writes of a commit of one document, without any check.
BARE: Final = """
local documents, log, commits = unpack(KEYS)
local key, document, record, id = unpack(ARGV)
local position = (redis.call('HGET', documents, 'position') or 0) + 1
redis.call('XADD', log, position .. '-0', 'record', record, 'id', id)
redis.call('HSET', documents, 'position', position, key, document)
redis.call('HSET', commits, id, position)
return position
"""


def measure(*, quick: bool) -> list[BenchmarkRow]:
    """Return the durations of commits by one and by eight processes."""
    rows = []
    for processes, commits in ((1, 500), (PROCESSES, 100)):
        count = commits // 20 if quick else commits
        pairs = measure_pairs(
            lambda jobs=processes, each=count: _run("store", jobs, each),  # type: ignore[misc]
            lambda jobs=processes, each=count: _run("bare", jobs, each),  # type: ignore[misc]
            1 if quick else 5,
        )
        ours, bare = (processes * count / median([pair[side].wall for pair in pairs]) for side in (0, 1))
        ratio = median([ours.wall / other.wall for ours, other in pairs])
        what, base = f"redis: durable commits, processes: {processes}", f"bare redis-py: {bare:.0f}/s"
        rows.append(BenchmarkRow(what, ours, "/s", base, ratio, LIMIT, is_ratio_limited=True))
    return rows


def _run(job: str, processes: int, commits: int) -> Cost:
    """Run processes that each make so many commits; the cost excludes their start."""
    argv = [sys.executable, "-m", "benchmarks.redis_store", job, empty_store_url(), str(commits)]
    started = [
        subprocess.Popen([*argv, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(processes)
    ]
    pipes = [(process.stdin, process.stdout) for process in started]
    for _, output in pipes:
        _read_line(output)
    with measure_cost() as cost:
        for commands, _ in pipes:
            if commands:
                commands.write("\n")
                commands.flush()
        for _, output in pipes:
            _read_line(output)
    for process in started:
        process.communicate()
    return cost()


def _read_line(output: IO[str] | None) -> None:
    if output is not None:
        output.readline()


def _wait_for_begin() -> None:
    os.write(1, b"ready\n")
    sys.stdin.readline()


async def _by_store(url: str, commits: int, me: int) -> None:
    async with RedisStore.open(url) as store:
        await store.get(Key("task", "none"))
        _wait_for_begin()
        for number in range(commits):
            key = Key("task", f"{me}/{number % 100}")
            await store.commit(Commit([Write(key, number // 100, make_document(number))], [Event("e", {"n": number})]))
    os.write(1, b"done\n")


async def _by_client(url: str, commits: int, me: int) -> None:
    server, _, prefix = url.partition("?prefix=")
    client = Redis.from_url(server, protocol=2)
    script = client.register_script(BARE)
    keys = [f"{prefix}:{name}" for name in ("documents", "log", "commits")]
    _wait_for_begin()
    for number in range(commits):
        key = Key("task", f"{me}/{number % 100}")
        commit = encode_commit(Commit([Write(key, 0, make_document(number))], [Event("e", {"n": number})]))
        document = commit.payload[2 : 2 + commit.writes[0].length]
        await script(keys, [encode_key(key), document, commit.payload, f"{me}/{number}"])
    os.write(1, b"done\n")
    await client.aclose()


if __name__ == "__main__":
    if sys.argv[1:2] in (["store"], ["bare"]):
        job, address, times, name = sys.argv[1:]
        anyio.run(_by_store if job == "store" else _by_client, address, int(times), int(name))
    else:
        print_table(measure(quick=argument_parser(__doc__).parse_args().quick))
