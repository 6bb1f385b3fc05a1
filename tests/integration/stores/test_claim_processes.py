"""Many processes claim from one queue in a store: each task runs once, even if processes are killed or stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path

import anyio
import pytest

from orchestrator.locking.claims import claim_key
from orchestrator.protocols import CommitRecord, JsonObject, Key, Store
from orchestrator.state.documents.log_reader import read_range
from tests.claim_history import ClaimHistory
from tests.integration.stores import claim_worker
from tests.integration.stores.claim_worker import RUN, work_key
from tests.store_kinds import SERVERS, empty_state
from tests.stores import open_store

WORKER = Path(claim_worker.__file__)
PATIENCE = 90.0


@contextmanager
def started(state: str, locks: Path, patience: float, *faults: str) -> Iterator[subprocess.Popen[str]]:
    """Start one process per fault, and end all of them afterwards."""
    locks.mkdir()
    argv = [sys.executable, str(WORKER), state, str(locks), str(patience), *faults]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


async def is_taken_over(store: Store, task: str, pid: int) -> None:
    """Wait until another process has the claim of a process."""
    had = False
    with anyio.fail_after(PATIENCE):
        async with aclosing(store.watch()) as records:
            async for record in records:
                _, claim = record.documents.get(claim_key(RUN, task), (0, None))
                if claim is not None:
                    if had and claim["owner"]["pid"] != pid:
                        return
                    had = claim["owner"]["pid"] == pid


def authorship(key: Key, value: JsonObject) -> tuple[str, int, str] | None:
    """Return the claim under which a result was recorded."""
    return (key.id, value["epoch"], value["by"]) if key.kind == "work" else None


def check(records: list[CommitRecord], tasks: int) -> ClaimHistory:
    """Check that each task ran once, by its owner, and that each claim has the process that it names."""
    history, done = ClaimHistory(authorship), Counter[Key]()
    for record in records:
        history.add(record)
        done.update(key for key in record.documents if key.kind == "work")
        author = int(record.writer.rpartition(":")[2])
        for key in record.documents:
            assert key.kind != "claim" or history.claims[key.id].owner.pid == author
    assert not history.violations
    assert done == {work_key(f"t{number:04}"): 1 for number in range(tasks)}
    assert {claim.released for claim in history.claims.values()} == {"complete"}
    return history


FEW = ["none", "kill@7"]
SOME = ["none", "kill@5", "stop@5", "none", "kill@11", "none", "stop@3", "none"]
MANY = [*SOME, *SOME, *SOME, *SOME]


@pytest.mark.parametrize(
    ("kind", "faults", "tasks", "patience"),
    [
        pytest.param("file", FEW, 150, 2.0, id="file-two"),
        pytest.param("postgres", FEW, 60, 2.0, id="postgres-two"),
        pytest.param("redis", FEW, 60, 2.0, id="redis-two", marks=pytest.mark.extended),
        pytest.param("postgres", ["none", "group@7"], 60, 2.0, id="postgres-group", marks=pytest.mark.extended),
        *(
            pytest.param(kind, SOME, 300, 2.0, id=f"{kind}-eight", marks=pytest.mark.slow)
            for kind in ("file", *SERVERS)
        ),
        *(
            pytest.param("file", faults, 5_000, 10.0, id=name, marks=[pytest.mark.slow, pytest.mark.timeout(900)])
            for faults, name in ((FEW, "file-two-long"), (SOME, "file-eight-long"), (MANY, "file-thirty-two-long"))
        ),
    ],
)
async def test_every_task_of_a_shared_queue_is_done_once(
    tmp_path: Path, kind: str, faults: list[str], tasks: int, patience: float
) -> None:
    """Killed processes are taken over at once, stopped ones in time; late writes of these are rejected."""
    state, locks = empty_state(kind, tmp_path / "state"), tmp_path / "locks"
    await claim_worker.seed(state, str(tasks))
    said = list[list[str]]()
    async with open_store(state) as store:
        with started(state, locks, patience, *faults) as process:
            assert process.stdout is not None
            lines = anyio.wrap_file(process.stdout)
            async for line in lines:
                said.append(line.split(maxsplit=3))
                match said[-1]:
                    case [_, "stop", task, pid]:
                        await is_taken_over(store, task, int(pid))
                        os.kill(int(pid), signal.SIGCONT)
            assert process.wait() == 0
        history = check([record async for record in read_range(store, 0, await store.position())], tasks)
    killed, stopped = [[one for one in said if one[1] in kinds] for kinds in (("kill", "group"), ("stop",))]
    expected = Counter(fault.partition("@")[0] for fault in faults)
    assert (len(killed), len(stopped)) == (expected["kill"] + expected["group"], expected["stop"])
    for number, _, task, _ in stopped:
        assert [number, "refused", task] in said
        (why,) = [" ".join(one[2:]) for one in said if one[:2] == [number, "fenced"]][:1]
        assert "took over: no heartbeat for" in why
    assert history.takeovers >= len(killed) + len(stopped)
    assert sum(int(one[2]) for one in said if one[1] == "done") <= tasks
