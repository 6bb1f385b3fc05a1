"""The commands for a state, and the maintenance by an active run, on every store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from orchestrator.domain.settings.run_settings import Retention
from orchestrator.protocols import Commit, Event, Key, Store, Write
from orchestrator.testing.clock import ManualClock
from tests.conftest import Repository
from tests.integration.state.test_monitor import pass_, watched
from tests.integration.stores.store_worker import SHARED
from tests.integration.stores.test_store_processes import Start, start
from tests.recorded_run import RUN_STARTED
from tests.store_kinds import empty_state
from tests.stores import open_store

__all__ = ["start"]


@pytest.fixture(params=["redis", *(pytest.param(kind, marks=pytest.mark.extended) for kind in ("postgres", "file"))])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the folder or URL of an empty store."""
    return empty_state(request.param, tmp_path / "state")


@pytest.mark.extended
def test_commands_work_on_a_store(repository: Repository, state: str, tmp_path: Path) -> None:
    """A run, its checkpoints, time travel, health, copies and pruning."""
    flag, repository.environ["COUNCIL_STATE"] = repository.spawns.parent / "flag", state
    tasks: list[dict[str, Any]] = [
        {"id": "one", "prompt": "write one.txt 1"},
        {"id": "two", "prompt": f"without {flag} exit 1\nwrite two.txt 2", "attempts": 1},
    ]
    assert repository.council("run", str(repository.configure(tasks)), "--json").states == {
        "one": "landed",
        "two": "failed",
    }
    checkpoint = repository.council("checkpoint", "create", "--reason", "before", "--json").result
    flag.touch()
    assert repository.council("retry", "two").code == 0
    assert repository.council("resume", "--json").states == {"one": "landed", "two": "landed"}

    changes = repository.council("state", "diff", checkpoint["id"], "now", "--json").result["documents"]
    assert any(one["key"].endswith("/two") and one["kind"] == "changed" for one in changes)
    versions = repository.council("state", "history", "task/two", "--json").result["versions"]
    assert versions[0]["new"]["status"] == "landed"
    (before,) = repository.council("state", "at", checkpoint["id"], "task/*/two", "--json").result["documents"]
    assert before["value"]["status"] == "failed"
    shown = repository.council("checkpoint", "show", checkpoint["id"], "--json")
    assert shown.code == 0, shown
    restored = repository.council("checkpoint", "restore", checkpoint["id"], "--json").result
    assert [one["reason"] for one in restored["skipped"]] == ["it has landed"] * len(restored["skipped"]) != []

    assert repository.council("state", "verify", "--repair", "--json").result["is_valid"]
    health = repository.council("state", "health", "--json")
    assert {one["level"] for one in health.result["findings"] if one["name"] != "runs"} == {"ok"}, health
    assert health.result["latency"].keys() == {"read", "commit"}
    assert (health.result["server"] is None) == state.startswith("/")
    log = repository.council("state", "log", "--json").stdout
    copy, again = (tmp_path / "copy").as_uri(), (tmp_path / "again").as_uri()
    assert repository.council("state", "copy", state, copy).code == 0
    assert repository.council("state", "export", str(tmp_path / "exported")).code == 0
    assert repository.council("state", "import", str(tmp_path / "exported"), "--state", again).code == 0
    for other in (copy, again):
        assert repository.council("state", "log", "--state", other, "--json").stdout == log

    pruned = repository.council("state", "compact", "--max-size", "1KB", "--json").result
    assert pruned["first"] > 0 or state.startswith("/")  # the file store keeps the newest file of its log
    assert repository.council("state", "at", "1", "--json").code == (2 if pruned["first"] else 0)
    assert repository.council("state", "views", "--json").code == 0
    assert repository.council("status", "--json").states == {"one": "landed", "two": "landed"}


async def test_active_run_maintains_a_store(state: str, tmp_path: Path) -> None:
    """Expired documents are deleted, the log is pruned, findings are recorded, and checkpoints are created."""
    clock = ManualClock(RUN_STARTED)
    lock, big = Key("lock", "a"), Key("other", "big")
    found = set[str]()
    expected = {"state.expired_deleted", "state.compacted", "state.warning", "checkpoint.created"}
    async with open_store(state, segment_bytes=2_000) as store:

        async def collect() -> None:
            async for record in store.watch():
                found.update(event.type for event in record.events)

        async with (
            watched(store, clock, tmp_path, Retention(retention=None, max_size=20_000)),
            anyio.create_task_group() as group,
        ):
            group.start_soon(collect)
            await store.commit(Commit([Write(lock, 0, {}, ttl=0.001), Write(big, 0, {"text": "x" * 1_100_000})]))
            for number in range(50):
                await store.commit(Commit(events=[Event("e", {"text": f"{number}" * 500})], durable=False))
            with anyio.fail_after(60):
                while not expected <= found:
                    await pass_(clock, 3600.0)
            group.cancel_scope.cancel()
        statistics = await store.statistics()
        assert statistics.first > 0
        assert statistics.expired == []
        assert await store.get(lock) is None
        assert (await store.verify()).is_valid


async def test_no_read_is_older_than_an_acknowledged_commit(start: Start, state: str) -> None:
    """Neither of another process, nor what another reader of this process has seen."""
    count, newest = 100, 0

    async def read(store: Store) -> None:
        nonlocal newest
        while newest < count:
            least = newest
            document = await store.get(SHARED)
            assert (document.position if document else 0) >= least
            newest = max(newest, document.position if document else 0)
            await anyio.sleep(0)

    async with open_store(state) as store, anyio.create_task_group() as group:
        output = start("write", state, "w", count).stdout
        assert output
        for _ in range(5):
            group.start_soon(read, store)
        for _ in range(count):
            line = await to_thread.run_sync(output.readline)
            newest = max(newest, int(line.split()[1]))
