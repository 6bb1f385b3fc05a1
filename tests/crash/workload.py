"""A random workload: tasks for the fake CLI, with the lines they add to files and whether they must land.

Every line names its task, so that git alone shows changes per task, repetitions and losses.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: A killed process may interrupt a session that often.
ATTEMPTS = 40
#: Prepared plans of a task: one per possible attempt.
PLANS = 12
_OWN = ("tasks/", "parts/")
APPROVE = json.dumps({"verdict": "approve", "findings": []})
WORKFLOWS = {
    "split": [{"plan": {"access": "read", "produces": "plan", "prompt": "{{ task.prompt }}", "expand": True}}],
    "reviewed": [
        {"build": {"prompt": "{{ task.prompt }}"}},
        {"review": {"access": "read", "produces": "review", "prompt": "{{ task.prompt }}"}},
    ],
}


@dataclass(frozen=True)
class WorkloadTask:
    """A task with its entry in the config, the lines it adds to files, and whether it must land."""

    entry: Mapping[str, Any]
    lines: Mapping[str, str] = field(default_factory=dict)
    must_land: bool = True

    @property
    def id(self) -> str:
        """Return its name."""
        return str(self.entry["id"])


@dataclass(frozen=True)
class Workload:
    """The tasks of a run and the options of its config."""

    jobs: Mapping[str, WorkloadTask]
    settings: Mapping[str, Any]

    @property
    def files(self) -> Mapping[str, str]:
        """Return the existing files that the tasks change."""
        return {f"{folder}/{one}.txt": "first\n" for folder in ("shared", "owned") for one in range(3)}

    def lines_for_part(self, part: str, plan: int) -> Mapping[str, str]:
        """Return the lines of a task created by the plan of an attempt."""
        task, _, own = part.partition("-")
        return part_lines(task.partition(".")[0], plan, own)


def part_lines(task: str, plan: int, part: str) -> Mapping[str, str]:
    """Return the lines of part `part` of the plan made by attempt `plan`."""
    return {f"parts/{task}.{plan}.{part}.txt": f"{task} plan {plan} part {part}"}


def make_workload(dice: random.Random, holds: str, *, most: int = 30) -> Workload:
    """Create a random workload; sessions lock their owned paths by files in the folder `holds`."""
    jobs: dict[str, WorkloadTask] = {}
    kinds = _KINDS if dice.random() < 0.7 else (_planner, _planner, _owner)  # some trials are about plans
    for number in range(round(dice.triangular(5, most, 9))):
        needs = dice.sample(sorted(jobs), 1) if jobs and dice.random() < 0.3 else []
        kind = dice.choice(kinds)
        job = kind(f"t{number}", dice, holds)
        must_land = job.must_land and all(jobs[one].must_land for one in needs)
        entry = {"attempts": ATTEMPTS, "needs": needs, "priority": dice.randint(-2, 2), **job.entry}
        jobs[job.id] = WorkloadTask(entry, job.lines, must_land)
    if dice.random() < 0.5:  # equal checks, so that tasks are checked in batches
        jobs = {task: _with_common_check(job) for task, job in jobs.items()}
    settings = {
        "capacity": dice.randint(1, 5),
        "merge": {
            "batch": dice.choice([1, 3, 8]),
            "window": dice.randint(1, 4),
            "check_every_commit": dice.random() < 0.7,
        },
        "sandbox": dice.choice(["auto", "auto", "landlock", "off"]),
        "workflows": WORKFLOWS,
        "coordination": {
            "heartbeat_interval": "300ms",
            "stale_after": "2s",
            "owner_stale_after": "4s",
            "stale_check_interval": "400ms",
            "max_retries": 99,
        },
    }
    return Workload(jobs, settings)


def _with_common_check(job: WorkloadTask) -> WorkloadTask:
    if "allow_failing_base" in job.entry:  # its check never passes
        return job
    return WorkloadTask({**job.entry, "checks": ["sleep 0.1; ! ls bad/* 2>/dev/null"]}, job.lines, job.must_land)


def _steps(dice: random.Random, *steps: str) -> str:
    return "\n".join((*([f"tick {dice.randint(1, 4)} 0.1"] * dice.randint(0, 1)), *steps))


def _adding(lines: Mapping[str, str]) -> list[str]:
    # Its files are overwritten, so that a continued conversation adds nothing twice.
    return [f"{'write' if path.startswith(_OWN) else 'append'} {path} {line}" for path, line in lines.items()]


def _plain(task: str, dice: random.Random, _holds: str) -> WorkloadTask:
    lines = {f"tasks/{task}.txt": f"{task} works"}
    return WorkloadTask({"id": task, "prompt": _steps(dice, *_adding(lines))}, lines)


def _owner(task: str, dice: random.Random, holds: str) -> WorkloadTask:
    owned = f"owned/{dice.randrange(3)}.txt"
    lines = {f"tasks/{task}.txt": f"{task} works", owned: f"{task} owns"}
    prompt = f"hold {holds}/{owned.replace('/', '-')}\n{_steps(dice, *_adding(lines))}"
    return WorkloadTask({"id": task, "prompt": prompt, "owns": [f"tasks/{task}.txt", owned]}, lines)


def _rival(task: str, dice: random.Random, _holds: str) -> WorkloadTask:
    """Return a task that may conflict with others and the user."""
    lines = {f"tasks/{task}.txt": f"{task} works", f"shared/{dice.randrange(3)}.txt": f"{task} shares"}
    again = {"attempts": 3, "on_conflict": "rebase", "retry_on": ["crashed"]}
    entry = {"id": task, "prompt": _steps(dice, *_adding(lines)), **again}
    return WorkloadTask(entry, lines, must_land=False)


def _crashing_once(task: str, dice: random.Random, holds: str) -> WorkloadTask:
    job = _plain(task, dice, holds)
    return WorkloadTask({**job.entry, "prompt": f"once exit 3\n{job.entry['prompt']}"}, job.lines)


def _failing(task: str, dice: random.Random, holds: str) -> WorkloadTask:
    prompt = f"{_plain(task, dice, holds).entry['prompt']}\nexit 3"
    return WorkloadTask({"id": task, "prompt": prompt, "attempts": dice.randint(1, 2)}, must_land=False)


def _fixing_its_checks(task: str, dice: random.Random, holds: str) -> WorkloadTask:
    job, bad = _plain(task, dice, holds), f"bad/{task}.txt"
    steps = [f"discard {bad}", f"once write {bad} x", job.entry["prompt"]]
    return WorkloadTask(
        {"id": task, "prompt": "\n".join(steps), "checks": ["sleep 0.1", f"test ! -e {bad}"]}, job.lines
    )


def _failing_its_checks(task: str, dice: random.Random, holds: str) -> WorkloadTask:
    entry = _plain(task, dice, holds).entry
    return WorkloadTask(
        {**entry, "checks": ["false"], "allow_failing_base": True, "attempts": dice.randint(1, 2)}, must_land=False
    )


def _idle(task: str, dice: random.Random, _holds: str) -> WorkloadTask:
    return WorkloadTask({"id": task, "prompt": _steps(dice, "print nothing to do"), "attempts": 2}, must_land=False)


def _hanging(task: str, dice: random.Random, _holds: str) -> WorkloadTask:
    prompt = _steps(
        dice, *dice.sample(["stubborn"], dice.randint(0, 1)), f"write tasks/{task}.txt {task} works", "hang"
    )
    return WorkloadTask({"id": task, "prompt": prompt, "timeout": "1s", "attempts": 1}, must_land=False)


def _leaving_a_process(task: str, dice: random.Random, holds: str) -> WorkloadTask:
    job = _plain(task, dice, holds)
    prompt = f"{job.entry['prompt']}\nwrite noise/{task}.txt x\ndaemon noise/{task}.txt"
    return WorkloadTask({**job.entry, "prompt": prompt}, job.lines)


def _planner(task: str, dice: random.Random, _holds: str) -> WorkloadTask:
    """Return a task with a different plan per attempt, with equal names of parts."""
    count = dice.randint(1, 3)
    plans = [f"attempt {number} hand-over {_plan(task, number, count)}" for number in range(1, PLANS + 1)]
    return WorkloadTask({"id": task, "prompt": _steps(dice, *plans), "workflow": "split"})


def _plan(task: str, number: int, count: int) -> str:
    parts = [
        {
            "id": str(one),
            "prompt": "\n".join(_adding(part_lines(task, number, str(one)))),
            "dependencies": [str(one - 1)] if one % 2 else [],
        }
        for one in range(count)
    ]
    return json.dumps({"tasks": parts, "dependencies": [], "timeline": [], "resources": []})


def _reviewed(task: str, dice: random.Random, _holds: str) -> WorkloadTask:
    lines = {f"tasks/{task}.txt": f"{task} works"}
    steps = [f"in build {one}" for one in _adding(lines)] + [f"in review hand-over {APPROVE}"]
    return WorkloadTask({"id": task, "prompt": _steps(dice, *steps), "workflow": "reviewed"}, lines)


_KINDS = (
    *([_plain, _owner, _owner, _rival, _planner] * 2),
    _crashing_once,
    _failing,
    _fixing_its_checks,
    _failing_its_checks,
    _idle,
    _hanging,
    _leaving_a_process,
    _reviewed,
)
