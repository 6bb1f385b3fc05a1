"""Machines share a store and a remote, and nothing else: each has its own home and folder."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command_server import StartedCommand
from tests.conftest import FAKE_CLI, CommandResult, Repository
from tests.machines import Cluster, open_cluster, work
from tests.store_kinds import SERVERS
from tests.waiting import wait_for


def wait_for_machines(leader: StartedCommand) -> dict[str, str]:
    """Read events until the run can only wait for a machine; return what is missing, by task."""
    assert leader.stdout is not None
    for line in leader.stdout:
        event = json.loads(line)
        if event.get("event") == "run.waiting":
            missing: dict[str, str] = event["missing"]
            return missing
    raise AssertionError("the run has ended")


@pytest.fixture(params=["postgres", pytest.param("redis", marks=pytest.mark.extended)])
def cluster(request: pytest.FixtureRequest, repository: Repository, tmp_path: Path) -> Iterator[Cluster]:
    """Yield a remote with one commit on `main`."""
    with open_cluster(repository, SERVERS[request.param].store_url_at(tmp_path)) as made:
        yield made


def test_a_worker_needs_only_the_store(cluster: Cluster, tmp_path: Path) -> None:
    """Two machines with room for one session each run two tasks that wait for each other."""
    first, second, met = cluster.machine("first"), cluster.machine("second"), tmp_path / "ledger"
    steps = "intrude {met}/{me} here\nawait {met}/{other}\nwrite {me}.txt done"
    tasks = [{"id": me, "prompt": steps.format(met=met, me=me, other=other)} for me, other in (("a", "b"), ("b", "a"))]
    leader = first.start("run", cluster.configure(first, *tasks, capacity=1), "--json")
    wait_for(cluster.attempts)
    worker = CommandResult.of(work(second, cluster))
    report = CommandResult.of(leader)
    assert (report.code, report.states) == (0, {"a": "landed", "b": "landed"}), report.stderr
    assert worker.code == 0, worker.stderr
    assert sorted(cluster.attempts()) == ["a 1", "b 1"]
    assert cluster.git("ls-tree", "--name-only", "main").split() == ["README.md", "a.txt", "b.txt", "src"]
    assert cluster.shared() == []
    # The folder now belongs to the store: commands need no option.
    assert second.council("status", "--json").states == {"a": "landed", "b": "landed"}


def test_work_of_a_lost_machine_lands_on_another(cluster: Cluster) -> None:
    """It is at the remote before it counts as built; the lost machine's folders are not needed."""
    first, second = cluster.machine("first"), cluster.machine("second")
    config = cluster.configure(first, {"id": "one", "prompt": "write one.txt 1"})
    assert first.council("run", config, failpoints="work.recorded=kill").code == -signal.SIGKILL
    first.top.parent.rename(first.top.parent.with_name("lost"))
    assert len(cluster.shared()) == 1
    report = CommandResult.of(work(second, cluster))
    assert (report.code, report.states) == (0, {"one": "landed"}), report.stderr
    assert cluster.attempts() == ["one 1"]
    assert cluster.git("show", "main:one.txt") == "1"
    assert cluster.shared() == []


@pytest.mark.parametrize("failpoint", ["shared_work.pushed", "landing.intended", "landing.pushed"])
def test_another_machine_continues_after_a_kill(cluster: Cluster, failpoint: str) -> None:
    """The task lands once, and no ref is left at the remote."""
    first, second = cluster.machine("first"), cluster.machine("second")
    config = cluster.configure(first, {"id": "one", "prompt": "write one.txt 1"})
    assert first.council("run", config, failpoints=f"{failpoint}=kill").code == -signal.SIGKILL
    first.top.parent.rename(first.top.parent.with_name("lost"))
    report = CommandResult.of(work(second, cluster))
    assert (report.code, report.states) == (0, {"one": "landed"}), report.stderr
    assert cluster.git("show", "main:one.txt") == "1"
    trailers = cluster.git("log", "--first-parent", "--format=%(trailers:key=Council-Task,valueonly)", "main").split()
    assert len(trailers) == 1
    assert cluster.shared() == []


def test_requests_reach_sessions_on_other_machines(cluster: Cluster, tmp_path: Path) -> None:
    """A user on one machine cancels the session of another, and approves what it waits for."""
    first, second = cluster.machine("first"), cluster.machine("second")
    workflows = {"checked": [{"build": {"approve": True}}]}
    hang = {"id": "hang", "prompt": f"intrude {tmp_path}/ledger/hangs 1\nhang"}
    asks = {"id": "asks", "prompt": "write asks.txt 1", "workflow": "checked"}
    config = cluster.configure(first, hang, asks, workflows=workflows, capacity=2)
    leader = first.start("run", config, "--json")
    wait_for((tmp_path / "ledger" / "hangs").exists)
    state = ("--state", cluster.store)
    wait_for(lambda: second.council("status", *state, "--json").states["asks"] == "awaiting_approval")
    worker = work(second, cluster)
    wait_for((second.top / ".council").exists)
    assert "+++ b/asks.txt" in second.council("diff", "asks").stdout
    assert second.council("approve", "asks", "--json").code == 0
    assert second.council("cancel", "hang", "--json").code == 0
    report = CommandResult.of(leader)
    assert report.states == {"hang": "cancelled", "asks": "landed"}
    CommandResult.of(worker)


def test_a_later_phase_continues_on_another_machine(cluster: Cluster) -> None:
    """It starts from the work of the first phase, although the machine that built it is lost."""
    first, second = cluster.machine("first"), cluster.machine("second")
    workflows: dict[str, object] = {"two": [{"build": {}}, {"polish": {}}]}
    prompt = "in build write one.txt 1\nin polish append one.txt 2"
    task = {"id": "one", "prompt": prompt, "workflow": "two"}
    config = cluster.configure(first, task, workflows=workflows)
    assert first.council("run", config, failpoints="attempt.ended=kill").code == -signal.SIGKILL
    first.top.parent.rename(first.top.parent.with_name("lost"))
    report = CommandResult.of(work(second, cluster))
    assert (report.code, report.states) == (0, {"one": "landed"}), report.stderr
    assert cluster.attempts() == ["one 1", "one 2"]
    assert cluster.git("show", "main:one.txt") == "1\n2"


def test_replaced_work_at_the_remote_does_not_land(cluster: Cluster) -> None:
    """Whoever can write to the remote can't exchange recorded work: its commit is recorded in the store."""
    first, second = cluster.machine("first"), cluster.machine("second")
    config = cluster.configure(first, {"id": "one", "prompt": "write one.txt 1"})
    assert first.council("run", config, failpoints="work.recorded=kill").code == -signal.SIGKILL
    first.top.parent.rename(first.top.parent.with_name("lost"))
    [ref] = cluster.shared()
    evil = cluster.git("commit-tree", "main^{tree}", "-p", "main", "-m", "evil")
    cluster.git("update-ref", ref, evil)
    cluster.git("gc", "--quiet", "--prune=now")
    worker = work(second, cluster)
    assert worker.stdout is not None
    assert any("is not the work of task 'one'" in line for line in worker.stdout)
    worker.send_signal(signal.SIGINT)
    assert CommandResult.of(worker).states == {"one": "queued"}
    assert evil not in cluster.git("rev-list", "main")


def test_work_waits_for_the_remote(cluster: Cluster, tmp_path: Path) -> None:
    """A session that ends while the remote is gone is not lost, nor repeated, and lands afterwards."""
    first, gone = cluster.machine("first"), tmp_path / "gone.git"
    prompt = f"intrude {tmp_path}/ledger/started 1\nawait {tmp_path}/ledger/go\nwrite one.txt 1"
    child = first.start("run", cluster.configure(first, {"id": "one", "prompt": prompt}), "--json")
    wait_for((tmp_path / "ledger" / "started").exists)
    cluster.remote.rename(gone)
    (tmp_path / "ledger" / "go").touch()
    time.sleep(3)
    gone.rename(cluster.remote)
    report = CommandResult.of(child)
    assert (report.code, report.states) == (0, {"one": "landed"}), report.stderr
    assert cluster.attempts() == ["one 1"]
    assert cluster.shared() == []


def test_labels_choose_the_machine(cluster: Cluster, tmp_path: Path) -> None:
    """The machine that created the run waits for one with the label of a task, and says so once."""
    first, second = cluster.machine("first"), cluster.machine("second")
    labelled = {"id": "gpu", "prompt": "write gpu.txt 1", "labels": ["gpu"]}
    config = cluster.configure(first, {"id": "any", "prompt": "write any.txt 1"}, labelled)
    leader = first.start("run", config, "--json")
    waits = wait_for_machines(leader)
    assert "waits for a machine with the labels gpu" in first.council("status", "--json").stdout
    unlabelled = CommandResult.of(work(second, cluster))
    assert unlabelled.states == {"any": "landed", "gpu": "pending"}
    worker = CommandResult.of(work(second, cluster, "--label", "gpu"))
    report = CommandResult.of(leader)
    assert (report.code, report.states) == (0, {"any": "landed", "gpu": "landed"}), report.stderr
    assert worker.code == 0, worker.stderr
    assert waits == {"gpu": "the label gpu"}
    assert "run.waiting" not in report.stdout


def test_a_program_may_be_on_another_machine(cluster: Cluster, tmp_path: Path) -> None:
    """A run starts although a program is missing here; its tasks wait for a machine that has it."""
    first, second = cluster.machine("first"), cluster.machine("second")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "special").symlink_to(sys.executable)
    second = replace(second, environ={**second.environ, "PATH": f"{programs}{os.pathsep}{second.environ['PATH']}"})
    adapter = cluster.repository.fake_adapter(argv=["special", "-S", str(FAKE_CLI), "{prompt_file}"])
    tasks = [{"id": "one", "prompt": "write one.txt 1"}, {"id": "two", "prompt": "write two.txt 1", "adapter": "rare"}]
    readable = [sys.prefix, str(FAKE_CLI.parents[1]), str(programs)]
    adapters = {"fake": cluster.repository.fake_adapter(), "rare": adapter}
    config = cluster.configure(first, *tasks, adapters=adapters, defaults={"adapter": "fake"}, readable=readable)
    leader = first.start("run", config, "--json")
    waits = wait_for_machines(leader)
    worker = CommandResult.of(work(second, cluster))
    report = CommandResult.of(leader)
    assert (report.code, report.states) == (0, {"one": "landed", "two": "landed"}), report.stderr
    assert worker.code == 0, worker.stderr
    assert waits == {"two": "a working rare (special is not installed here)"}


def test_a_machine_that_cannot_read_the_remote_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """It can join as soon as the remote is back."""
    first, second, started = cluster.machine("first"), cluster.machine("second"), tmp_path / "ledger" / "started"
    prompt = f"intrude {started} 1\nawait {tmp_path}/ledger/go\nwrite one.txt 1"
    leader = first.start("run", cluster.configure(first, {"id": "one", "prompt": prompt}), "--json")
    wait_for(started.exists)
    gone = cluster.remote.rename(tmp_path / "gone.git")
    refused = CommandResult.of(work(second, cluster))
    assert (refused.code, "can't be read" in refused.stdout) == (2, True)
    gone.rename(cluster.remote)
    worker = work(second, cluster)
    (tmp_path / "ledger" / "go").touch()
    assert CommandResult.of(leader).states == {"one": "landed"}
    assert CommandResult.of(worker).code == 0
