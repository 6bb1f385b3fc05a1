"""Batches of tasks with equal checks, checks ahead of the queue, and recorded results."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Council
from orchestrator.domain.runs.check_results import MAX_CHECK_AGE
from orchestrator.testing.clock import ManualClock
from tests.conftest import CommandResult, Repository
from tests.waiting import wait_for

#: Fails on a tree with a file `bad*`.
GOOD = "! ls bad* 2>/dev/null"


class CheckLog:
    """A check that notes the names of the files in its tree, one line for each run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir()

    def command(self, then: str = "true") -> str:
        """Return the check, which notes its run and ends like `then`."""
        return f"echo $(ls) >> {self.folder}/runs; {then}"

    @property
    def runs(self) -> list[list[str]]:
        """The names of the files of each run's tree, in order, without those of the base."""
        file = self.folder / "runs"
        lines = file.read_text().splitlines() if file.exists() else []
        return [[name for name in line.split() if name not in {"README.md", "src"}] for line in lines]


@pytest.fixture
def log(tmp_path: Path) -> CheckLog:
    return CheckLog(tmp_path / "checks")


def queue(
    repository: Repository, log: CheckLog, names: Sequence[str], check: str | Mapping[str, Any], **settings: Any
) -> None:
    """Build a task for each file name, and end with all of them in the queue.

    They land in this order, whichever was built first. At first they can't, because of a user's change, which is
    then undone.
    """
    tasks = [{"id": f"t{at}", "prompt": f"write {name} x", "priority": -at} for at, name in enumerate(names)]
    defaults = {"checks": [check], "allow_failing_base": True, "on_checks_failed": "fail", "timeout": "60s"}
    config = repository.configure(tasks, defaults=defaults, writable=[str(log.folder)], **settings)
    readme = repository.top / "README.md"
    before = readme.read_text()
    readme.write_text("not committed\n")
    killed = repository.council("run", str(config), "--allow-deferred", failpoints=f"work.recorded=kill@{len(names)}")
    assert killed.code == -signal.SIGKILL, killed
    readme.write_text(before)


def landed(repository: Repository) -> list[str]:
    """Return the subjects of the target's first-parent history, oldest first, without the first commit."""
    return repository.git("log", "--first-parent", "--reverse", "--format=%s", "main").splitlines()[1:]


def assert_every_commit_passes(repository: Repository, check: str, folder: Path) -> None:
    """Run a check on each commit that the target pointed to."""
    for commit in repository.git("rev-list", "--first-parent", "main").split():
        repository.git("worktree", "add", "--quiet", "--detach", str(folder), commit)
        subprocess.run(["sh", "-c", check], check=True, cwd=folder, env=repository.environ)
        repository.git("worktree", "remove", "--force", str(folder))


def events(ended: CommandResult, name: str) -> list[dict[str, Any]]:
    return [line for line in ended.lines if line.get("event") == name]


async def test_batch_is_checked_once_and_lands_as_one_merge(repository: Repository, log: CheckLog) -> None:
    queue(repository, log, ["a", "b", "c"], log.command(), capacity=1, merge={"batch": 8})
    ended = repository.council("resume", "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    assert log.runs == [["a", "b", "c"]]
    assert landed(repository) == ["Land 3 tasks: t0, t1, t2"]
    assert {task["landed"] for task in ended.result["tasks"]} == {repository.git("rev-parse", "main")}
    await repository.assert_invariants()


async def test_only_the_culprit_of_a_batch_is_sent_back(repository: Repository, log: CheckLog, tmp_path: Path) -> None:
    """It is found by bisection; the others land, and each commit of the target passes."""
    names = ["a", "b", "bad", "c", "d"]
    queue(repository, log, names, log.command(GOOD), capacity=1, merge={"batch": 8, "window": 1})
    ended = repository.council("resume", "--json")
    assert ended.states == {"t0": "landed", "t1": "landed", "t2": "failed", "t3": "landed", "t4": "landed"}, ended
    assert landed(repository) == ["Land 2 tasks: t0, t1", "Land 2 tasks: t3, t4"]
    assert log.runs[0] == sorted(names)
    assert log.runs[-1] == ["a", "b", "c", "d"]
    assert len(log.runs) == 5  # the batch, two for the search, the failure once more, the rest
    assert "bad" in ended.result["tasks"][2]["reason"]
    assert_every_commit_passes(repository, GOOD, tmp_path / "verify")
    await repository.assert_invariants()


@pytest.mark.extended
async def test_task_sent_back_from_a_batch_does_not_start_from_the_task_before_it(repository: Repository) -> None:
    """That task fails its check; its work would be part of the next attempt, and fail it too."""
    tasks: list[dict[str, Any]] = [
        {"id": "bad", "prompt": "write src/bad x", "priority": 1},
        {"id": "good", "prompt": "attempt 1 write out.txt x\nwrite src/good x", "owns": ["src/**"]},
    ]
    defaults = {"checks": ["! test -e src/bad"], "on_checks_failed": "fail", "backoff": {"initial": "10ms"}}
    config = repository.configure(tasks, defaults=defaults, capacity=2, merge={"batch": 2})
    readme = repository.top / "README.md"
    before = readme.read_text()
    readme.write_text("not committed, so nothing lands\n")
    killed = repository.council("run", str(config), "--allow-deferred", failpoints="work.recorded=kill@2")
    assert killed.code == -signal.SIGKILL, killed
    readme.write_text(before)
    ended = repository.council("resume", "--json")
    assert ended.states == {"bad": "failed", "good": "landed"}, ended
    await repository.assert_invariants()


@pytest.mark.extended
async def test_queue_waits_for_a_full_batch(repository: Repository, log: CheckLog) -> None:
    """The first of two tasks waits for the second one, which is built later."""
    gate = log.folder / "gate"
    slow = f"while ! test -e {gate}; do sleep 0.02; done"
    adapters = {"sh": {"use": "command", "argv": ["sh", "{prompt_file}"]}}
    tasks = [{"id": "t0", "prompt": "touch a"}, {"id": "t1", "prompt": f"{slow}; touch b"}]
    defaults = {"checks": [log.command()], "allow_failing_base": True, "timeout": "60s"}
    merge = {"batch": 2, "wait": "1h"}
    config = repository.configure(
        tasks, adapters=adapters, defaults=defaults, writable=[str(log.folder)], capacity=2, merge=merge
    )
    child = repository.start("run", str(config), "--json")
    wait_for(lambda: '"task.queued"' in "".join(path.read_text() for path in repository.log.glob("*.jsonl")))
    gate.touch()
    child.communicate(timeout=60)
    assert child.returncode == 0
    assert log.runs == [["a", "b"]]


@pytest.mark.extended
async def test_batch_lands_task_by_task_on_request(repository: Repository, log: CheckLog) -> None:
    merge = {"batch": 8, "check_every_commit": False}
    queue(repository, log, ["a", "b"], log.command(), capacity=1, merge=merge)
    ended = repository.council("resume", "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    assert log.runs == [["a", "b"]]
    assert landed(repository) == ["Land t0", "Land t1"]


async def test_waiting_merges_are_checked_while_earlier_ones_are(repository: Repository, log: CheckLog) -> None:
    """The check of the first ends only after that of the second began, on a tree with both."""
    begun = log.folder / "begun"
    wait = f"if test -e b; then touch {begun}; else while ! test -e {begun}; do sleep 0.02; done; fi"
    queue(repository, log, ["a", "b"], log.command(wait), capacity=2)
    ended = repository.council("resume", "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    assert sorted(log.runs) == [["a"], ["a", "b"]]
    assert landed(repository) == ["Land t0", "Land t1"]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_check_ahead_of_a_failed_merge_counts_for_nothing(repository: Repository, log: CheckLog) -> None:
    """The second task passed on a tree with the first, which fails: it is checked again without it."""
    begun = log.folder / "begun"
    both = f"if test -e b && test -e bad; then touch {begun}; exit 0; fi"
    alone = f"if test -e bad; then while ! test -e {begun}; do sleep 0.02; done; exit 1; fi"
    queue(repository, log, ["bad", "b"], log.command(f"{both}; {alone}"), capacity=2)
    ended = repository.council("resume", "--json")
    assert ended.states == {"t0": "failed", "t1": "landed"}, ended
    assert log.runs[-1] == ["b"]
    assert not (repository.top / "bad").exists()
    await repository.assert_invariants()


async def test_check_that_passes_when_repeated_is_flaky(repository: Repository, log: CheckLog) -> None:
    """The task is not blamed, and both runs are recorded."""
    once = f"if test -e {log.folder}/failed; then exit 0; fi; touch {log.folder}/failed; echo unlucky; exit 1"
    queue(repository, log, ["a"], log.command(once), capacity=1)
    ended = repository.council("resume", "--json")
    assert ended.states == {"t0": "landed"}, ended
    (flaky,) = events(ended, "task.check_flaky")
    assert "unlucky" in Path(flaky["log"]).read_text()
    assert ended.result["tasks"][0]["attempts"] == 1
    assert log.runs == [["a"], ["a"]]
    (check,) = ended.result["tasks"][0]["checks"]
    assert (check["outcome"], check["source"], check["task"]) == ("flaky", "run", "t0")
    assert (check["failed_log"], check["log"]) == (flaky["log"], flaky["passed_log"])
    assert Path(check["log"]).read_text() == ""
    names = f"failed ({Path(check['failed_log']).name}), then passed ({Path(check['log']).name})"
    assert names in " ".join(repository.council("status").stdout.split())
    shown = repository.council("show", "t0").stdout
    assert "session 1: FLAKY: " in shown
    assert f"ran on {socket.gethostname()} in" in shown


@pytest.mark.extended
async def test_forgotten_check_runs_again(repository: Repository, log: CheckLog) -> None:
    """Other recorded checks are kept; a task that uses a result shows the task that ran the check."""

    def run(name: str) -> dict[str, Any]:
        """Run a task that writes the same file as the others, and return its checks by command."""
        checks, task = [log.command(), "true"], {"id": name, "prompt": "write a x"}
        defaults = {"checks": checks, "attempts": 1, "timeout": "60s"}
        config = repository.configure([task], defaults=defaults, writable=[str(log.folder)], base="start", target=name)
        ended = repository.council("run", str(config), "--json")
        assert ended.states == {name: "landed"}, ended
        return {check["command"]: check for check in ended.result["tasks"][0]["checks"]}

    repository.git("branch", "start")
    base = repository.git("rev-parse", "start")
    assert {check["source"] for check in run("first").values()} == {"run"}
    again = run("second")
    assert {(check["source"], check["task"]) for check in again.values()} == {("cache", "first")}
    listed = json.loads(repository.council("checks", "list", "--json").stdout)["checks"]
    assert len(listed) == 4  # of the base and of the merge
    assert {one["commit"] for one in listed} == {base, *(check["commit"] for check in again.values())}
    forgotten = json.loads(repository.council("checks", "forget", "--command", log.command(), "--json").stdout)
    assert [one["command"] for one in forgotten["forgotten"]] == [log.command()] * 2
    assert {check["source"] for check in run("third").values()} == {"run", "cache"}
    assert repository.council("checks", "forget", "ffffffffffffffff").code == 2
    assert repository.council("checks", "forget", "all").code == 0
    assert repository.council("checks", "list").stdout == "no recorded checks\n"


@pytest.mark.extended
async def test_check_does_not_see_the_task_that_it_runs_for(repository: Repository, log: CheckLog) -> None:
    """Its result counts for other tasks: what names a task is not in its environment."""
    check = "! env | grep -E '^COUNCIL_(RUN|TASK|ATTEMPT|PHASE|SESSION|HANDOFF)='"
    config = repository.configure([{"id": "t", "prompt": "write a x"}], defaults={"checks": [check], "attempts": 1})
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"t": "landed"}, ended


@pytest.mark.extended
async def test_commands_of_sessions_and_checks_share_their_slots(repository: Repository, log: CheckLog) -> None:
    """With one slot, none of them overlap."""
    alone = f"mkdir {log.folder}/one || touch {log.folder}/overlap; sleep 0.3; rmdir {log.folder}/one"
    script = f"council slot -- sh -c '{alone}; exit 7'; test $? = 7 && touch $COUNCIL_TASK"
    config = repository.configure(
        [{"id": name, "prompt": script} for name in ("a", "b", "c")],
        adapters={"sh": {"use": "command", "argv": ["sh", "{prompt_file}"]}},
        defaults={"checks": [alone], "attempts": 1, "timeout": "60s"},
        writable=[str(log.folder)],
        capacity=3,
        checks_capacity=1,
    )
    ended = repository.council("run", str(config), "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    assert not (log.folder / "overlap").exists()


@pytest.mark.extended
async def test_failed_tests_of_a_report_are_named(repository: Repository, log: CheckLog) -> None:
    """In the reason, in `show` and in the next prompt; a committed report and a link to one count for nothing."""
    secret = log.folder / "secret.xml"
    report = '<testsuite><testcase classname="tests.test_a" name="{}"><failure/></testcase></testsuite>'
    secret.write_text(report.format("test_secret"))
    write = f"echo '{report.format('test_sum')}' > build/junit.xml"
    check = {
        "run": f"mkdir -p build; if test -e a2; then exit 0; elif test -e link; then ln -sf {secret} build/junit.xml;"
        f" elif test -e a1; then {write}; fi; exit 1",
        "report": "build/junit.xml",
    }
    repository.commit({"build/junit.xml": report.format("test_committed")}, "a report")
    steps = "\n".join(f"attempt {n} write {name} x" for n, name in enumerate(("a0", "a1", "link", "a2"), start=1))
    config = repository.configure(
        [{"id": "t", "prompt": f"keep-prompt\n{steps}"}],
        defaults={"checks": [check], "attempts": 4, "allow_failing_base": True},
        writable=[str(log.folder)],
    )
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"t": "landed"}, ended
    reasons = [event["reason"] for event in events(ended, "task.retrying")]
    assert ["failed tests: tests.test_a.test_sum" in reason for reason in reasons] == [False, True, False]
    details = json.loads(repository.council("show", "t", "--json").stdout)
    tests = [check["failed_tests"] for one in details["sessions"] for check in one["checks"]]
    assert tests == [[], ["tests.test_a.test_sum"], [], []]
    assert "tests.test_a.test_sum" in repository.council("show", "t").stdout
    prompts = [Path(one["log"]).read_text() for one in details["sessions"]]
    assert ["tests.test_a.test_sum" in prompt for prompt in prompts] == [False, False, True, False]


@pytest.mark.extended
async def test_passed_check_is_not_repeated_in_another_run(repository: Repository, log: CheckLog) -> None:
    """A recorded result counts for the same tree, command and variables only."""

    def run(**environment: str) -> int:
        """Run the checks of the base, and return how often the check has run so far."""
        task = {"id": "t", "prompt": "print hello"}  # changes nothing, so only the base is checked
        defaults = {"checks": [log.command()], "checks_env": ["MODE"], "attempts": 1, "timeout": "60s"}
        config = repository.configure([task], defaults=defaults, writable=[str(log.folder)])
        repository.environ.update(environment)
        ended = repository.council("run", str(config), "--json")
        assert ended.states == {"t": "no_change"}, ended
        return len(log.runs)

    assert run(MODE="one") == 1
    assert run(MODE="one") == 1
    assert run(MODE="two") == 2
    repository.commit({"new.txt": "x"}, "another tree")
    assert run(MODE="two") == 3
    async with Council.open(repository.top, environ=repository.environ) as council:
        assert [check.record.command for check in await council.checks.list()] == [log.command()] * 3
    later = ManualClock(time.time() + MAX_CHECK_AGE)
    async with Council.open(repository.top, environ=repository.environ, clock=later) as council:
        assert await council.checks.list() == []  # the periodic maintenance deletes expired documents


@pytest.mark.extended
async def test_check_without_a_cache_runs_for_each_landing(repository: Repository, log: CheckLog) -> None:
    """Also if the base has the same files; the run of a check ahead of its turn counts for that turn."""
    task = {"id": "t", "prompt": "print hello"}
    defaults = {"checks": [{"run": log.command(), "cache": False}], "attempts": 1, "timeout": "60s"}
    config = repository.configure([task], defaults=defaults, writable=[str(log.folder)])
    for number in (1, 2):
        assert repository.council("run", str(config), "--json").states == {"t": "no_change"}
        assert len(log.runs) == number


@pytest.mark.extended
async def test_changed_user_file_invalidates_a_recorded_result(repository: Repository, log: CheckLog) -> None:
    """Files of `worktrees.copy` are part of what a check sees."""
    (repository.top / ".gitignore").write_text("local.ini\n")
    repository.commit({".gitignore": "local.ini\n"}, "ignore")

    def run(content: str) -> int:
        file = repository.top / "local.ini"
        if not file.exists() or file.read_text() != content:
            file.write_text(content)
        defaults = {"checks": [log.command()], "attempts": 1, "timeout": "60s"}
        config = repository.configure(
            [{"id": "t", "prompt": "print hello"}],
            defaults=defaults,
            writable=[str(log.folder)],
            worktrees={"copy": ["local.ini"]},
        )
        assert repository.council("run", str(config), "--json").states == {"t": "no_change"}
        return len(log.runs)

    assert (run("a"), run("a"), run("bb")) == (1, 1, 2)


@pytest.mark.parametrize(
    "failpoint",
    [
        "landing.joined",
        *(
            pytest.param(one, marks=pytest.mark.extended)
            for one in ("landing.checking", "check.leased", "check.recorded")
        ),
        *(pytest.param(one, marks=pytest.mark.extended) for one in ("landing.checked", "landing.pushed")),
        *(pytest.param(one, marks=pytest.mark.extended) for one in ("landing.intended", "landing.recorded")),
    ],
)
async def test_checked_batch_killed_at_a_failpoint_lands_once(
    repository: Repository, log: CheckLog, failpoint: str
) -> None:
    queue(repository, log, ["a", "b", "bad", "c"], log.command(GOOD), capacity=2, merge={"batch": 4})
    assert repository.council("resume", failpoints=f"{failpoint}=kill").code == -signal.SIGKILL
    ended = repository.council("resume", "--json")
    assert ended.states == {"t0": "landed", "t1": "landed", "t2": "failed", "t3": "landed"}, ended
    files = repository.git("ls-tree", "--name-only", "main").split()
    assert files == ["README.md", "a", "b", "c", "src"]
    await repository.assert_invariants()
