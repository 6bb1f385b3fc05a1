"""Names and ports of worktree slots: stable, free and unique, despite races and killed processes."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

import anyio
import pytest

from orchestrator.engine.state.port_leases import (
    PortLease,
    PortLeases,
    delete_port_leases,
    find_free_block,
    find_stale_port_leases,
    ports_in_use,
)
from orchestrator.errors import RefusedError
from orchestrator.protocols import Commit, Key, Store, Write
from orchestrator.state.documents.validation import verify_store
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.system.clock import SystemClock
from tests.store_kinds import ALL_KINDS, SERVERS, empty_state, open_kind
from tests.stores import open_store

pytestmark = pytest.mark.extended_rest

WORKER = Path(__file__).with_name("lease_worker.py")
SPAN = 1000  # as in the worker
PATIENCE = 60  # seconds
HOST = socket.gethostname()


@pytest.fixture
def ports() -> range:
    """Return ports that nothing uses, and that concurrent tests do not probe."""
    for step in range(18):
        first = 11000 + SPAN * ((os.getpid() + step) % 18)
        if not ports_in_use(range(first, first + SPAN)):
            return range(first, first + SPAN)
    pytest.skip("no thousand consecutive ports are free")


@pytest.fixture(params=ALL_KINDS)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """Return each kind of store."""
    async with open_kind(request.param, tmp_path / "state", SystemClock()) as store:
        yield store


def make_slot(home: Path, number: int, hub: str = "repo-0123456789ab") -> Path:
    """Create the folder of a slot."""
    slot = home / hub / "slots" / str(number)
    slot.mkdir(parents=True)
    return slot


def leases_of(store: Store, ports: range, count: int = 3) -> PortLeases:
    """Return leases from the ports of this test."""
    return PortLeases(store, SystemClock(), count, ports=ports)


async def lease_all(leases: PortLeases, slots: Sequence[Path]) -> dict[Path, PortLease]:
    """Lease for all slots concurrently."""
    found: dict[Path, PortLease] = {}

    async def work(slot: Path) -> None:
        found[slot] = await leases.lease(slot)

    async with anyio.create_task_group() as group:
        for slot in slots:
            group.start_soon(work, slot)
    return found


async def recorded(store: Store) -> dict[int, str]:
    """Return the recorded slot of each port."""
    documents = await store.list("ports", f"{HOST}/")
    return {int(one.key.id.rpartition("/")[2]): one.value["slot"] for one in documents}


def expected(found: dict[Path, PortLease]) -> dict[int, str]:
    """Return the expected content of the store."""
    return {port: str(slot) for slot, lease in found.items() for port in lease.ports}


def assert_disjoint(blocks: Sequence[Sequence[int]], count: int) -> None:
    """Check that each block has `count` consecutive ports, and that no port is in two."""
    assert all(list(block) == list(range(block[0], block[0] + count)) for block in blocks)
    assert len(set(chain(*blocks))) == count * len(blocks)


@contextmanager
def listening(port: int, address: str = "127.0.0.1") -> Iterator[socket.socket]:
    """Listen on a port within the body."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family) as server:
        yield server


async def test_slot_has_a_name_and_ports_in_its_environment(store: Store, ports: range, tmp_path: Path) -> None:
    """By variables; the name is valid for hosts, databases and Compose projects, and unique."""
    slots = [make_slot(tmp_path, 7), make_slot(tmp_path, 7, "other"), make_slot(tmp_path, 12345678901234567890)]
    found = await lease_all(leases_of(store, ports), slots)
    lease = found[slots[0]]
    first = lease.ports[0]
    assert lease.environment() == {
        "COUNCIL_NAME": lease.name,
        "COUNCIL_PORT_0": str(first),
        "COUNCIL_PORT_1": str(first + 1),
        "COUNCIL_PORT_2": str(first + 2),
    }
    names = [one.name for one in found.values()]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"[a-z][a-z0-9-]{0,39}", name) for name in names)
    assert await recorded(store) == expected(found)


async def test_lease_lasts_as_long_as_its_slot(ports: range, tmp_path: Path) -> None:
    """A repeated lease, even from a reopened store, returns the same and records nothing more."""
    home = tmp_path / "home"
    slots = [make_slot(home, number) for number in range(4)]
    async with open_store(str(tmp_path / "state")) as store:
        before = await lease_all(leases_of(store, ports), slots)
        position = await store.position()
    async with open_store(str(tmp_path / "state")) as store:
        assert await lease_all(leases_of(store, ports), slots[::-1]) == before
        assert await store.position() == position


async def test_slot_without_ports_has_only_a_name(store: Store, ports: range, tmp_path: Path) -> None:
    slot = make_slot(tmp_path, 1)
    before = await leases_of(store, ports).lease(slot)
    lease = await leases_of(store, ports, 0).lease(slot)
    assert lease.environment() == {"COUNCIL_NAME": before.name}
    assert await recorded(store) == {}
    assert list(slot.iterdir()) == []


async def test_slots_of_two_projects_and_hubs_share_nothing(ports: range, tmp_path: Path) -> None:
    """The stores are separate; the home knows both, also a hub with a hidden name."""
    ours, theirs = MemoryStore(SystemClock()), MemoryStore(SystemClock())
    tight = ports[:12]
    first = await lease_all(leases_of(ours, tight, 1), [make_slot(tmp_path, number) for number in range(6)])
    hidden = [make_slot(tmp_path, number, ".dotfiles-ba9876543210") for number in range(6)]
    second = await lease_all(leases_of(theirs, tight, 1), hidden)
    assert_disjoint([lease.ports for lease in (first | second).values()], 1)
    one_more = make_slot(tmp_path, 6)
    for store in (ours, theirs):
        with pytest.raises(RefusedError, match="lower `ports`"):
            await leases_of(store, tight, 1).lease(one_more)


async def test_block_is_chosen_under_the_lock_of_the_home(store: Store, ports: range, tmp_path: Path) -> None:
    """While another process chooses, nothing is probed or written; afterwards its choice is visible."""
    tight = ports[:6]
    ours, theirs = make_slot(tmp_path, 1), make_slot(tmp_path, 2)
    found: dict[Path, PortLease] = {}

    async def work() -> None:
        found[ours] = await leases_of(store, tight).lease(ours)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            with (tmp_path / "ports.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                group.start_soon(work)
                while not any(thread.name == "flock ports.lock" for thread in threading.enumerate()):
                    await anyio.sleep(0.01)
                assert list(ours.iterdir()) == []
                (theirs / "lease.json").write_text(json.dumps({"slot": str(theirs), "ports": [*tight[:3]]}))
    assert found[ours].ports == tuple(tight[3:])


async def test_two_homes_of_one_store_share_nothing(store: Store, ports: range, tmp_path: Path) -> None:
    """Runs of one store race from different homes: the store accepts only one of them for each port."""
    tight = ports[:16]
    slots = [make_slot(tmp_path / home, number) for number in range(8) for home in ("a", "b")]
    found = await lease_all(leases_of(store, tight, 1), slots)
    assert_disjoint([lease.ports for lease in found.values()], 1)
    assert await recorded(store) == expected(found)
    assert all(not lease.conflicting for lease in found.values())
    assert await lease_all(leases_of(store, tight, 1), slots) == found


async def test_blocks_of_different_sizes_never_overlap(store: Store, ports: range, tmp_path: Path) -> None:
    """Another number of ports is another block; the earlier one becomes free."""
    slots = [make_slot(tmp_path, number) for number in range(6)]
    await lease_all(leases_of(store, ports), slots)
    larger = await lease_all(leases_of(store, ports, 5), slots[:3])
    same = await lease_all(leases_of(store, ports), slots[3:])
    assert_disjoint([lease.ports for lease in larger.values()], 5)
    assert not set(expected(larger)) & set(expected(same))
    assert await recorded(store) == expected(larger | same)
    assert all(not lease.conflicting for lease in larger.values())


async def test_ports_outside_of_the_range_are_released(store: Store, ports: range, tmp_path: Path) -> None:
    """After a change of the range a slot gets a block of the new one."""
    slot = make_slot(tmp_path, 1)
    await leases_of(store, ports[:500]).lease(slot)
    lease = await leases_of(store, ports[500:]).lease(slot)
    assert all(port in ports[500:] for port in lease.ports)
    assert await recorded(store) == expected({slot: lease})


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "::"])
async def test_port_taken_by_another_program_replaces_the_block(
    store: Store, ports: range, tmp_path: Path, address: str
) -> None:
    """At the next acquisition of the slot, with the reason; the new block stays."""
    slot = make_slot(tmp_path, 1)
    leases = leases_of(store, ports)
    before = await leases.lease(slot)
    with ExitStack() as stack:
        try:
            stack.enter_context(listening(before.ports[1], address))
        except OSError:
            pytest.skip(f"can't listen on {address} here")
        after = await leases.lease(slot)
        assert after.conflicting == (before.ports[1],)
        assert after.name == before.name
        assert before.ports[1] not in after.ports
        assert await recorded(store) == expected({slot: after})
        assert await leases.lease(slot) == PortLease(after.name, after.ports)


async def test_port_in_use_is_never_leased(store: Store, ports: range, tmp_path: Path) -> None:
    """A block has only ports without a listener; without such a block the lease is rejected."""
    slot = make_slot(tmp_path, 1)
    with ExitStack() as stack:
        for port in (ports[2], ports[6], ports[8]):
            stack.enter_context(listening(port, "0.0.0.0"))
        assert (await leases_of(store, ports[:12]).lease(slot)).ports in {tuple(ports[3:6]), tuple(ports[9:12])}
        with pytest.raises(RefusedError, match=f"no 4 consecutive ports are free from {ports[0]} to {ports[11]}"):
            await leases_of(store, ports[:12], 4).lease(slot)
    with pytest.raises(RefusedError, match="no 13 consecutive ports"):
        await leases_of(store, ports[:12], 13).lease(slot)


def test_block_search_wraps_around(ports: range) -> None:
    """Wherever the search starts, it finds the one free block, and only whole ones."""
    taken = {*ports[:4], *ports[7:10]}
    assert {find_free_block(ports[:10], 3, begin, taken) for begin in range(20)} == {ports[4:7]}
    assert find_free_block(ports[:10], 4, 0, taken) is None
    assert find_free_block(ports[:2], 3, 0, ()) is None


def test_port_in_time_wait_is_free(ports: range) -> None:
    """Connections of a closed server in TIME_WAIT do not block a server that sets SO_REUSEADDR."""
    port = ports[0]
    with listening(port) as server, socket.create_connection(("127.0.0.1", port)) as client:
        peer, _ = server.accept()
        assert ports_in_use(ports[:3]) == (port,)
        peer.close()  # first, so that the server's side is in TIME_WAIT
        assert client.recv(1) == b""
    with socket.socket() as strict, pytest.raises(OSError, match="in use"):
        strict.bind(("127.0.0.1", port))
    assert ports_in_use(ports[:3]) == ()


async def test_released_lease_is_gone(store: Store, ports: range, tmp_path: Path) -> None:
    """Released before its folder is deleted or after, or twice: the ports are free for others."""
    tight = ports[:3]
    leases = leases_of(store, tight)
    first, second = make_slot(tmp_path, 1), make_slot(tmp_path, 2)
    await leases.lease(first)
    await leases.release(first)
    lease = await leases.lease(second)
    assert lease.ports == tuple(tight)
    await leases.release(first)
    assert await recorded(store) == expected({second: lease})
    shutil.rmtree(tmp_path / "repo-0123456789ab")
    await leases.release(second)
    await leases.release(second)
    assert await recorded(store) == {}


async def test_lease_without_documents_is_completed(store: Store, ports: range, tmp_path: Path) -> None:
    """A process killed between the file and the commit: the slot keeps its ports, the store records them."""
    slot = make_slot(tmp_path, 1)
    before = await leases_of(MemoryStore(SystemClock()), ports).lease(slot)
    assert await leases_of(store, ports).lease(slot) == before
    assert await recorded(store) == expected({slot: before})


async def test_documents_without_a_slot_are_taken_over(store: Store, ports: range, tmp_path: Path) -> None:
    """Of slots that are deleted, that lost their file, or that have other ports now."""
    tight = ports[:3]
    gone, bare, moved = (make_slot(tmp_path / "old", number) for number in range(3))
    old = await lease_all(leases_of(store, tight, 1), [gone, bare, moved])
    shutil.rmtree(gone)
    (bare / "lease.json").write_text("{")
    file = moved / "lease.json"
    elsewhere = [port + 100 for port in old[moved].ports]
    file.write_text(json.dumps({**json.loads(file.read_text()), "ports": elsewhere}))
    assert {one.value["slot"] for one in await find_stale_port_leases(store)} == {str(gone), str(bare), str(moved)}
    new = await lease_all(leases_of(store, tight, 1), [make_slot(tmp_path / "new", number) for number in range(3)])
    assert await recorded(store) == expected(new)
    assert await find_stale_port_leases(store) == []


async def test_ports_of_a_live_slot_are_not_taken_over(store: Store, ports: range, tmp_path: Path) -> None:
    """A file that names the ports of a slot of another home, left by a copy or a lost race, proves nothing."""
    ours, theirs = make_slot(tmp_path / "a", 1), make_slot(tmp_path / "b", 1)
    leases = leases_of(store, ports)
    before = await leases.lease(theirs)
    content = json.loads((theirs / "lease.json").read_text())
    (ours / "lease.json").write_text(json.dumps({**content, "slot": str(ours)}))
    lease = await leases.lease(ours)
    assert lease.conflicting == before.ports
    assert not set(lease.ports) & set(before.ports)
    (ours / "lease.json").write_text(json.dumps(content))  # an unchanged copy
    again = await leases.lease(ours)
    assert again.conflicting == ()
    assert not set(again.ports) & set(before.ports)
    assert await leases.lease(theirs) == before
    assert await recorded(store) == expected({ours: again, theirs: before})


async def test_lease_is_a_valid_document(ports: range, tmp_path: Path) -> None:
    store = MemoryStore(SystemClock())
    await leases_of(store, ports).lease(make_slot(tmp_path, 0))
    assert (await verify_store(store)).unreadable == {}


async def test_stale_leases_are_found_and_removed(store: Store, ports: range, tmp_path: Path) -> None:
    """Only those of this host whose slots are gone; a reclaimed one stays."""
    slots = [make_slot(tmp_path, number) for number in range(3)]
    leases = leases_of(store, ports)
    found = await lease_all(leases, slots)
    foreign = Key("ports", f"other.{HOST}/20000")
    await store.commit(Commit([Write(foreign, 0, {"slot": str(tmp_path / "nowhere")})]))
    assert await find_stale_port_leases(store) == []
    shutil.rmtree(slots[0])
    shutil.rmtree(slots[1])
    stale = await find_stale_port_leases(store)
    assert {int(one.key.id.rpartition("/")[2]) for one in stale} == {*found[slots[0]].ports, *found[slots[1]].ports}
    make_slot(tmp_path, 1)
    found[slots[1]] = await leases.lease(slots[1])
    await delete_port_leases(store, stale)
    await delete_port_leases(store, stale)
    del found[slots[0]]
    assert await recorded(store) == expected(found)
    assert await store.get(foreign) is not None


async def test_damaged_lease_is_recorded_again(ports: range, tmp_path: Path) -> None:
    """An unreadable document is ignored; the slots decide."""
    home, state = tmp_path / "home", tmp_path / "state"
    slot = make_slot(home, 1)
    async with open_store(str(state)) as store:
        lease = await leases_of(store, ports).lease(slot)
    (segment,) = state.glob("*.jsonl")
    segment.write_bytes(segment.read_bytes().replace(b'"name"', b'"nam\xff"'))
    async with open_store(str(state)) as store:
        assert all(one.damaged for one in await store.list("ports"))
        assert len(await find_stale_port_leases(store)) == 3
        assert await leases_of(store, ports).lease(slot) == lease
        assert await recorded(store) == expected({slot: lease})
        assert await find_stale_port_leases(store) == []


async def test_unreadable_home_is_not_an_empty_one(store: Store, ports: range, tmp_path: Path) -> None:
    """If the leases of others can't be read, none is given."""
    slot = make_slot(tmp_path / "home", 1)
    other = make_slot(tmp_path / "home", 2)
    (other / "lease.json").symlink_to("lease.json")
    with pytest.raises(OSError, match="symbolic links"):
        await leases_of(store, ports).lease(slot)
    assert await recorded(store) == {}


Worker = subprocess.Popen[str]


@pytest.fixture
def start() -> Iterator[ExitStack]:
    """Yield a starter of workers, which are killed at the end of the test."""
    with ExitStack() as stack:
        yield stack


def start_worker(stack: ExitStack, *arguments: object) -> Worker:
    """Start a worker that is killed at the end of the test."""
    argv = [sys.executable, str(WORKER), *map(str, arguments)]
    worker = stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
    stack.callback(worker.kill)
    return worker


def finish(worker: Worker) -> dict[Path, tuple[int, ...]]:
    """Wait until a worker succeeds; return the final ports of each of its slots."""
    output, _ = worker.communicate(timeout=PATIENCE)
    assert worker.returncode == 0
    return {Path(slot): tuple(block) for slot, block in map(json.loads, output.splitlines())}


@pytest.mark.parametrize(
    ("kind", "stores", "count"),
    [
        ("file", 2, 2),
        *(pytest.param(kind, 2, 2, marks=pytest.mark.extended) for kind in SERVERS),
        *(pytest.param("file", stores, 4, marks=pytest.mark.slow) for stores in (1, 2)),
    ],
)
async def test_processes_get_distinct_blocks(
    start: ExitStack, ports: range, tmp_path: Path, kind: str, stores: int, count: int
) -> None:
    """Processes with eight slots each, of one project or of two in one home, concurrently and repeatedly."""
    home = tmp_path / "home"
    states = [empty_state(kind, tmp_path / f"state{number}") for number in range(stores)]
    workers = []
    for number in range(count):
        hub = f"repo-00000000000{number // 2}"
        slots = [make_slot(home, 8 * number + one, hub) for one in range(8)]
        workers.append(start_worker(start, states[number % stores], ports[0], 3, 5, *slots))
    found: dict[Path, tuple[int, ...]] = {}
    for worker in workers:
        found |= finish(worker)
    assert len(found) == 8 * count
    assert_disjoint(list(found.values()), 3)
    said: dict[int, str] = {}
    for number in range(stores):
        async with open_store(states[number]) as store:
            assert await find_stale_port_leases(store) == []
            said |= await recorded(store)
    assert said == {port: str(slot) for slot, block in found.items() for port in block}


@pytest.mark.parametrize("rounds", [1, pytest.param(3, marks=pytest.mark.slow)])
async def test_killed_processes_leave_no_overlap(start: ExitStack, ports: range, tmp_path: Path, rounds: int) -> None:
    """Killed at any point, a process leaves leases that others avoid, and stale ones can be found."""
    chance, home, state = random.Random(1), tmp_path / "home", tmp_path / "state"
    slots = [make_slot(home, number) for number in range(12)]
    for _ in range(rounds):
        workers = [start_worker(start, state, ports[0], 3, 1_000_000, *slots[6 * n : 6 * n + 6]) for n in range(2)]
        for worker in workers:
            assert worker.stdout is not None
            for _ in range(chance.randrange(1, 30)):
                worker.stdout.readline()
            worker.kill()
        for worker in workers:
            worker.communicate(timeout=PATIENCE)
            assert worker.returncode == -signal.SIGKILL
    for slot in slots[::3]:
        shutil.rmtree(slot)
    left = [slot for slot in slots if slot.exists()]
    async with open_store(str(state)) as store:
        found = await lease_all(leases_of(store, ports), left)
        assert_disjoint([lease.ports for lease in found.values()], 3)
        await delete_port_leases(store, await find_stale_port_leases(store))
        assert await recorded(store) == expected(found)
