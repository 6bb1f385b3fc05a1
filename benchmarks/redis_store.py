"""The store on a Redis server, compared with plain Redis commands.

python -m benchmarks.redis_store [--quick], with COUNCIL_TEST_REDIS_URL or an installed server. The client does the same
writes in one script.
"""

from __future__ import annotations

from typing import Final

from redis.asyncio import Redis

from benchmarks.measure import BenchmarkRow
from benchmarks.server_stores import main, make_commit, measure_store, wait_for_begin
from orchestrator.protocols import Key
from orchestrator.state.log.codec import encode_commit
from orchestrator.state.stores.redis.records import encode_key
from orchestrator.state.stores.redis.store import RedisStore
from tests.redis_server import empty_store_url

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


def _measure(quick: bool) -> list[BenchmarkRow]:
    return measure_store("redis_store", "redis-py", empty_store_url, quick=quick)


async def _by_store(url: str, commits: int, me: int) -> None:
    async with RedisStore.open(url) as store:
        await store.get(Key("task", "none"))
        wait_for_begin()
        for number in range(commits):
            await store.commit(make_commit(me, number))


async def _by_client(url: str, commits: int, me: int) -> None:
    server, _, prefix = url.partition("?prefix=")
    client = Redis.from_url(server, protocol=2)
    script = client.register_script(BARE)
    keys = [f"{prefix}:{name}" for name in ("documents", "log", "commits")]
    wait_for_begin()
    for number in range(commits):
        commit = encode_commit(make_commit(me, number))
        document = commit.payload[2 : 2 + commit.writes[0].length]
        key = encode_key(commit.writes[0].key)
        await script(keys, [key, document, commit.payload, f"{me}/{number}"])
    await client.aclose()


if __name__ == "__main__":
    main("redis_store", {"store": _by_store, "bare": _by_client}, _measure)
