"""`council locks` shows owners and waiters of all three layers, and breaks locks with a reason."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from orchestrator import Council, RefusedError
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.scheduling.claims import LeaseParticipant, MergeLease
from orchestrator.errors import LeaseLost
from orchestrator.locking.file_locks import FileLocks
from orchestrator.locking.lock_overview import release_broken_locks
from orchestrator.locking.ownership import OwnershipRegistry, claim_key, ownership_scope
from orchestrator.project import Project
from orchestrator.protocols import Commit, CommitRecord, Guard, Key, Store, Write
from orchestrator.repo.source.run_repository import find_run_repository
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.conftest import CommandResult, Repository
from tests.merge_leases import join_merge_queue

ADA, BOB = (SessionName("r", task, 1) for task in ("ada", "bob"))


@asynccontextmanager
async def opened(repository: Repository) -> AsyncIterator[Store]:
    project = Project(repository.top)
    project.create()
    async with FileStore.open(repository.log, SystemClock()) as store:
        yield store


async def claim(store: Store, session: SessionName) -> Guard:
    key = claim_key(session)
    await store.commit(Commit([Write(key, 0, {"epoch": 1, "released": None})]))
    return Guard(key, 1)


def listed(repository: Repository) -> list[dict[str, Any]]:
    ended = repository.council("locks", "--json")
    assert ended.code == 0, ended
    locks: list[dict[str, Any]] = ended.result["locks"]
    return locks


def owners(users: list[dict[str, Any]]) -> list[str]:
    for user in users:
        assert user["since"] is None or 0 <= user["age"] <= time.time() - user["since"] + 5
    return [user["owner"] for user in users]


def broken(repository: Repository, name: str, reason: str = "it hangs") -> CommandResult:
    return repository.council("locks", "break", name, "--reason", reason, "--json")


async def last(store: Store) -> CommitRecord:
    records = store.watch(await store.position() - 1)
    record = await anext(records)
    await records.aclose()
    return record


async def test_no_locks_print_nothing(repository: Repository) -> None:
    """Neither for people nor for programs."""
    async with opened(repository):
        assert repository.council("locks").stdout == "no locks\n"
        assert listed(repository) == []


async def test_all_three_layers_are_shown_with_waiters(repository: Repository) -> None:
    """File locks of any process; ownership and the merge lease from the store."""
    repository.council("run", str(repository.configure([{"id": "t", "prompt": "write a.txt x"}])), "--json")
    site = await find_run_repository(str(repository.top), is_url=False, environ=repository.environ)
    scope = ownership_scope(site.location, "main")
    async with opened(repository) as store:
        files = FileLocks(Project(repository.top).file_locks, SystemClock())
        registry = OwnershipRegistry(store, SystemClock(), scope)
        ada, bob = await claim(store, ADA), await claim(store, BOB)
        await registry.acquire(ADA, ["src/**", "a.md"], orchestrator="o1", claim=ada)
        await files.acquire(ADA, ["src/a.py"])
        landing, other = [await join_merge_queue(store, SystemClock(), site.location, "main") for _ in range(2)]
        async with landing.hold(), anyio.create_task_group() as group:
            group.start_soon(lambda: files.acquire(BOB, ["src/a.py"], timeout=60))
            await registry.start_waiting(BOB, ["src/b.py"], orchestrator="o1", claim=bob)
            group.start_soon(other.hold().__aenter__)
            with anyio.fail_after(20):
                while not ((merge := listed(repository)[2])["waiters"] and listed(repository)[0]["waiters"]):
                    await anyio.sleep(0)
            file, owned, _ = listed(repository)
            text = repository.council("locks").stdout
            group.cancel_scope.cancel()
    assert (file["name"], file["layer"], file["mode"]) == ("file/src/a.py", "file", "exclusive")
    assert (owners(file["holders"]), owners(file["waiters"])) == (["r/ada.1"], ["r/bob.1"])
    assert (owned["name"], owned["resources"], owned["epoch"]) == ("ownership/r/ada.1", ["src/**", "a.md"], 1)
    assert (owners(owned["holders"]), owned["waiters"][0]["wants"]) == (["r/ada.1"], ["src/b.py"])
    assert merge["name"] == f"merge/{scope}"
    assert merge["resources"] == [f"main of {site.location}"]
    assert all(f"(process {os.getpid()} on " in owners(merge[part])[0] for part in ("holders", "waiters"))
    assert "file/src/a.py" in text
    assert "awaited by" in text


async def test_broken_ownership_is_released_by_its_owner(repository: Repository) -> None:
    """The record has the reason; the owning process learns from it what to release."""
    async with opened(repository) as store:
        files = FileLocks(Project(repository.top).file_locks, SystemClock())
        registry = OwnershipRegistry(store, SystemClock(), "0" * 16)
        await registry.acquire(ADA, ["a"], orchestrator="o1", claim=await claim(store, ADA))
        await files.acquire(ADA, ["a", "b"])
        await files.acquire(BOB, ["c"])
        ended = broken(repository, "ownership/r/ada.1")
        assert ended.result["broken"]["holders"][0]["owner"] == "r/ada.1"
        record = await last(store)
        assert [(event.type, event.data["reason"]) for event in record.events] == [("lock.broken", "it hangs")]
        assert await registry.holdings() == []
        assert await release_broken_locks(record, files, [ADA, BOB]) == 2
        assert [one.path for one in files.held()] == ["c"]
        again = broken(repository, "ownership/r/ada.1")
        assert (again.code, "is not held" in again.result["error"]) == (2, True)


async def test_broken_lock_locks_nothing(repository: Repository) -> None:
    async with opened(repository) as store:
        registry, guard = OwnershipRegistry(store, SystemClock(), "0" * 16), await claim(store, ADA)
        await registry.acquire(ADA, ["a"], orchestrator="o1", claim=guard, is_lock=True)
        assert [one.session for one in await registry.locked_by_others(BOB)] == [ADA]
        assert broken(repository, "ownership/r/ada.1").code == 0
        assert await registry.locked_by_others(BOB) == []
        assert await registry.acquire(BOB, ["a"], orchestrator="o1", claim=await claim(store, BOB)) is None


async def test_broken_file_lock_is_released_by_its_process(repository: Repository) -> None:
    """Only that file; a lock of a dead process needs no breaking, and the message says so."""
    async with opened(repository) as store:
        files = FileLocks(Project(repository.top).file_locks, SystemClock())
        await files.acquire(ADA, ["a", "b"])
        assert broken(repository, "file/a").code == 0
        assert await release_broken_locks(await last(store), files, [ADA]) == 1
        assert [one.path for one in files.held()] == ["b"]
        refused = broken(repository, "file/a")
        assert refused.code == 2
        assert "released automatically" in str(refused.result)


async def test_holder_of_a_broken_merge_lease_is_rejected(repository: Repository) -> None:
    """The lease's epoch is incremented so that the holder's guard fails; the lease is free then."""
    async with opened(repository) as store:
        key = Key("lease", "merge/" + "0" * 16)
        holder = {"id": "o1", "host": "box", "pid": 4711, "run": "r", "since": time.time() - 9}
        lease = MergeLease(epoch=1, holder=LeaseParticipant(**holder), repository="shop", target="main")
        await store.commit(Commit([Write(key, 0, lease.model_dump(mode="json"))]))
        (lock,) = listed(repository)
        assert (owners(lock["holders"]), lock["epoch"]) == (["o1 (process 4711 on box)"], 1)
        assert broken(repository, lock["name"]).code == 0
        with pytest.raises(LeaseLost):
            await store.commit(Commit([Write(Key("task", "r/t"), 0, {})], guards=[Guard(key, 1)]))
        found = await store.get(key)
        assert found is not None
        assert (found.value["epoch"], found.value["holder"]) == (2, None)
        assert listed(repository) == []


async def test_locks_work_from_python(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository.top)
    async with opened(repository) as store:
        registry = OwnershipRegistry(store, SystemClock(), "0" * 16)
        await registry.acquire(ADA, ["a"], orchestrator="o1", claim=await claim(store, ADA))
        async with Council.open(repository.top, environ=repository.environ) as council:
            assert [(one.name, one.resources) for one in await council.locks.list()] == [("ownership/r/ada.1", ("a",))]
            assert (await council.locks.revoke("ownership/r/ada.1", "why not")).epoch == 1
            assert await council.locks.list() == []
            with pytest.raises(RefusedError, match="lock 'zzz' is not held"):
                await council.locks.revoke("zzz", "why not")
