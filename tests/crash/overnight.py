"""A night's work: tasks of all kinds with their expected ends, and an operator.

The scripted agents make every end independent of the time of a kill: one-time actions are noted outside of the
worktree, and interrupted attempts do not count.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from orchestrator.api.council import Council
from orchestrator.errors import RefusedError
from tests.conftest import FAKE_CLI, CommandResult, Repository

#: The fixed base of all work; the target also changes `CONFLICT_FILE`.
BASE, CONFLICT_FILE = "dev", "both.txt"
#: Secrets detected by variable name and by form.
CANARIES = {"CANARY_TOKEN": "canary-value-0451-xyz", "HARMLESS": "ghp_" + "Canary0451" * 4}
FAIL_ON_CHECKS = {"on_checks_failed": "fail"}


@dataclass(frozen=True)
class NightTask:
    """A task with its agent's script, its expected end (state, failure class), and more keys of its entry."""

    prompt: str
    ends: tuple[str, str | None] = ("landed", None)
    entry: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RivalTasks:
    """Tasks of which exactly one lands, depending on the order."""

    jobs: Mapping[str, NightTask]
    loser: tuple[str, str | None]


@dataclass(frozen=True)
class ProjectTests:
    """A project's test command, and a test file for a name and an assertion."""

    check: str
    folder: str
    template: str

    def write(self, name: str, claim: str = "True") -> str:
        """Return the step that writes a test."""
        return f"write {self.folder}/test_{name}.py {self.template.format(name=name, claim=claim)}"


#: Only the standard library, for repositories without dependencies.
UNITTEST = ProjectTests(
    f"{sys.executable} -S -m unittest -q",
    ".",
    "import unittest; T = type('T', (unittest.TestCase,), dict(test_{name}=lambda self: self.assertTrue({claim})))",
)
PYTEST = ProjectTests(
    f"PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=src:. {sys.executable}"
    " -m pytest -q -x -p no:cacheprovider testing",
    "testing",
    "test_{name} = lambda: None if {claim} else 1 / 0",
)


def few_tasks(suite: ProjectTests, ledger: Path) -> tuple[dict[str, NightTask], list[RivalTasks]]:
    """Return the most important kinds."""
    jobs = {
        "first": NightTask(suite.write("first")),
        "second": NightTask(f"append log.txt second\n{suite.write('second')}", entry={"needs": ["first"]}),
        "crash-once": NightTask(f"once exit 3\n{suite.write('crash_once')}"),
        "hang": NightTask("hang", ("failed", "timeout"), {"timeout": "1s", "attempts": 1}),
        "daemon": NightTask("write own/d.txt x\ndaemon own/d.txt"),
        "breaks-once": NightTask(f"{suite.write('fixed')}\nonce {suite.write('fixed', 'False')}"),
        "conflict": NightTask(f"write {CONFLICT_FILE} agent", ("conflict", "conflict")),
        "cancelled": NightTask("write half.txt x\nhang", ("cancelled", None), {"timeout": "10m"}),
        "retried": NightTask(f"without {ledger.parent}/fixed exit 1\nwrite r.txt x", entry={"attempts": 1}),
    }  # fmt: skip
    return jobs, []


def many_tasks(suite: ProjectTests, ledger: Path, outside: Path) -> tuple[dict[str, NightTask], list[RivalTasks]]:
    """Return forty tasks of all kinds."""
    jobs, _ = few_tasks(suite, ledger)
    never = {"attempts": 1}
    jobs["third"] = NightTask(f"append log.txt third\n{suite.write('third')}", entry={"needs": ["second"]})
    for n in range(2):
        jobs[f"side-{n}"] = NightTask(
            suite.write(f"side_{n}"), entry={"priority": n - 1, "checks": [suite.check, "true"]}
        )
        jobs[f"owner-{n}"] = NightTask(f"append shared.txt {n}", entry={"owns": ["shared.*"]})
    jobs |= {
        "idle": NightTask("print nothing to do", ("no_change", "no_change")),
        "idle-once": NightTask("once exit 0\nwrite io.txt x", entry={"retry_on": ["no_change", "crashed"]}),
        "crashes": NightTask("write c.txt x\nexit 3", ("failed", "crashed"), {"attempts": 2}),
        "blocked": NightTask("write never.txt x", ("blocked", None), {"needs": ["crashes", "first"]}),
        "silent": NightTask("write s.txt x\nhang", ("failed", "idle_timeout"), {"idle_timeout": "1s", **never}),
        "stubborn": NightTask("stubborn\nwrite s.txt x\nhang", ("failed", "timeout"), {"timeout": "1s", **never}),
        "flood": NightTask("flood 67108864\nwrite flood.txt x"),
        "daemon-fails": NightTask("write d.txt x\ndaemon d.txt\nexit 1", ("failed", "crashed"), never),
        "conflict-again": NightTask(f"append {CONFLICT_FILE} again", entry={"on_conflict": "rebase"}),
        "breaks": NightTask(suite.write("bad", "False"), ("failed", "checks_failed"), FAIL_ON_CHECKS),
        "breaks-always": NightTask(suite.write("worse", "False"), ("failed", "checks_failed"), {"attempts": 2}),
        "commits": NightTask("write c1.txt x\ncommit one\nwrite c2.txt x\ncommit two\nwrite c3.txt x"),
        "other-branch": NightTask("git switch --quiet --create other\nwrite ob.txt x\ncommit there\nwrite ob2.txt x"),
        "moves-main": NightTask("write mm.txt x\ncommit it\ngit update-ref refs/heads/main HEAD"),
        "hooks": NightTask(f"write h.txt x\ncommit it\nwrite h2.txt x\nplant {ledger.parent}/planted"),
        "no-git": NightTask("write ng.txt x\nwipe .git"),
        "outside": NightTask(
            f"intrude {outside}/planted x\nintrude {outside}/.git/hooks/post-commit x\nwrite out.txt x"
        ),
        "key": NightTask("print-env CANARY_TOKEN\nprint-env HARMLESS\nwrite key.txt x"),
        "key-kept": NightTask("write good.txt x\nwrite-env leak.txt HARMLESS", ("failed", "refused")),
        "limited": NightTask("once exit 1 limit reached, again in 1 s\nwrite l.txt x", entry={"adapter": "limited"}),
        "limited-too": NightTask("write l2.txt x", entry={"adapter": "limited", "priority": -1}),
        "after-retried": NightTask("write ar.txt x", entry={"needs": ["retried"]}),
    }
    rivals = [
        RivalTasks(
            {name: NightTask(f"write rival.txt {name}") for name in ("left", "right")}, ("conflict", "conflict")
        ),
        RivalTasks(
            {
                "rename": NightTask("write nightlib.py def g(): return None", entry=FAIL_ON_CHECKS),
                "caller": NightTask(
                    f"write {suite.folder}/test_caller.py from nightlib import f as test_f", entry=FAIL_ON_CHECKS
                ),
            },
            ("failed", "checks_failed"),
        ),
    ]
    for one in rivals:
        jobs |= one.jobs
    return jobs, rivals


@dataclass(frozen=True)
class OvernightRun:
    """A repository with a night's tasks and their expected results."""

    repository: Repository
    suite: ProjectTests
    jobs: Mapping[str, NightTask]
    rivals: Sequence[RivalTasks]

    def prepare(self) -> Path:
        """Set up the repository and write the config."""
        repository = self.repository
        repository.commit({CONFLICT_FILE: "base\n", "nightlib.py": "def f(): return None\n"}, "for the night")
        repository.git("branch", BASE)
        repository.commit({CONFLICT_FILE: "target\n"}, "meanwhile on the target")
        repository.remember()
        repository.environ.update(CANARIES)
        fake = {
            "use": "command",
            "argv": [sys.executable, "-S", str(FAKE_CLI), "{prompt_file}"],
            "env": [f"FAKE_CLI_LEDGER={repository.spawns}", *CANARIES],
            "writable": [str(repository.spawns.parent)],
            "failures": {"rate_limited": r"limit reached, again in (?P<seconds>\d+) s"},
        }
        return repository.configure(
            [{"id": task, "prompt": job.prompt, **job.entry} for task, job in self.jobs.items()],
            base=BASE,
            capacity=6,
            adapters={"fake": {**fake, "capacity": 5}, "limited": {**fake, "capacity": 1}},
            defaults={
                "adapter": "fake",
                "checks": [self.suite.check],
                "backoff": {"initial": "10ms", "max": "10ms", "jitter": False},
                "timeout": "120s",
                "idle_timeout": "100s",
            },
        )

    async def assert_ended_well(self, ended: CommandResult) -> None:
        """Compare each task's end, run the project's tests on each commit of the target, check the invariants."""
        assert ended.code == 1, ended
        self._assert_ends(ended)
        self._assert_green()
        repository = self.repository
        assert not (repository.spawns.parent / "planted").exists()
        assert not (repository.top / "planted").exists()
        log = "".join(path.read_text() for path in (repository.top / ".council/state").glob("*/*.jsonl"))
        assert "repository.changed" not in log, log[log.index("repository.changed") :][:1000]
        kept = repository.council("salvage", "list", "--json").result["preserved"]
        folders = [one["name"] for one in kept if one["name"].endswith("/worktree")]
        assert {name.partition("/")[0] for name in folders} == {"key-kept"} & self.jobs.keys(), kept
        if folders:
            assert repository.council("salvage", "drop", "--yes", *folders).code == 0
        await repository.assert_invariants(canaries=list(CANARIES.values()))
        state = self._everything()
        assert repository.council("resume", "--json").code == 1
        assert self._everything() == state

    def _assert_ends(self, ended: CommandResult) -> None:
        found = {one["id"]: (one["status"], one["failure"]) for one in ended.result["tasks"]}
        wrong = {one["id"]: one for one in ended.result["tasks"]}
        for rivals in self.rivals:
            ends = Counter(found.pop(task) for task in rivals.jobs)
            assert ends == Counter([("landed", None), rivals.loser]), [wrong[task] for task in rivals.jobs]
        expected = {task: self.jobs[task].ends for task in found}
        assert found == expected, [wrong[task] for task in found if found[task] != expected[task]]

    def _assert_green(self) -> None:
        repository, place = self.repository, self.repository.top.parent / "each"
        commits = repository.git("log", "--first-parent", "--reverse", "--format=%H", f"{BASE}..main").splitlines()
        subprocess.run(["git", "clone", "--quiet", repository.top, place], check=True, env=repository.environ)
        for commit in commits:
            subprocess.run(["git", "checkout", "--quiet", commit], cwd=place, check=True, env=repository.environ)
            command = ["sh", "-c", f"exec 2>&1; {self.suite.check}"]
            tested = subprocess.run(command, check=False, cwd=place, env=repository.environ, stdout=subprocess.PIPE)
            assert tested.returncode == 0, (commit, tested.stdout)
        landed = sum(job.ends[0] == "landed" for job in self.jobs.values()) - len(self.rivals)
        assert len(commits) == 1 + landed  # the first is the one on the target alone

    def _everything(self) -> tuple[str, dict[Path, bytes]]:
        state = self.repository.log
        return self.repository.git("rev-parse", "main"), {path: path.read_bytes() for path in state.iterdir()}


class Operator(threading.Thread):
    """Fixes the cause of `retried` once it failed, then cancels `cancelled` after it landed.

    The run cannot end before that.
    """

    def __init__(self, repository: Repository) -> None:
        super().__init__()
        self._repository = repository
        self.done, self.may_cancel = threading.Event(), threading.Event()
        self._mended = False

    def run(self) -> None:
        """Repeat requests while no process accepts them."""
        while not self.done.is_set():
            states = anyio.run(read_task_states, self._repository)
            if states.get("retried") == "failed" and not self._mended:
                (self._repository.spawns.parent / "fixed").touch()
                self._mended = self._repository.council("retry", "retried").code == 0
            ready = (states.get("retried"), states.get("cancelled")) == ("landed", "running")
            if ready and self.may_cancel.is_set():
                self._repository.council("cancel", "cancelled")
            self.done.wait(0.2)


async def read_task_states(repository: Repository) -> dict[str, str]:
    """Return the task states of the newest run, none without a run."""
    try:
        async with Council.open(repository.top, environ=repository.environ) as council:
            found = await council.runs.status()
    except RefusedError:
        return {}
    return {task.id: task.status for task in found.tasks}


def is_running_elsewhere(ended: CommandResult) -> bool:
    """Return whether a command was rejected because another one is active in the run."""
    return ended.code == 2 and "is active in process" in ended.stdout


def resume_to_end(repository: Repository) -> CommandResult:
    """Resume until the run ended."""
    for _ in range(50):
        ended = repository.council("resume", "--json", timeout=400)
        if not is_running_elsewhere(ended):
            return ended
        time.sleep(0.2)
    raise AssertionError("the run stayed active elsewhere")
