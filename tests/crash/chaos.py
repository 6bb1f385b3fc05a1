"""Random work under random faults, verified by git, the log and /proc: `python -m tests.crash.chaos SEED`.

The seed determines the workload and the faults but not their timing, so a repeated seed gives a similar trial, not the
same steps. Everything is in one folder, on a small file system of its own where possible (`unshare`), so that it can
be filled.
"""

# ruff: noqa: T201 - a program that prints its findings

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import anyio

from tests.conftest import CommandResult, Repository, hermetic_environ
from tests.crash.judge import Judge, RunProcess, UserCommit, find_processes
from tests.crash.workload import Workload, make_workload

#: Seconds for a run to end after the last fault.
END_TIMEOUT = 120.0
#: Marks processes of the user, which get no faults.
USER_MARKER = "CHAOS_USER=1"
#: Set where mounts belong to this process only.
INSIDE_VARIABLE = "CHAOS_INSIDE"
DISK_BYTES = 96 << 20
#: Let a hanging program print its tasks and threads.
_DEBUGGING = {"PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(Path(__file__).parent / "task_stacks")}
#: Process kinds to kill and stop, with weights.
KINDS = {"orchestrator": 2, "git": 4, "session": 2, "supervisor": 2, "bwrap": 1, "check": 1}
ACTIVE = ("run", "resume", "work")
#: Final statuses caused by a person, in the order in which they can be retried.
_GIVEN_UP = ("cancelled", "blocked")
#: The same after a restore: it restores work built before other work on the same paths landed.
_RESTORED = (*_GIVEN_UP, "conflict")
_OVER = {"landed", "incomplete"}


class RunningCommand(threading.Thread):
    """A command whose output is read while it runs."""

    def __init__(self, repository: Repository, *arguments: str) -> None:
        super().__init__(daemon=True)
        self.name, self.began = " ".join(arguments), time.monotonic()
        self._command = repository.start(*arguments)
        self.pid = self._command.pid
        self.ended: CommandResult | None = None
        self.start()

    def run(self) -> None:
        """Read all of its output."""
        out, err = self._command.communicate()
        self.ended = CommandResult(int(self._command.returncode), out, err)


class CommittingUser(threading.Thread):
    def __init__(self, repository: Repository, dice: random.Random) -> None:
        super().__init__(daemon=True)
        self._repository, self._dice = repository, dice
        self._environ = {**repository.environ, **dict([USER_MARKER.split("=")])}
        self._environ |= {f"GIT_{who}_{what}": "User" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        self.commits: list[UserCommit] = []
        self.done = threading.Event()
        self.problem = ""

    def run(self) -> None:
        """Commit at random intervals."""
        number = 0
        while not self.done.wait(self._dice.expovariate(1.5)):
            number += 1
            self._commit(number)

    def _commit(self, number: int) -> None:
        path, message = f"user/{number}.txt", f"user {number}"
        own = [one for one in self.commits if one.deleted is None and any(map(self._is_there, one.added))]
        kind = self._dice.choice(["add", "add", "edit", "share", "delete"])
        if kind in {"edit", "delete"} and own:
            path = next(iter(self._dice.choice(own).added))
        elif kind == "share":
            path = f"shared/{self._dice.randrange(3)}.txt"
        is_gone = kind == "delete" and bool(own) and path.startswith("user/") and self._is_there(path)
        file = self._repository.top / path
        options = [] if self._dice.random() < 0.5 else ["--only", path]
        staging = ["rm", "-q", "--ignore-unmatch"] if is_gone else ["add"]
        deadline = time.monotonic() + END_TIMEOUT
        while time.monotonic() < deadline:
            with suppress(OSError):
                if is_gone:
                    file.unlink(missing_ok=True)
                else:
                    file.parent.mkdir(exist_ok=True)
                    if not file.exists() or message not in file.read_text().splitlines():
                        with file.open("a") as opened:
                            opened.write(f"{message}\n")
                if not self._git(*staging, "--", path):
                    self._git("commit", "-q", "-m", message, *options)
                # On a full disk git may fail after the commit.
                if not self._git("log", "-9", "--format=%s") and message in self._said.splitlines():
                    self.commits.append(
                        UserCommit(message, {} if is_gone else {path: message}, path if is_gone else None)
                    )
                    return
            time.sleep(0.05)
        self._git("commit", "--dry-run", "--short", *options)
        self.problem = f"the user could not commit {path}: {self._said}"

    def _is_there(self, path: str) -> bool:
        return path.startswith("user/") and (self._repository.top / path).exists()

    def _git(self, *arguments: str) -> int:
        done = subprocess.run(
            ["git", *arguments],
            cwd=self._repository.top,
            env=self._environ,
            check=False,
            capture_output=True,
            text=True,
        )
        self._said = done.stderr + done.stdout
        return done.returncode


class ChaosTrial:
    """One run with its workload, faults and outcome."""

    def __init__(self, seed: int, root: Path, *, seconds: float, most: int, has_disk: bool) -> None:
        self.seed, self.root = seed, root
        self._dice = random.Random(f"{seed} faults")
        self._seconds, self._has_disk = seconds, has_disk
        self._began = time.monotonic()
        self.trace: list[str] = []
        self.findings: list[str] = []
        self.counts: Counter[str] = Counter()
        self.commands: list[RunningCommand] = []
        self._frozen: dict[int, float] = {}
        self._has_restored = False
        self.repository = Repository(
            root / "project", {**hermetic_environ(root), **_DEBUGGING}, root / "ledger" / "spawns"
        )
        for folder in (self.repository.top, self.repository.spawns.parent):
            folder.mkdir()
        self.workload: Workload = make_workload(
            random.Random(f"{seed} work"), str(self.repository.spawns.parent), most=most
        )
        self.repository.git("init", "--quiet", "--initial-branch=main")
        self._start = self.repository.commit({"README.md": "# Project\n", **self.workload.files}, "first")
        jobs = [job.entry for job in self.workload.jobs.values()]
        self._config = self.repository.configure(jobs, **self.workload.settings)
        self._user = CommittingUser(self.repository, random.Random(f"{seed} user"))

    def note(self, what: str) -> None:
        """Add a line to the trial's log."""
        self.trace.append(f"{time.monotonic() - self._began:6.2f} {what}")

    def run(self) -> list[str]:
        """Inject faults, then let the run end; return the findings."""
        self._user.start()
        self._begin("run", str(self._config))
        if self._dice.random() < 0.8:  # the first seconds are the same in all runs
            self._wait_for_work()
        end = time.monotonic() + self._dice.uniform(0.4, 1) * self._seconds
        actions = self._actions()
        while time.monotonic() < end:
            time.sleep(min(self._dice.expovariate(12), 0.4))
            self._thaw(time.monotonic())
            self._keep_going()
            self._dice.choices(list(actions), list(actions.values()))[0]()
        self._thaw(math.inf)
        self._user.done.set()
        # The index stays locked after a killed landing until a resume.
        deadline = time.monotonic() + END_TIMEOUT
        while self._user.is_alive() and time.monotonic() < deadline:
            self._keep_going()
            self._user.join(0.5)
        if self._user.problem:
            self.findings.append(self._user.problem)
        self._settle()
        return self.findings

    def _wait_for_work(self) -> None:
        while self._active() and not self.repository.spawns.exists():
            time.sleep(0.02)

    def _actions(self) -> dict[Callable[[], None], int]:
        disk = {self._fill: 1} if self._has_disk else {}
        restores = self._dice.choice([2, 2, 12])
        return {
            self._kill: 10,
            self._freeze: 4,
            self._join: 3,
            self._look: 2,
            self._steer: 2,
            self._go_back: restores,
            **disk,
        }

    def _processes(self) -> list[RunProcess]:
        commands = {one.pid for one in self.commands if one.ended is None}
        return list(find_processes(self.root, commands, USER_MARKER.encode()))

    def _victim(self) -> RunProcess | None:
        """Return a process of a random kind; wait briefly for one, since git processes are short-lived."""
        (kind,) = self._dice.choices(list(KINDS), list(KINDS.values()))
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            if found := [one for one in self._processes() if one.kind == kind]:
                return self._dice.choice(found)
        return None

    def _kill(self) -> None:
        if (one := self._victim()) is not None:
            self._signal(one, signal.SIGKILL)

    def _freeze(self) -> None:
        if (one := self._victim()) is not None:
            self._frozen[one.pid] = time.monotonic() + self._dice.choice([0.1, 0.5, 3.0])
            self._signal(one, signal.SIGSTOP)

    def _signal(self, one: RunProcess, number: signal.Signals) -> None:
        self.counts[f"{number.name} {one.kind}"] += 1
        self.note(f"{number.name} {one.kind} {one.pid}")
        with suppress(ProcessLookupError):
            os.kill(one.pid, number)

    def _thaw(self, until: float) -> None:
        for pid in [pid for pid, when in self._frozen.items() if when <= until]:
            del self._frozen[pid]
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _begin(self, *arguments: str) -> RunningCommand:
        one = RunningCommand(self.repository, *arguments)
        self.note(f"council {one.name} is {one.pid}")
        self.commands.append(one)
        return one

    def _active(self) -> list[RunningCommand]:
        return [one for one in self.commands if one.ended is None and one.name.startswith(ACTIVE)]

    def _keep_going(self) -> None:
        if not self._active():
            self._begin(*(("resume",) if self._has_run() else ("run", str(self._config))))

    def _has_run(self) -> bool:
        if not any((self.repository.top / ".council").glob("logs/*/")):
            return False
        ended = self._ask("status")
        if ended.code == 2 and not any(what in ended.stderr for what in ("there is no run", "council has not run")):
            self.findings.append(f"`council status` printed {ended.stdout} {ended.stderr}")
        return ended.code != 2

    def _ask(self, *arguments: str) -> CommandResult:
        """Run a command that a stopped process may delay, and continue that process after a while."""
        thaw = threading.Timer(5, self._thaw, (math.inf,))
        thaw.start()
        try:
            return self.repository.council(*arguments)
        finally:
            thaw.cancel()

    def _join(self) -> None:
        if len(self._active()) < 3:
            self._begin("work")

    def _look(self) -> None:
        self._begin(
            *self._dice.choice([("status",), ("salvage", "list"), ("checkpoint", "create"), ("locks",), ("runs",)])
        )

    def _steer(self) -> None:
        task = self._dice.choice(sorted(self.workload.jobs))
        choices = [["cancel", task], ["retry", task], ["retry", task, "--from", "plan"]]
        self._begin(*self._dice.choice(choices))

    def _go_back(self) -> None:
        """Restore a checkpoint of the run, or create the first one."""
        listed = self._ask("checkpoint", "list", "--json")
        found = [one["id"] for one in listed.result["checkpoints"]] if listed.code == 0 else []
        if found and self._dice.random() < 0.6:
            self._has_restored = True
            self._begin("checkpoint", "restore", self._dice.choice(found), "--force")
        else:
            self._begin("checkpoint", "create", *self._dice.sample(["--all"], self._dice.random() < 0.2))

    def _fill(self) -> None:
        filler = self.root / "filler"
        self.note("the disk is full")
        self.counts["disk full"] += 1
        try:
            with filler.open("wb") as file:
                while file.write(bytes(1 << 20)):
                    file.flush()
        except OSError:
            pass
        time.sleep(self._dice.choice([0.1, 0.5, 1.5]))
        filler.unlink()
        self.note("the disk has room")

    def _settle(self) -> None:
        """Wait for running commands, then resume until the run ended, and judge it."""
        self.note("no more faults")
        began = time.monotonic()
        if not self._has_run() and not self._active():
            self._begin("run", str(self._config))
        for one in self.commands:
            one.join(max(began + END_TIMEOUT - time.monotonic(), 0))
        if not self._has_run():  # it was killed before it recorded anything
            self._wait(began, "run", str(self._config))
        self._resume(began)
        while (again := self._given_up()) and time.monotonic() < began + END_TIMEOUT:
            self._wait(began, "retry", *again)
            self._wait(began, "resume")
            self._resume(began)
        self.note("over")
        hanging = [one.name for one in self.commands if one.ended is None]
        if hanging or not self._is_finished():
            self.findings.append(f"not over {END_TIMEOUT:.0f} s after the last fault: {hanging} {self._processes()}")
            self._abort()
            self.end()
            for one in self.commands:
                one.join(5)
                if one.name in hanging and one.ended is not None:
                    self.findings.append(f"what `council {one.name}` printed: {one.ended.stdout} {one.ended.stderr}")
            return
        deadline = time.monotonic() + 5
        while (left := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if left:
            self.findings.append(f"left running: {left}")
        ended = [(one.name, one.ended) for one in self.commands if one.ended is not None]
        judge = Judge(self.repository, self.workload, self._start, self._user.commits, ended)
        self.findings += anyio.run(judge.findings)

    def _wait(self, began: float, *arguments: str) -> None:
        self._begin(*arguments).join(max(began + END_TIMEOUT - time.monotonic(), 0))

    def _is_finished(self) -> bool:
        ended = self.repository.council("status", "--json")
        return ended.code in {0, 1} and ended.result["status"] in _OVER

    def end(self) -> None:
        """Kill all remaining processes."""
        for one in self._processes():
            with suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)

    def _abort(self) -> None:
        """Abort a hanging process so that it prints the stacks of its tasks and threads; log its threads."""
        hanging = [one for one in self.commands if one.ended is None]
        for one in hanging:
            with suppress(OSError):
                threads = [(task / "comm").read_text().strip() for task in Path(f"/proc/{one.pid}/task").iterdir()]
                self.findings.append(f"threads of `council {one.name}`: {threads}")
                os.kill(one.pid, signal.SIGUSR2)
                one.join(2)
                os.kill(one.pid, signal.SIGABRT)
        for one in hanging:
            one.join(5)

    def _resume(self, began: float) -> None:
        while not self._is_finished() and time.monotonic() < began + END_TIMEOUT:
            self._wait(began, *(("resume",) if self._has_run() else ("run", str(self._config))))

    def _given_up(self) -> list[str]:
        """Return required tasks that were cancelled or are blocked by cancelled ones."""
        ended = self.repository.council("status", "--json")
        if "tasks" not in ended.result:
            self.findings.append(f"`council status` printed {ended.result}")
            return []
        states = ended.states
        jobs = self.workload.jobs.items()
        statuses = _RESTORED if self._has_restored else _GIVEN_UP
        found = [[task for task, job in jobs if job.must_land and states.get(task) == one] for one in statuses]
        return next(filter(None, found), [])


def report(trial: ChaosTrial, seconds: float) -> str:
    """Return the log and findings of a trial as text."""
    counts = ", ".join(f"{times} {what}" for what, times in sorted(trial.counts.items()))
    lines = [
        f"seed {trial.seed}: {len(trial.workload.jobs)} tasks, {seconds:.1f} s, {len(trial.findings)} findings",
        f"  sandbox {trial.workload.settings['sandbox']}; {counts}",
        *(f"  FINDING {one}" for one in trial.findings),
    ]
    if trial.findings:
        ended = [(one.name, one.ended) for one in trial.commands if one.ended and one.ended.code not in {0, -9}]
        lines += (f"  {one}" for one in trial.trace)
        lines += (f"  council {name}: {one.code} {one.stdout[-600:]}{one.stderr[-600:]}" for name, one in ended)
    return "\n".join(lines)


def run_trial(seed: int, given: argparse.Namespace) -> bool:
    """Run a trial in its own folder and print its report; return whether it has no findings."""
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(root)]
    has_disk = INSIDE_VARIABLE in os.environ and not subprocess.run(mount, check=False).returncode
    began = time.monotonic()
    trial = ChaosTrial(seed, root, seconds=given.seconds, most=given.most, has_disk=has_disk and not given.no_disk)
    findings = trial.run()
    print(report(trial, time.monotonic() - began), flush=True)
    if findings and given.keep:
        shutil.copytree(root, given.keep / str(seed), symlinks=True, dirs_exist_ok=True)
    trial.end()
    if has_disk:
        subprocess.run(["umount", "--lazy", str(root)], check=True)
    shutil.rmtree(root, ignore_errors=True)
    return not findings


def main() -> None:
    """Run trials in sequence; the exit code is 1 with any finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.chaos")
    parser.add_argument("seeds", type=int, nargs="+", help="what the trials follow from")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long faults happen at most")
    parser.add_argument("--most", type=int, default=30, help="tasks at most")
    parser.add_argument("--no-disk", action="store_true", help="never fill the disk")
    parser.add_argument("--keep", type=Path, help="a folder for copies of trials with findings")
    given = parser.parse_args()
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if INSIDE_VARIABLE not in os.environ:
        if shutil.which("unshare") and not subprocess.run([*alone, "true"], check=False).returncode:
            command = [*alone, sys.executable, "-m", "tests.crash.chaos", *sys.argv[1:]]
            os.execvpe(command[0], command, {**os.environ, INSIDE_VARIABLE: "1"})
        print("no file system of its own (`unshare --user --mount` fails): the disk is never full")
    sys.exit(not min([run_trial(seed, given) for seed in given.seeds]))


if __name__ == "__main__":
    main()
