"""A worktree slot has one owner at a time, and keeps nothing of its previous owner, even a killed one."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import anyio.to_thread
import pytest

from orchestrator.errors import RefusedError
from orchestrator.repo.worktrees import checkouts as checkouts_module
from orchestrator.repo.worktrees import pool as pool_module
from orchestrator.repo.worktrees import reset, worktrees
from orchestrator.repo.worktrees.capacity import HubCapacity
from orchestrator.repo.worktrees.checkouts import HeldSlot, SetupError, SlotOptions, SlotState
from orchestrator.repo.worktrees.files.change_detection import TreeSnapshot, detects_mmap_writes
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.repo.worktrees.reset import KeepRules
from orchestrator.repo.worktrees.slots import WorktreeSlot, list_slots, read_record, read_slot_session
from tests.conftest import Repository
from tests.hub_fixture import HubFixture
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest

WORKER = Path(__file__).with_name("pool_worker.py")
STEPS = ("slot.partly_made", "slot.moved", "worktree.partly_made", "worktree.created", "worktree.removed",
         "slot.partly_clean", "slot.clean")  # fmt: skip
MANY = 6
MEMORY = Path("/dev/shm")


@pytest.fixture(autouse=True)
def any_file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work as on a disk even if the test folder is in memory."""
    monkeypatch.setattr(pool_module, "detects_mmap_writes", lambda folder: True)


@pytest.fixture
async def hub_fixture(repository: Repository, tmp_path: Path, environ: dict[str, str]) -> HubFixture:
    """Return a hub for a repository with a program, links, unusual names, and a branch `other`."""
    (repository.top / "run").write_text("#!/bin/sh\n")
    (repository.top / "run").chmod(0o755)
    (repository.top / "link").symlink_to("run")
    (repository.top / "nowhere").symlink_to("/no/such/file")
    repository.commit({"a/b/c/d.txt": "d\n", "-dash": "x\n", "new\nline": "y\n", ".gitignore": "*.o\ncache\n"}, "more")
    repository.git("checkout", "--quiet", "-b", "other")
    repository.commit({"a/b/c/d.txt": "other\n", "src/new.py": "\n", "wanted.o": "tracked\n"}, "other")
    repository.git("add", "--force", "wanted.o")
    repository.commit({}, "and what is ignored")
    repository.git("checkout", "--quiet", "main")
    return await HubFixture.of(repository.top, tmp_path / "council-home", environ)


def files(tree: Path) -> dict[str, tuple[int, object]]:
    """Return the files of a checkout."""
    found: dict[str, tuple[int, object]] = {}
    for path in tree.rglob("*"):
        content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(tree))] = path.lstat().st_mode, content
    return {name: facts for name, facts in found.items() if name != ".git"}


async def checked_out_by_git(hub_fixture: HubFixture, branch: str, to: Path) -> dict[str, tuple[int, object]]:
    """Return the files that git checks out."""
    subprocess.run(["git", "clone", "-q", "-b", branch, str(hub_fixture.top), str(to)], check=True)
    shutil.rmtree(to / ".git")
    return files(to)


async def wait_until_settled(pool: SlotPool) -> None:
    """Wait until the background work is done: all slots are idle or in use."""
    with anyio.fail_after(30):
        while (
            pool.preparation.is_making
            or pool.slots.in_state(SlotState.NEW, SlotState.CLEANING)
            or len(pool.slots.by_number) < pool.slots.wanted
        ):
            await anyio.sleep(0.01)


def warm(pool: SlotPool, commit: str) -> None:
    """Start creating the slots to keep ready at a commit."""
    pool.preparation.commit = commit
    pool.preparation.make_needed()


async def idle(pool: SlotPool, count: int) -> None:
    """Wait until this many slots are idle."""
    with anyio.fail_after(30):
        while len(pool.slots.in_state(SlotState.IDLE)) < count:
            await anyio.sleep(0.01)


async def assert_no_leaks(hub_fixture: HubFixture) -> None:
    """Every slot is clean or in use by a live session; nothing waits for deletion, and no lock is held."""
    for slot in list_slots(hub_fixture.hub):
        assert read_record(slot) is not None or read_slot_session(slot) is not None, slot
        assert not await slot.lock.is_held(), slot
    assert not list(hub_fixture.hub.trash.iterdir())


# Acquisition.


async def test_takers_get_distinct_slots(hub_fixture: HubFixture, tmp_path: Path) -> None:
    """Concurrently; each equals git's checkout, git and the stamps find no difference, and all are released."""
    commit, expected = await hub_fixture.fetch(), await checked_out_by_git(hub_fixture, "main", tmp_path / "clone")
    began = []
    async with hub_fixture.open() as pool:

        async def take(name: str) -> None:
            began.append(await hub_fixture.begin(pool, name, commit))

        async with anyio.create_task_group() as group:
            for number in range(MANY):
                group.start_soon(take, f"task{number}")
        assert len({worktree.tree for worktree, _ in began}) == MANY
        for worktree, checkout in began:
            assert files(worktree.tree) == expected
            status = subprocess.run(
                ["git", "status", "--porcelain"], cwd=worktree.tree, check=True, capture_output=True
            )
            assert not status.stdout
            found = await checkout.compare()
            assert found is not None
            assert found.is_small(0)
            await hub_fixture.end(pool, worktree, checkout)
    assert not list(hub_fixture.hub.sessions.glob("*"))
    assert len(list_slots(hub_fixture.hub)) == MANY
    await assert_no_leaks(hub_fixture)


async def test_pool_that_ends_leaves_no_slot_of_unknown_state(hub_fixture: HubFixture) -> None:
    """Idle slots stay for the next pool; a slot whose session another process removed is deleted."""
    commit = await hub_fixture.fetch()

    async def be_fenced() -> None:
        async with hub_fixture.open(warm=2) as pool:
            warm(pool, commit)
            await idle(pool, 2)
            worktree, _ = await hub_fixture.begin(pool, "task", commit)
            await wait_until_settled(pool)
            await worktrees.remove_session_folder(worktree)
            raise ValueError("fenced")

    with pytest.raises(ExceptionGroup, match="TaskGroup"):
        await be_fenced()
    await assert_no_leaks(hub_fixture)
    assert len(list_slots(hub_fixture.hub)) == 1


async def test_warm_pool_creates_slots_ahead(hub_fixture: HubFixture) -> None:
    """As many as configured, once the commit is known; including the last one, the source of copies."""
    commit = await hub_fixture.fetch()
    async with hub_fixture.open(warm=3) as pool:
        assert not list_slots(hub_fixture.hub)
        warm(pool, commit)
        await idle(pool, 3)
        began = [await hub_fixture.begin(pool, f"task{number}", commit) for number in range(3)]
        assert {checkout.slot.number for _, checkout in began} == {1, 2, 3}
        for one in began:
            await hub_fixture.end(pool, *one)
    await assert_no_leaks(hub_fixture)


async def test_slot_keeps_its_path_and_moves_to_a_commit(hub_fixture: HubFixture, tmp_path: Path) -> None:
    """One slot serves both branches in turn, as git checks them out, whatever the session did before."""
    commits = {branch: await hub_fixture.fetch(branch) for branch in ("main", "other")}
    expected = {branch: await checked_out_by_git(hub_fixture, branch, tmp_path / branch) for branch in commits}
    async with hub_fixture.open(slots=1) as pool:
        for number, branch in enumerate(("main", "other", "other", "main", "other")):
            worktree, checkout = await hub_fixture.begin(pool, f"task{number}", commits[branch])
            assert checkout.slot.number == 1
            assert files(worktree.tree) == expected[branch]
            (worktree.tree / "src/app.py").unlink()
            (worktree.tree / "made.txt").write_text("made\n")
            await hub_fixture.end(pool, worktree, checkout)
    await assert_no_leaks(hub_fixture)


# Limits.


async def test_number_of_slots_is_limited(hub_fixture: HubFixture) -> None:
    """Waiters continue as soon as a slot is released, and waiting costs almost nothing."""
    commit = await hub_fixture.fetch()
    out, most = 0, 0
    async with hub_fixture.open(slots=2) as pool:

        async def session(name: str) -> None:
            nonlocal out, most
            one = await hub_fixture.begin(pool, name, commit)
            out, most = out + 1, max(most, out + 1)
            await anyio.sleep(0.05)
            out -= 1
            await hub_fixture.end(pool, *one)

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for number in range(MANY):
                    group.start_soon(session, f"task{number}")
        assert most == 2
    assert len(list_slots(hub_fixture.hub)) == 2
    await assert_no_leaks(hub_fixture)


async def test_waiting_does_not_spin(hub_fixture: HubFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no more may be created, the limit is checked again twice a second."""
    commit, looks = await hub_fixture.fetch(), 0
    counted = HubCapacity._measure_counted

    async def count(capacity: HubCapacity) -> dict[WorktreeSlot, int]:
        nonlocal looks
        looks += 1
        return await counted(capacity)

    async with hub_fixture.open(slots=1) as pool:
        one = await hub_fixture.begin(pool, "first", commit)
        monkeypatch.setattr(HubCapacity, "_measure_counted", count)
        with anyio.move_on_after(1.2) as waited:
            await hub_fixture.begin(pool, "second", commit)
        assert waited.cancelled_caught
        assert 1 <= looks <= 4
        await hub_fixture.end(pool, *one)


async def test_bytes_are_limited(hub_fixture: HubFixture) -> None:
    """As many slots of equal size are created as fit; leftovers of another run are removed, used ones are not."""
    commit = await hub_fixture.fetch()

    async def furnish(checkout: HeldSlot, _: str) -> tuple[str, ...]:
        if not checkout.contents.record.setup:
            (checkout.slot.tree / "large.o").write_bytes(bytes(1 << 20))
        return ("large",)

    care = SlotOptions(set_up=furnish)
    async with hub_fixture.open(care, size=5 << 19) as pool:
        began = [await hub_fixture.begin(pool, f"task{number}", commit) for number in range(2)]
        with anyio.move_on_after(1.2) as waited:
            await hub_fixture.begin(pool, "third", commit)
        assert waited.cancelled_caught
        for one in began:
            await hub_fixture.end(pool, *one)
    assert [record.bytes >> 20 for slot in list_slots(hub_fixture.hub) if (record := read_record(slot))] == [1, 1]
    async with hub_fixture.open(replace(care, sparse=("src",)), size=5 << 19) as pool:
        with anyio.fail_after(30):
            await hub_fixture.end(pool, *await hub_fixture.begin(pool, "task", commit))
    assert len(list_slots(hub_fixture.hub)) == 2
    await assert_no_leaks(hub_fixture)


async def test_impossible_limit_is_reported(hub_fixture: HubFixture) -> None:
    async with hub_fixture.open(slots=0) as pool:
        with anyio.fail_after(30), pytest.raises(RefusedError):
            await hub_fixture.begin(pool, "task", await hub_fixture.fetch())


# Obstacles.


async def test_file_in_the_way_of_a_move_discards_the_slot(hub_fixture: HubFixture, tmp_path: Path) -> None:
    """The next commit tracks a kept file: a new slot is created with the content of the commit."""
    main, other = await hub_fixture.fetch(), await hub_fixture.fetch("other")
    async with hub_fixture.open(SlotOptions(keep=KeepRules((("wanted.o", ""),)))) as pool:
        worktree, checkout = await hub_fixture.begin(pool, "first", main)
        (worktree.tree / "wanted.o").write_text("kept\n")
        await hub_fixture.end(pool, worktree, checkout)
        await idle(pool, 1)
        worktree, checkout = await hub_fixture.begin(pool, "again", main)
        assert (worktree.tree / "wanted.o").read_text() == "kept\n"
        await hub_fixture.end(pool, worktree, checkout)
        await idle(pool, 1)
        worktree, checkout = await hub_fixture.begin(pool, "moved", other)
        assert files(worktree.tree) == await checked_out_by_git(hub_fixture, "other", tmp_path / "clone")
        (worktree.tree / "wanted.o").write_text("changed\n")
        found = await checkout.compare()
        assert found is not None
        assert found.changed == ["wanted.o"]
        await hub_fixture.end(pool, worktree, checkout)
    await assert_no_leaks(hub_fixture)


async def test_files_no_longer_ignored_are_removed(hub_fixture: HubFixture, repository: Repository) -> None:
    """A kept folder is removed if the next commit does not ignore it."""
    main = await hub_fixture.fetch()
    repository.commit({".gitignore": "*.o\n"}, "no cache")
    newer = await hub_fixture.fetch()
    async with hub_fixture.open(SlotOptions(keep=KeepRules((("cache", ""),))), slots=1) as pool:
        for name, commit, is_there in (("a", main, False), ("b", main, True), ("c", newer, False)):
            worktree, checkout = await hub_fixture.begin(pool, name, commit)
            assert (worktree.tree / "cache").exists() is is_there
            (worktree.tree / "cache").mkdir(exist_ok=True)
            (worktree.tree / "cache" / "x").write_text("x\n")
            await hub_fixture.end(pool, worktree, checkout)
    await assert_no_leaks(hub_fixture)


async def test_kept_files_of_an_adapter_are_its_own(hub_fixture: HubFixture) -> None:
    """Sessions of other adapters and checks do not see them; files kept for all are shared."""
    commit = await hub_fixture.fetch()
    async with hub_fixture.open(SlotOptions(keep=KeepRules((("one.o", "one"), ("cache", "")))), slots=1) as pool:
        seen = list[tuple[bool, bool]]()
        for name in ("one", "one", "two", "one", ""):
            worktree, checkout = await hub_fixture.begin(pool, f"task{len(seen)}", commit, name)
            seen.append(((worktree.tree / "one.o").exists(), (worktree.tree / "cache").exists()))
            if name == "one":
                (worktree.tree / "one.o").write_text("mine\n")
            (worktree.tree / "cache").mkdir(exist_ok=True)
            await hub_fixture.end(pool, worktree, checkout)
            await idle(pool, 1)
    assert seen == [(False, False), (True, True), (False, True), (False, True), (False, True)]


async def test_setup_files_stay_or_the_slot_is_discarded(hub_fixture: HubFixture) -> None:
    """Setup runs once; after a session changed its files, the next session gets a new slot."""
    commit, made = await hub_fixture.fetch(), 0

    async def furnish(checkout: HeldSlot, _: str) -> tuple[str, ...]:
        nonlocal made
        if checkout.contents.record.setup:
            return checkout.contents.record.setup
        made += 1
        (checkout.slot.tree / "setup.o").write_text("whole\n")
        (checkout.slot.tree / "plain.txt").write_text("whole\n")
        return ("made",)

    async with hub_fixture.open(SlotOptions(set_up=furnish), slots=1) as pool:
        for number, (edit, count) in enumerate(
            ((None, 1), ("README.md", 1), ("setup.o", 1), ("plain.txt", 2), (None, 3))
        ):
            worktree, checkout = await hub_fixture.begin(pool, f"task{number}", commit)
            assert made == count
            assert (worktree.tree / "setup.o").read_text() == (worktree.tree / "plain.txt").read_text() == "whole\n"
            if edit:
                (worktree.tree / edit).write_text("changed\n")
            await hub_fixture.end(pool, worktree, checkout)
    await assert_no_leaks(hub_fixture)


async def test_failed_setup_is_reported_to_the_waiters(hub_fixture: HubFixture) -> None:
    """Once each, and nothing is left; the next acquisition tries again."""
    is_broken = True

    async def furnish(checkout: HeldSlot, _: str) -> tuple[str, ...]:
        if is_broken:
            raise SetupError("it can't be")
        return ()

    async with hub_fixture.open(SlotOptions(set_up=furnish)) as pool:
        for number in range(2):
            with anyio.fail_after(30), pytest.raises(SetupError):
                await hub_fixture.begin(pool, f"task{number}", await hub_fixture.fetch())
        is_broken = False
        await hub_fixture.end(pool, *await hub_fixture.begin(pool, "task", await hub_fixture.fetch()))
    await assert_no_leaks(hub_fixture)


async def test_file_system_without_change_times_is_handled(
    hub_fixture: HubFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every slot is used once, also if setup has created files."""
    commit = await hub_fixture.fetch()

    async def furnish(checkout: HeldSlot, _: str) -> tuple[str, ...]:
        (checkout.slot.tree / "setup.o").write_text("made\n")
        return ("made",)

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    for name in ("no watch is free", "its clock differs"):
        with monkeypatch.context() as patch:
            if name == "its clock differs":
                patch.setattr(TreeSnapshot, "capture", classmethod(lambda cls, *_: None))
            else:
                patch.setattr(pool_module, "detects_mmap_writes", lambda folder: False)
                patch.setattr(checkouts_module, "WriteWatch", fail)
            async with hub_fixture.open(SlotOptions(set_up=furnish), slots=2) as pool:
                for number in range(3):
                    with anyio.fail_after(30):
                        worktree, checkout = await hub_fixture.begin(pool, f"{name[:2]}{number}", commit)
                    assert not (checkout.slot.scratch / "used").exists()
                    (checkout.slot.scratch / "used").touch()
                    await hub_fixture.end(pool, worktree, checkout)
        assert not list_slots(hub_fixture.hub)
        await assert_no_leaks(hub_fixture)


@pytest.mark.skipif(not MEMORY.is_dir(), reason="no file system in memory")
async def test_mapped_writes_in_memory_are_detected_and_undone(
    hub_fixture: HubFixture, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system in memory reports no time of a write through a shared mapping."""
    monkeypatch.setattr(pool_module, "detects_mmap_writes", detects_mmap_writes)
    with TemporaryDirectory(dir=MEMORY) as folder:
        in_memory = await HubFixture.of(hub_fixture.top, Path(folder), environ)
        commit = await in_memory.fetch()
        async with in_memory.open(slots=1) as pool:
            worktree, checkout = await in_memory.begin(pool, "task", commit)
            # By a child process, as in a session: nothing of it is left when the changes are read.
            code = "import mmap; file = open('a/b/c/d.txt', 'r+b'); mmap.mmap(file.fileno(), 0)[0] = 0x44"
            await anyio.run_process([sys.executable, "-c", code], cwd=worktree.tree)
            diff = await checkout.compare()
            assert diff is not None
            assert diff.changed == ["a/b/c/d.txt"]
            await worktrees.remove_session_folder(worktree)
            pool.release(checkout, diff)
            again, _ = await in_memory.begin(pool, "next", commit)
            assert again.slot == checkout.slot
            assert (again.tree / "a/b/c/d.txt").read_text() == "d\n"


async def test_acquisition_may_be_cancelled(hub_fixture: HubFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it waits, and while a slot is switched to another commit: the next taker gets it."""
    main, other = await hub_fixture.fetch(), await hub_fixture.fetch("other")
    move, moving = reset.move_slot, anyio.Event()

    async def slow(*arguments: object) -> object:
        moving.set()
        await anyio.sleep(30)
        raise AssertionError("it was to be cancelled")

    async with hub_fixture.open(slots=1) as pool:
        one = await hub_fixture.begin(pool, "first", main)
        with anyio.move_on_after(0.1):
            await hub_fixture.begin(pool, "waits", main)
        await hub_fixture.end(pool, *one)
        await idle(pool, 1)
        monkeypatch.setattr(reset, "move_slot", slow)
        async with anyio.create_task_group() as group:
            group.start_soon(hub_fixture.begin, pool, "moves", other)
            await moving.wait()
            group.cancel_scope.cancel()
        monkeypatch.setattr(reset, "move_slot", move)
        with anyio.fail_after(30):
            await hub_fixture.end(pool, *await hub_fixture.begin(pool, "next", other))
    await assert_no_leaks(hub_fixture)


@pytest.mark.extended_variants
@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(more, marks=pytest.mark.slow) for more in range(3, 8))])
async def test_takers_cancelled_at_any_moment_lose_nothing(hub_fixture: HubFixture, seed: int) -> None:
    """Some of many takers give up at a random point; the others continue."""
    commits, chance = [await hub_fixture.fetch(), await hub_fixture.fetch("other")], random.Random(seed)
    async with hub_fixture.open(slots=3, warm=2) as pool:

        async def session(number: int) -> None:
            with anyio.move_on_after(chance.random() * 0.3 if number % 2 else None):
                worktree = hub_fixture.worktree(f"task{number}")
                checkout = await pool.acquire(chance.choice(commits), worktree.root)
                with anyio.CancelScope(shield=True):
                    await worktrees.create_worktree(worktree, checkout, "")
                    (worktree.tree / "README.md").write_text("changed\n")
                    await hub_fixture.end(pool, worktree, checkout)

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for number in range(12):
                    group.start_soon(session, number)
    assert len(list_slots(hub_fixture.hub)) <= 3
    await assert_no_leaks(hub_fixture)


# Between processes and runs.


async def test_next_pool_continues_with_the_slots(hub_fixture: HubFixture) -> None:
    """Slots of a closed pool are reused, except for one that was changed since."""
    commit = await hub_fixture.fetch()
    async with hub_fixture.open(warm=3) as pool:
        warm(pool, commit)
        await idle(pool, 3)
    for slot in list_slots(hub_fixture.hub):
        (slot.root / "mark").touch()
    (WorktreeSlot(hub_fixture.hub, 2).tree / "README.md").write_text("changed in between\n")
    again, began = {}, []
    async with hub_fixture.open(slots=3, warm=3) as pool:
        for number in range(3):
            worktree, checkout = await hub_fixture.begin(pool, f"task{number}", commit)
            assert (worktree.tree / "README.md").read_text() == "# Project\n"
            again[checkout.slot.number] = (checkout.slot.root / "mark").exists()
            began.append((worktree, checkout))
        for one in began:
            await hub_fixture.end(pool, *one)
    assert again == {1: True, 2: False, 3: True}
    assert len(list_slots(hub_fixture.hub)) == 3
    await assert_no_leaks(hub_fixture)


@pytest.mark.extended_variants
@pytest.mark.parametrize("damage", ["record.json", "stamps.json", "tree"])
async def test_damaged_slots_are_not_used(hub_fixture: HubFixture, damage: str) -> None:
    """A partial record or a missing checkout: the slot is deleted."""
    commit = await hub_fixture.fetch()
    async with hub_fixture.open(warm=1) as pool:
        warm(pool, commit)
        await idle(pool, 1)
    slot = WorktreeSlot(hub_fixture.hub, 1)
    if damage == "tree":
        shutil.rmtree(slot.tree)
    else:
        path = slot.root / damage
        path.write_bytes(path.read_bytes()[:-20])
    async with hub_fixture.open(warm=1) as pool:
        worktree, checkout = await hub_fixture.begin(pool, "task", commit)
        assert (worktree.tree / "README.md").read_text() == "# Project\n"
        await hub_fixture.end(pool, worktree, checkout)
    await assert_no_leaks(hub_fixture)


async def test_preserved_session_keeps_its_slot(hub_fixture: HubFixture) -> None:
    """It does not count, no pool touches it, and removing the session removes the slot too."""
    commit = await hub_fixture.fetch()
    async with hub_fixture.open(slots=1) as pool:
        worktree, checkout = await hub_fixture.begin(pool, "kept", commit)
        (worktree.tree / "work.txt").write_text("work\n")
        await pool.slots.detach(checkout)
    async with hub_fixture.open(slots=1, warm=1) as pool:
        await hub_fixture.end(pool, *await hub_fixture.begin(pool, "next", commit))
    assert (worktree.tree / "work.txt").read_text() == "work\n"
    await worktrees.remove_worktree(worktree)
    assert [slot.number for slot in list_slots(hub_fixture.hub)] == [2]
    async with hub_fixture.open():
        pass
    await assert_no_leaks(hub_fixture)


async def test_two_pools_of_one_hub_share_the_limits(hub_fixture: HubFixture) -> None:
    """Neither touches the slots of the other, idle or in use; unused capacity of one is available to the other."""
    commit = await hub_fixture.fetch()
    async with hub_fixture.open(slots=3, warm=2) as one, hub_fixture.open(slots=3, warm=2) as two:
        warm(one, commit)
        await idle(one, 2)
        first = await hub_fixture.begin(one, "first", commit)
        second = await hub_fixture.begin(two, "second", commit)
        with anyio.move_on_after(0.7) as waited:
            await hub_fixture.begin(two, "third", commit)
        assert waited.cancelled_caught
        assert len({first[0].tree, second[0].tree}) == 2
        await hub_fixture.end(one, *first)
        await hub_fixture.end(two, *second)
    assert len(list_slots(hub_fixture.hub)) == 3
    await assert_no_leaks(hub_fixture)
    async with hub_fixture.open(slots=1) as pool:
        await hub_fixture.end(pool, *await hub_fixture.begin(pool, "last", commit))
    assert len(list_slots(hub_fixture.hub)) == 1
    await assert_no_leaks(hub_fixture)


def worker(repository: Repository, *arguments: object, failpoints: str = "") -> subprocess.Popen[str]:
    """Start a process with its own pool."""
    env = {**repository.environ, "PYTHONPATH": str(WORKER.parents[3])}
    home = repository.top.parent / "council-home"
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(repository.top), str(home), *map(str, arguments)],
        env={**env, **({"COUNCIL_FAILPOINTS": failpoints} if failpoints else {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
async def plain(repository: Repository, tmp_path: Path, environ: dict[str, str]) -> HubFixture:
    """Return a hub for a repository with two branches of the same files."""
    repository.git("branch", "other")
    repository.commit({"src/app.py": "changed\n"}, "second")
    return await HubFixture.of(repository.top, tmp_path / "council-home", environ)


def forget_sessions(hub_fixture: HubFixture) -> None:
    """Do what a recovery does after it has salvaged the sessions of a killed run with no command left."""
    wait_until_free(hub_fixture)
    for worktree in worktrees.list_worktrees(hub_fixture.hub, "run1", None):
        worktrees._remove(worktree)


def wait_until_free(hub_fixture: HubFixture) -> None:
    """Wait for the commands of a killed process, which hold the slot locks until they end."""
    wait_for(lambda: not any(anyio.run(slot.lock.is_held) for slot in list_slots(hub_fixture.hub)))


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    "step",
    [pytest.param(one, marks=() if one in {"slot.moved", "worktree.created"} else pytest.mark.slow) for one in STEPS],
)
async def test_slot_of_a_dead_process_is_reused(plain: HubFixture, repository: Repository, step: str) -> None:
    """Killed at any step: the next pool deletes slots of unknown state and keeps those of sessions."""
    before = worker(repository, 4, 2, "before", 2)
    _, errors = before.communicate(timeout=60)
    assert before.returncode == 0, errors
    child = worker(repository, 24, 4, "seed", 4, failpoints=f"{step}=kill@2")
    _, errors = child.communicate(timeout=60)
    assert child.returncode == -9, errors
    await anyio.to_thread.run_sync(wait_until_free, plain)
    sessions = {one.root: one.slot for one in worktrees.list_worktrees(plain.hub, "run1", None)}
    async with plain.open(warm=2) as pool:
        await plain.end(pool, *await plain.begin(pool, "after", await plain.fetch()))
        for root, slot in sessions.items():
            assert slot is None or read_slot_session(slot) == root
    await anyio.to_thread.run_sync(forget_sessions, plain)
    async with plain.open():
        pass
    await assert_no_leaks(plain)


async def _acquire_in_two_processes(hub_fixture: HubFixture, repository: Repository, total: int) -> None:
    """Acquire slots in two concurrent processes until the count is reached; kill most at a random point."""
    chance, handed = random.Random(total), 0
    while handed < total:
        children = [worker(repository, max(100, total // 10), 16, f"{handed}-{side}", 6) for side in range(2)]
        for child in children:
            victim = chance.random() < 0.5
            with suppress(subprocess.TimeoutExpired):
                child.wait(chance.uniform(0.8, 4.0) if victim else None)
            child.kill()
            output, errors = child.communicate()
            assert child.returncode in {0, -9}, errors
            assert victim or child.returncode == 0, errors
            if child.returncode == 0:
                count, half, end = map(int, output.split())
                handed += count
                assert end < half * 1.2 + 4_000
        assert len(list_slots(hub_fixture.hub)) <= 6 + 2 * 16
        await anyio.to_thread.run_sync(forget_sessions, hub_fixture)
    async with hub_fixture.open():
        pass
    await assert_no_leaks(hub_fixture)
    assert len(list_slots(hub_fixture.hub)) <= 6
    assert not list((hub_fixture.hub.indexes).iterdir())


@pytest.mark.extended
@pytest.mark.timeout(600)
async def test_two_processes_killed_sometimes_lose_nothing(plain: HubFixture, repository: Repository) -> None:
    """Of some dozen acquisitions none fails, nothing is left, and memory does not grow."""
    await _acquire_in_two_processes(plain, repository, 60)


@pytest.mark.slow
@pytest.mark.timeout(7200)
async def test_ten_thousand_assignments_leave_nothing(plain: HubFixture, repository: Repository) -> None:
    await _acquire_in_two_processes(plain, repository, 10_000)


def test_session_folder_is_created_while_its_neighbour_is_removed(tmp_path: Path) -> None:
    """A leaving session removes the run's folder if it is empty, at any time."""
    run, over = tmp_path / "sessions" / "run", threading.Event()

    def leave() -> None:
        while not over.is_set():
            with suppress(OSError):
                run.rmdir()

    leaving = threading.Thread(target=leave)
    leaving.start()
    try:
        for number in range(300):
            worktrees.make_root(run / str(number))
            (run / str(number)).rmdir()
    finally:
        over.set()
        leaving.join()


async def test_requested_slot_is_waited_for_while_it_is_cleaned(
    hub_fixture: HubFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation continues in its own folder only, not in another clean one."""
    main = await hub_fixture.fetch()
    clean, begun, may_end = reset.clean_slot, anyio.Event(), anyio.Event()

    async def slowly(*arguments: Any) -> Any:
        begun.set()
        await may_end.wait()
        return await clean(*arguments)

    async with hub_fixture.open() as pool:
        first, mine = await hub_fixture.begin(pool, "first", main)
        second, other = await hub_fixture.begin(pool, "second", main)
        await hub_fixture.end(pool, second, other)
        await idle(pool, 1)
        monkeypatch.setattr(reset, "clean_slot", slowly)
        await hub_fixture.end(pool, first, mine)
        await begun.wait()
        async with anyio.create_task_group() as group:
            group.start_soon(finish_cleanup_on_wait, pool, may_end)
            again = await pool.acquire(main, hub_fixture.worktree("first", 2).root, tree=mine.slot.tree)
        assert again.slot.tree == mine.slot.tree
        await pool.slots.discard(again)


async def finish_cleanup_on_wait(pool: SlotPool, may_end: anyio.Event) -> None:
    """Let the cleanup end as soon as a taker waits for a slot."""
    while not pool.slots.waiting:
        await anyio.sleep(0.01)
    may_end.set()
