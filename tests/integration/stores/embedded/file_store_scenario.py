"""Run every file operation of a file store and report each outcome: `file_store_scenario.py`.

For each folder named on standard input it forks a process and prints its id; that process stops until it receives
SIGCONT, so that a tracer that attaches to it counts the system calls of the store alone. Each output line is JSON: the
step, and `refused` with the reason if the step failed.
"""

import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import anyio._backends._asyncio  # imported late, too
import portalocker  # noqa: F401  imported before the fork
import zstandard  # noqa: F401  imported before the fork

from orchestrator.errors import StoreUnavailable
from orchestrator.protocols import Commit, Event, Key, Write
from orchestrator.state.documents import checkpoints
from orchestrator.state.log import snapshot
from orchestrator.state.stores.file import FileStore
from orchestrator.testing.clock import ManualClock

KEYS = [Key("task", name) for name in "abc"]
SEGMENT_BYTES = 1_500


def say(**facts: Any) -> None:
    """Print a line, with a system call that nothing else makes."""
    os.writev(1, [json.dumps(facts).encode(), b"\n"])


async def attempt(step: str, call: Callable[[], Awaitable[Any]], **facts: Any) -> bool:
    """Run a step and report the outcome; only the store's own rejection is allowed."""
    try:
        done = await call()
    except StoreUnavailable as error:
        say(step=step, **facts, refused=str(error))
        return False
    say(step=step, **facts, **({"position": done} if isinstance(done, int) else {}))
    return True


class Scenario:
    """Commits of both kinds, several segments, snapshots, compression, compaction, a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock, self.tried = folder, ManualClock(), 0

    async def run(self) -> None:
        """Open the store three times, and retry each until it opens."""
        for part in (self.commits, self.upkeep, self.commits):
            for _ in range(6):
                async with AsyncExitStack() as stack:
                    opened = FileStore.open(self.folder, self.clock, segment_bytes=SEGMENT_BYTES)
                    stores = list[FileStore]()

                    async def enter(
                        stack: AsyncExitStack = stack, opened: Any = opened, stores: list[FileStore] = stores
                    ) -> None:
                        stores.append(await stack.enter_async_context(opened))

                    if await attempt("open", enter):
                        await part(stores[0])
                        break
        say(step="over")

    async def commits(self, store: FileStore) -> None:
        """Commit to three documents in turn, every third commit non-durably."""
        for _ in range(12):
            self.clock.advance(60)
            self.tried += 1
            number = self.tried
            key = KEYS[number % 3]
            tried, durable = {"key": str(key), "number": number}, number % 3 != 1

            async def commit(key: Key = key, number: int = number, durable: bool = durable) -> int:
                found = await store.get(key)
                value = {"n": number, "text": "x" * 100}
                write = Write(key, found.version if found else 0, value)
                return await store.commit(Commit([write], [Event("e", {"n": number})], durable=durable))

            await attempt("commit", commit, **tried)

    async def upkeep(self, store: FileStore) -> None:
        """Compress, create a checkpoint, read history, compact, verify."""
        await attempt("pack", lambda: store.compact(0.0, 1 << 40))
        await attempt("checkpoint", lambda: checkpoints.create_checkpoint(store, None, "by test"))
        await attempt("history", lambda: store.history(KEYS[0]))
        await attempt("thin", lambda: store.compact(self.clock.now() - 300, 1 << 40))
        await attempt("verify", store.verify)


if __name__ == "__main__":
    snapshot.MIN_NEW_BYTES = 1  # type: ignore[misc]  # so that even this small log gets a snapshot
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            anyio.run(Scenario(Path(line.strip())).run)
            os._exit(0)
        say(child=child)
        say(ended=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
