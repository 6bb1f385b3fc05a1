"""Three machines finish one queue, whatever happens to one of them, to the remote and to the store."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import CommandResult
from tests.machines import Cluster, signal_machine, work
from tests.store_kinds import Server
from tests.waiting import wait_for


@pytest.mark.extended
@pytest.mark.parametrize("count", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_three_machines_finish_one_queue(cluster: Cluster, server: Server, tmp_path: Path, count: int) -> None:
    """One is lost, one suspended until others have taken its work, and the remote and the store are gone for a while.

    Each task lands exactly once, each commit of the target has passed the check, and nothing is left anywhere.
    """
    machines = [cluster.machine(name) for name in ("first", "second", "third")]
    first, second, third = machines
    tasks = [
        {
            "id": f"t{one}",
            "prompt": f"pause 0.3\nwrite t{one}.txt {one}\nappend s{one % 4}.txt {one}",
            "owns": [f"t{one}.txt", f"s{one % 4}.txt"],
            "checks": ["sh -c 'test ! -e broken.txt'"],
            **({"needs": [f"t{one - 6}"]} if one >= 6 and one % 3 == 0 else {}),
        }
        for one in range(count)
    ]
    children = [first.start("run", cluster.configure(first, *tasks, capacity=2), "--json")]
    wait_for(cluster.attempts)
    children += [work(machine, cluster) for machine in (second, third)]

    def landed() -> int:
        return int(cluster.git("rev-list", "--first-parent", "--count", "main")) - 1

    wait_for(lambda: landed() >= count // 6)
    signal_machine(second, signal.SIGKILL)
    children[1].communicate()
    second.top.parent.rename(tmp_path / "lost")
    wait_for(lambda: landed() >= count // 4)
    signal_machine(third, signal.SIGSTOP)
    time.sleep(2 * 1.5)
    signal_machine(third, signal.SIGCONT)
    gone = tmp_path / "gone.git"
    cluster.remote.rename(gone)
    time.sleep(20 if count > 20 else 4)
    gone.rename(cluster.remote)
    server.kill()
    time.sleep(1)
    server.start()
    reports = [CommandResult.of(children[0]), CommandResult.of(children[2])]
    late = [work(third, cluster)] if reports[1].code else []  # fenced after its suspension
    reports += [CommandResult.of(child) for child in late]
    final = third.council("status", "--state", cluster.store, "--json")
    assert Counter(final.states.values()) == {"landed": count}, [report.stderr for report in reports]
    trailers = cluster.git("log", "--format=%(trailers:key=Council-Task,valueonly)", "main").split()
    assert sorted(line.rpartition("/")[2] for line in trailers) == sorted(f"t{one}" for one in range(count))
    assert sorted(cluster.git("show", "main:s0.txt").split(), key=int) == [str(one) for one in range(0, count, 4)]
    assert cluster.shared() == []
    for machine in (first, third):
        assert not [*Path(machine.environ["COUNCIL_HOME"]).glob("*/sessions/*/*")]
