"""Faults around a task of three phases: it resumes at its current phase, and repeats nothing."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import FAKE_CLI, CommandResult, Repository
from tests.waiting import wait_for

pytestmark = pytest.mark.extended

PLAN = json.dumps({"tasks": [{"id": "t1", "prompt": "write b"}], "dependencies": [], "timeline": [], "resources": []})
APPROVE = json.dumps({"verdict": "approve"})
PHASES = ("plan", "build", "review")
WORK = (f"in plan hand-over {PLAN}", "in build append b.txt built", f"in review hand-over {APPROVE}")


def configure(repository: Repository, *steps: str, adapter: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Write a file with one task of three phases and these first steps; `adapter` adds to its adapter.

    A second adapter, `other`, is the same; `builder` adds to the building one.
    """
    workflow: list[dict[str, Any]] = [
        {"plan": {"access": "read", "produces": "plan"}},
        {"build": {"adapter": "builder"} if "builder" in settings else {}},
        {"review": {"access": "read", "produces": "review"}},
    ]
    fake = repository.fake_adapter(**(adapter or {}))
    adapters = {"fake": fake, "other": fake, "builder": {**fake, **settings.pop("builder", {})}}
    task = {
        "id": "t",
        "adapter": "fake",
        "prompt": "\n".join((*steps, *WORK)),
        "workflow": "three",
        **settings.pop("task", {}),
    }
    return repository.configure([task], workflows={"three": workflow}, adapters=adapters, **settings)


def visits(repository: Repository) -> list[tuple[str, str, int]]:
    """Return the visits of the task's phases: the phase, its outcome, and its number of sessions."""
    details = repository.council("show", "t", "--json").result
    return [(one["phase"], one["status"], len(one["attempts"])) for one in details["phases"]]


def visits_once(**sessions: int) -> list[tuple[str, str, int]]:
    """Return `visits` with each phase done once, by one session or the given number."""
    return [(phase, "completed", sessions.get(phase, 1)) for phase in PHASES]


LIMIT = "limit reached"
LIMITED = {"failures": {"rate_limited": rf"{LIMIT}, again in (?P<seconds>\d+) s"}}
COUNTING: dict[str, Any] = {"output": "jsonl", "read": [{"input_tokens": "n"}]}


@pytest.mark.parametrize("phase", PHASES[:2])
async def test_run_with_a_budget_exhausted_after_a_phase_continues_with_more(
    repository: Repository, phase: str
) -> None:
    """At the next phase; handoffs and built work are kept."""
    path = configure(repository, f'in {phase} print {{"n": 100}}', adapter=COUNTING, budget={"tokens": 100})
    ended = repository.council("run", str(path), "--json")
    assert (ended.result["status"], ended.states) == ("halted", {"t": "pending"}), ended
    done_before = visits_once()[: PHASES.index(phase) + 1]
    assert visits(repository) == done_before
    assert repository.council("resume", "--json").result["status"] == "halted"
    assert visits(repository) == done_before
    done = repository.council("resume", "--budget", "tokens=1k", "--json")
    assert done.states == {"t": "landed"}, done
    assert visits(repository) == visits_once()
    await assert_built_once(repository)


@pytest.mark.parametrize("budgets", [{"budget": {"tokens": 100}}, {"task": {"budget": {"tokens": 100}}}])
async def test_task_that_needs_no_session_lands_without_a_budget(
    repository: Repository, budgets: dict[str, Any]
) -> None:
    """The last phase used up the budget, and was complete."""
    path = configure(repository, 'in review print {"n": 100}', adapter=COUNTING, **budgets)
    ended = repository.council("run", str(path), "--json")
    assert ended.states == {"t": "landed"}, ended
    assert visits(repository) == visits_once()
    await assert_built_once(repository)


async def test_task_with_a_budget_exhausted_after_a_phase_fails_with_its_work(repository: Repository) -> None:
    """No file can raise its budget; the branch is preserved."""
    path = configure(repository, 'in build print {"n": 100}', adapter=COUNTING, task={"budget": {"tokens": 100}})
    ended = repository.council("run", str(path), "--json")
    (task,) = ended.result["tasks"]
    assert (task["status"], task["attempts"], task["phase"]) == ("failed", 1, "review"), ended
    assert "the task's budget is exhausted, 100 of 100 tokens" in task["reason"]
    assert repository.git("--git-dir", ended.result["repository"], "show", f"{task['branch']}:b.txt") == "built"
    assert visits(repository) == visits_once()[:2]
    await repository.assert_invariants()


@pytest.mark.parametrize("phase", PHASES)
async def test_usage_limit_is_waited_for_in_its_phase(repository: Repository, phase: str) -> None:
    """It does not count as an attempt, and complete phases stay complete."""
    path = configure(repository, f"in {phase} once exit 1 {LIMIT}, again in 1 s", adapter=LIMITED, task={"attempts": 1})
    ended = repository.council("run", str(path), "--json")
    assert ended.states == {"t": "landed"}, ended
    assert visits(repository) == visits_once(**{phase: 2})
    await assert_built_once(repository)


@pytest.mark.parametrize("phase", PHASES)
async def test_fallback_is_used_from_the_limited_phase_on(repository: Repository, phase: str) -> None:
    """While the limit lasts; complete phases stay complete."""
    task = {"attempts": 1, "adapter": "fake", "fallback": ["other"]}
    path = configure(repository, f"in {phase} once exit 1 {LIMIT}, again in 18000 s", adapter=LIMITED, task=task)
    ended = repository.council("run", str(path), "--json")
    assert ended.states == {"t": "landed"}, ended
    assert visits(repository) == visits_once(**{phase: 2})
    begun = [one["adapter"] for one in ended.lines if one.get("event") == "task.started"]
    before = PHASES.index(phase) + 1
    assert begun == ["fake"] * before + ["other"] * (len(begun) - before)
    await assert_built_once(repository)


async def test_missing_program_is_waited_for(repository: Repository) -> None:
    """It is removed during an earlier phase: the next one waits for it, at no cost of an attempt."""
    tool = repository.spawns.parent / "tool"
    script = f'#!/bin/sh\nexec {shlex.join([sys.executable, "-S", str(FAKE_CLI)])} "$@"\n'

    def install() -> None:
        tool.write_text(script)
        tool.chmod(0o755)

    install()
    path = configure(
        repository, f"in plan wipe {tool}", builder={"argv": [str(tool), "{prompt_file}"]}, task={"attempts": 1}
    )
    for command in (["run", str(path)], ["resume"]):
        ended = repository.council(*command, "--json")
        assert (ended.code, ended.states) == (1, {"t": "blocked"}), ended
        (builder,) = ended.result["adapters"]
        assert builder["disabled_reason"] == f"the program was not found: {tool}: No such file or directory"
        assert visits(repository)[0] == visits_once()[0]
    install()
    done = repository.council("resume", "--json")
    assert done.states == {"t": "landed"}, done
    assert [(phase, status) for phase, status, _ in visits(repository)] == [(one, "completed") for one in PHASES]
    await assert_built_once(repository)


async def test_program_killed_in_each_phase_is_retried_there(repository: Repository) -> None:
    """A complete phase leaves no attempts counted against the next one."""
    path = configure(repository, *(f"in {phase} once hang" for phase in PHASES), task={"attempts": 2})
    started = repository.start("run", str(path), "--json")
    try:
        for number in range(1, len(PHASES) + 1):
            wait_for(lambda: len(list(repository.spawns.parent.glob("spawns.t.*"))) == number)  # noqa: B023
            program(repository).kill()
        stdout, stderr = started.communicate(timeout=60)
    finally:
        started.kill()
    ended = CommandResult(started.returncode, stdout, stderr)
    assert ended.states == {"t": "landed"}, ended
    assert visits(repository) == visits_once(plan=2, build=2, review=2)
    await assert_built_once(repository)


async def assert_built_once(repository: Repository) -> None:
    """Check the landed work and the invariants of every run."""
    assert (repository.top / "b.txt").read_text() == "built\n"
    await repository.assert_invariants()


def program(repository: Repository) -> psutil.Process:
    """Return the process of the fake CLI running for this repository, without wrappers."""
    for process in psutil.process_iter():
        try:
            argv = process.cmdline()
        except psutil.Error:
            continue
        if argv[1:3] == ["-S", str(FAKE_CLI)] and argv[3].startswith(str(repository.top.parent)):
            return process
    raise AssertionError("it does not run")
