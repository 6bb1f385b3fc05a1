"""For any interleaving of two clients and an outage, the history of the real store is consistent."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain.events.base import TypedEvent
from orchestrator.errors import LeaseLost, VersionConflict
from orchestrator.protocols import Commit, Event, Guard, JsonObject, Key, Store, Write
from orchestrator.state.offline.fork import survive_outages
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.system.clock import SystemClock
from tests.faulty_store import QUICK_PAUSES, DisconnectableStore
from tests.hypothesis_settings import example_settings

TASKS = ("x", "y")
STEPS = st.lists(
    st.tuples(st.sampled_from(("claim", "work", "read")), st.sampled_from(("here", "there")), st.sampled_from(TASKS))
    | st.sampled_from((("cut",), ("restore",))),
    max_size=30,
)


def claim_key(task: str) -> Key:
    return Key("claim", f"r/{task}")


def task_key(task: str) -> Key:
    return Key("task", f"r/{task}")


class Party:
    """A client that claims and works on tasks from memory, unless it reads."""

    def __init__(self, name: str, store: Store) -> None:
        self.name, self.store = name, store
        self.epochs: dict[str, int] = {}
        self.versions: dict[str, int] = {}
        self.made: list[int] = []
        """The numbers of the commits that were acknowledged."""

    async def read(self, task: str) -> None:
        found = await self.store.get(task_key(task))
        self.versions[task] = found.version if found else 0

    async def claim(self, task: str) -> None:
        found = await self.store.get(claim_key(task))
        version = found.version if found else 0
        if await self._commit(Write(claim_key(task), version, {"epoch": version + 1, "owner": self.name})):
            self.epochs[task] = version + 1

    async def work(self, task: str) -> None:
        if task not in self.epochs:
            return
        if task not in self.versions:
            await self.read(task)
        epoch, version = self.epochs[task], self.versions[task]
        try:
            if await self._commit(
                Write(task_key(task), version, {"epoch": epoch, "owner": self.name}), Guard(claim_key(task), epoch)
            ):
                self.versions[task] = version + 1
            else:
                del self.versions[task]
        except LeaseLost:
            del self.epochs[task]

    async def _commit(self, write: Write, *guards: Guard) -> bool:
        number = len(self.made)
        value: JsonObject = {**(write.value or {}), "number": number}
        event = Event("made", {"by": self.name, "number": number})
        try:
            await self.store.commit(Commit([Write(write.key, write.expected, value)], [event], guards))
        except VersionConflict:
            return False
        self.made.append(number)
        return True


async def play(steps: list[tuple[str, ...]], folder: Path) -> None:
    real, reported = MemoryStore(SystemClock()), list[TypedEvent]()

    async def tell(event: TypedEvent) -> None:
        reported.append(event)

    line = DisconnectableStore(real)
    with anyio.fail_after(30):
        async with survive_outages(line, "continue", SystemClock(), folder, tell, intervals=QUICK_PAUSES) as store:
            for kind in ("claim", "task"):
                await store.list(kind)
            parties = {"here": Party("here", store), "there": Party("there", real)}
            for step in [*steps, ("restore",)]:
                match step:
                    case ("cut",):
                        line.cut()
                    case ("restore",):
                        line.reconnect()
                        while any(folder.glob("*")):
                            await anyio.sleep(0.001)
                    case (what, who, task):
                        await getattr(parties[who], what)(task)
            # After a reconnect it works on the real state.
            for party in parties.values():
                for task in TASKS:
                    await party.claim(task)
                    await party.read(task)
                    await party.work(task)
                    assert task in party.epochs
    await check(real, parties, sum(event.type == "outage.commit_rejected" for event in reported))


async def check(real: MemoryStore, parties: dict[str, Party], refused: int) -> None:
    """Check that epochs rise, writes are under the valid claim, and acknowledged writes exist or were reported lost."""
    claims: dict[str, JsonObject] = {}
    versions: dict[Key, int] = {}
    made: dict[str, list[int]] = {name: [] for name in parties}
    position = await real.position()
    async for record in real.watch():
        for event in record.events:
            made[event.data["by"]].append(event.data["number"])
        for key, (version, value) in record.documents.items():
            assert value is not None
            assert version == versions.get(key, 0) + 1
            versions[key] = version
            task = key.id.removeprefix("r/")
            if key.kind == "claim":
                assert value["epoch"] > claims.get(task, {"epoch": 0})["epoch"]
                claims[task] = value
            else:
                assert (value["owner"], value["epoch"]) == (claims[task]["owner"], claims[task]["epoch"])
        if record.position == position:
            break
    assert made["there"] == parties["there"].made
    assert made["here"] == sorted(set(made["here"])), "in order, without repetition"
    assert len(made["here"]) == len(parties["here"].made) - refused
    assert set(made["here"]) <= set(parties["here"].made)


@example_settings(100)
@given(STEPS)
def test_any_outage_ends_in_a_valid_history(steps: list[tuple[str, ...]]) -> None:
    """First come, first served, as decided by the real store alone."""
    with TemporaryDirectory() as folder:
        anyio.run(play, steps, Path(folder) / "outage")
