"""Plans that become tasks of the run: these land like any others, and dependents of the plan wait for them."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from typing import Any

import pytest

from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.conftest import CommandResult, Repository
from tests.integration.runs.test_shared_runs import QUICK, ended, happened, states
from tests.waiting import wait_for

APPROVE = json.dumps({"verdict": "approve", "findings": []})
PLAN: dict[str, Any] = {"access": "read", "produces": "plan", "prompt": "{{ task.prompt }}"}


def plan(*tasks: dict[str, Any], **more: Any) -> str:
    """Return a plan as a session submits it."""
    return json.dumps({"tasks": list(tasks), "dependencies": [], "timeline": [], "resources": [], **more})


def planned(id_: str, *steps: str, **more: Any) -> dict[str, Any]:
    """Return one task of a plan."""
    return {"id": id_, "prompt": "\n".join(steps), **more}


def workflow(*, expand: Any = True, following: Sequence[dict[str, Any]] = (), **more: Any) -> dict[str, Any]:
    """Return a workflow with a plan that becomes tasks."""
    return {"split": [{"plan": {**PLAN, "expand": expand, **more}}, *following]}


def expanding(repository: Repository, prompt: Sequence[str], *more: dict[str, Any], **settings: Any) -> str:
    """Configure a task `all` of the workflow `split`."""
    own = settings.pop("own", {})
    tasks = [{"id": "all", "prompt": "\n".join(prompt), "workflow": "split", **own}, *more]
    settings.setdefault("workflows", workflow())
    return str(repository.configure(tasks, **settings))


def landings(repository: Repository) -> list[str]:
    """Return the landed tasks in order."""
    lines = repository.git("log", "--reverse", "--format=%(trailers:key=Council-Task,valueonly)", "main").splitlines()
    return [line.rpartition("/")[2] for line in lines if line]


def reason_of(run: CommandResult, task: str) -> str:
    """Return the reason of a task's state."""
    return next(str(one["reason"]) for one in run.result["tasks"] if one["id"] == task)


TWO = plan(
    planned("First one", "write one.txt 1", owns=["one.txt"]),
    planned("second", "append one.txt 2", "write two.txt 2", dependencies=["First one"]),
)


async def test_plan_becomes_tasks_that_land_before_dependents(repository: Repository) -> None:
    """Names have the task's as prefix, dependencies become needs, and the task lands only after all of them."""
    path = expanding(
        repository,
        [f"in plan hand-over {TWO}"],
        {"id": "next", "prompt": "append two.txt 3", "needs": ["all"]},
    )
    run = repository.council("run", path, "--json")
    assert run.states == {
        "all": "done",
        "all-First-one": "landed",
        "all-second": "landed",
        "next": "landed",
    }, run
    assert list(run.states) == ["all", "all-First-one", "all-second", "next"]
    assert run.code == 0
    assert landings(repository) == ["all-First-one", "all-second", "next"]
    assert (repository.top / "one.txt").read_text() == "1\n2\n"
    checked = repository.council("check", run.result["run"])
    assert checked.code == 0, checked
    assert "all-second" in repository.council("show", "all").stdout
    [event] = [one for one in run.lines if one.get("event") == "task.expanded"]
    assert (event["task"], event["phase"], event["tasks"]) == ("all", "plan", ["all-First-one", "all-second"])
    await repository.assert_invariants()


@pytest.mark.extended
def test_printed_reload_of_a_task_that_waits_for_its_subtasks_works(repository: Repository) -> None:
    """One of them failed; those of the plan keep their settings, and no reload is suggested for them."""
    prompt = [f"in plan hand-over {plan(planned('one', 'attempt 1 exit 1', 'write one.txt 1'))}"]
    own = {"attempts": 1}
    run = repository.council("run", expanding(repository, prompt, own=own), "--json")
    assert run.states == {"all": "blocked", "all-one": "failed"}, run
    assert [task["reloadable"] for task in run.result["tasks"]] == [True, False]
    expanding(repository, prompt, own={**own, "timeout": "9m"})
    kept = repository.council("retry", "all-one")
    assert "--reload" not in kept.stderr, kept
    refused = repository.council("retry", "all-one")
    assert (refused.code, "--reload" in refused.stderr) == (2, False), refused
    assert repository.council("cancel", "all-one").code == 0
    reloaded = repository.council("retry", "all", "--reload", "--json")
    assert (reloaded.code, reloaded.states["all"]) == (0, "blocked"), reloaded
    assert repository.council("retry", "all-one").code == 0
    assert repository.council("resume", "--json").states == {"all": "done", "all-one": "landed"}


@pytest.mark.extended
async def test_next_phase_starts_from_the_landed_subtasks(repository: Repository) -> None:
    """A build after the plan has all of it, and is reviewed and lands in turn."""
    following = [
        {"build": {"produces": "build"}},
        {"review": {"access": "read", "produces": "review", "prompt": "{{ task.prompt }}"}},
    ]
    prompt = [
        f"in plan hand-over {TWO}",
        "in build append one.txt whole",
        "in build built one.txt",
        "in review print-env COUNCIL_PHASE",
        f"in review tell {APPROVE}",
    ]
    path = expanding(repository, prompt, workflows=workflow(following=following))
    run = repository.council("run", path, "--json")
    assert run.states == {"all": "landed", "all-First-one": "landed", "all-second": "landed"}, run
    assert (repository.top / "one.txt").read_text() == "1\n2\nwhole\n"
    assert landings(repository) == ["all-First-one", "all-second", "all"]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_invalid_plan_is_repaired_once_by_the_session(repository: Repository) -> None:
    """Paths outside the task's own, a name in use, too many tasks: one message has all errors, one turn repairs it."""
    wrong = plan(
        planned("x", "write a/x 1", owns=["a/x", "b/*"]),
        planned("y", "write a/y 1", owns=["../y"]),
        planned("z", "write a/z 1", owns=["a/z"]),
    )
    right = plan(planned("x", "write a/x 1", owns=["a/x"]), planned("w", "write a/w 1"))
    prompt = [f"attempt 1 in plan hand-over {wrong}", f"attempt 2 in plan hand-over {right}", "attempt 2 keep-prompt"]
    path = expanding(
        repository,
        prompt,
        {"id": "all-y", "prompt": "write other.txt 1"},
        own={"owns": ["a/**"]},
        workflows=workflow(expand={"max": 2}),
    )
    run = repository.council("run", path, "--json")
    assert run.states == {"all": "done", "all-x": "landed", "all-w": "landed", "all-y": "landed"}, run
    [invalid] = [one for one in run.lines if one.get("event") == "handoff.invalid"]
    assert {(one["rule"], one["location"]) for one in invalid["violations"]} == {
        ("expansion.limit", "tasks"),
        ("expansion.names", "tasks[1].id"),
        ("expansion.paths", "tasks[0].owns[1]"),
        ("expansion.paths", "tasks[1].owns[0]"),
    }
    await repository.assert_invariants()


@pytest.mark.extended
async def test_plan_that_stays_invalid_fails_its_phase(repository: Repository) -> None:
    """Nothing of it becomes a task, and the task's reason has its errors."""
    circle = plan(planned("a", "write a 1", dependencies=["b"]), planned("b", "write b 1", dependencies=["a"]))
    path = expanding(repository, [f"in plan hand-over {circle}"], own={"attempts": 1})
    run = repository.council("run", path, "--json")
    assert run.states == {"all": "failed"}, run
    assert "dependency cycle: a → b → a" in reason_of(run, "all")
    await repository.assert_invariants()


async def test_plan_can_only_set_its_own_keys(repository: Repository) -> None:
    """Adapter, checks and limits are the task's, whatever a plan has under such names."""
    bold = {
        "adapter": "other",
        "checks": [],
        "timeout": 1,
        "attempts": 99,
        "priority": 9,
        "budget": {"cost": 9},
        "workflow": "split",
        "fallback": ["other"],
        "instructions": "Do as you like.",
    }
    path = expanding(
        repository,
        [f"in plan hand-over {plan(planned('x', 'write x.txt bad', 'keep-prompt', **bold))}"],
        own={"checks": ["! grep -q bad *.txt"], "attempts": 1, "instructions": "Take care."},
    )
    run = repository.council("run", path, "--json")
    assert run.states == {"all": "blocked", "all-x": "failed"}, run
    async with FileStore.open(repository.log, SystemClock()) as store:
        specs = {one.key.id.partition("/")[2]: one.value for one in await store.list("spec")}
    own = ("id", "prompt", "owns", "workflow", "plan")
    assert {key: value for key, value in specs["all-x"].items() if key not in own} == {
        key: value for key, value in specs["all"].items() if key not in own
    }
    assert (specs["all-x"]["workflow"], specs["all-x"]["plan"]) == (None, f"{run.result['run']}/all/1")
    logs = repository.top / ".council" / "logs" / run.result["run"]
    prompt = (logs / "all-x.1.stdout").read_text()
    assert "planned by a session of task 'all'" in prompt
    begun = next(line for line in prompt.splitlines() if line.endswith(" task begins]"))
    assert prompt.index(begun) < prompt.index("write x.txt bad") < prompt.index(begun.replace("begins", "ends"))
    await repository.assert_invariants()


@pytest.mark.extended
async def test_expanded_plan_waits_for_approval(repository: Repository) -> None:
    """Nothing is added before; after the approval it lands in the continued run."""
    path = expanding(
        repository, [f"in plan hand-over {plan(planned('x', 'write x.txt 1'))}"], workflows=workflow(approve=True)
    )
    run = repository.start("run", path, "--json")
    wait_for(lambda: states(repository).get("all") == "awaiting_approval", limit=60)
    assert states(repository) == {"all": "awaiting_approval"}
    assert repository.council("approve", "all").code == 0
    assert ended(run) == [0]
    assert states(repository) == {"all": "done", "all-x": "landed"}
    await repository.assert_invariants()


@pytest.mark.extended
async def test_failed_subtask_blocks_its_parent_until_retried(
    repository: Repository,
) -> None:
    """The plan's own task continues when all subtasks have landed; landed ones are not repeated."""
    tasks = plan(planned("x", "write x.txt 1"), planned("y", "attempt 1 exit 1", "write y.txt 1"))
    path = expanding(
        repository, [f"in plan hand-over {tasks}"], {"id": "next", "prompt": "write n 1", "needs": ["all"]}
    )
    run = repository.council("run", path, "--json")
    assert run.states == {"all": "done", "all-x": "landed", "all-y": "landed", "next": "landed"}, run

    tasks = plan(planned("x", "write x2.txt 1"), planned("y", "without /tmp exit 0", "once exit 1", "write y2.txt 1"))
    path = expanding(
        repository,
        [f"in plan hand-over {tasks}"],
        {"id": "next", "prompt": "write n2 1", "needs": ["all"]},
        own={"attempts": 1},
    )
    run = repository.council("run", path, "--json")
    assert run.states == {"all": "blocked", "all-x": "landed", "all-y": "failed", "next": "blocked"}, run
    assert reason_of(run, "all") == "needs 'all-y', which did not land"
    checked = repository.council("check", run.result["run"])
    assert checked.code == 0, checked
    assert repository.council("retry", "all-y").code == 0
    run = repository.council("resume", run.result["run"], "--json")
    assert run.states == {"all": "done", "all-x": "landed", "all-y": "landed", "next": "landed"}, run
    await repository.assert_invariants()


def planned_twice(repository: Repository) -> str:
    """Return the config of a task whose first plan has a landed, a failed and a waiting part, its second plan one."""
    old = plan(planned("x", "write x.txt 1"), planned("y", "exit 1"), planned("z", "write z.txt 1", dependencies=["y"]))
    new = plan(planned("y", "write y.txt 1"))
    return expanding(
        repository,
        [f"attempt 1 in plan hand-over {old}", f"attempt 2 in plan hand-over {new}"],
        own={"attempts": 1},
    )


@pytest.mark.extended
async def test_new_plan_replaces_unlanded_subtasks(repository: Repository) -> None:
    """Its tasks have names of their own; landed ones stay, the others are cancelled."""
    path = planned_twice(repository)
    run = repository.council("run", path, "--json")
    assert run.states == {"all": "blocked", "all-x": "landed", "all-y": "failed", "all-z": "blocked"}, run
    name = run.result["run"]
    assert repository.council("cancel", "all").code == 0
    assert repository.council("retry", "all", "--from", "plan").code == 0
    run = repository.council("resume", name, "--json")
    assert run.states == {
        "all": "done",
        "all-x": "landed",
        "all-y": "failed",
        "all-z": "cancelled",
        "all.2-y": "landed",
    }, run
    assert (repository.top / "y.txt").read_text() == "1\n"
    await repository.assert_invariants()


@pytest.mark.extended
async def test_new_plan_ends_the_sessions_of_the_old_one(repository: Repository) -> None:
    """In an active run: sessions of the old plan are stopped, and the new one is made."""
    old = plan(planned("x", "hang"))
    new = plan(planned("x", "write x.txt 1"))
    path = expanding(
        repository, [f"attempt 1 in plan hand-over {old}", f"attempt 2 in plan hand-over {new}"], capacity=2
    )
    run = repository.start("run", path)
    wait_for(lambda: states(repository).get("all-x") == "running", limit=60)
    assert repository.council("cancel", "all").code == 0
    assert repository.council("retry", "all", "--from", "plan").code == 0
    assert ended(run) == [1]
    assert states(repository) == {"all": "done", "all-x": "cancelled", "all.2-x": "landed"}
    await repository.assert_invariants()


@pytest.mark.parametrize(
    "place",
    ["plan.subtasks", *(pytest.param(one, marks=pytest.mark.slow) for one in ("submitted", "attempt.ended"))],
)
async def test_plan_killed_anywhere_becomes_tasks_once(repository: Repository, place: str) -> None:
    """All of it is recorded or nothing: killed before, the plan is made again; killed after, it continues."""
    failpoint = {"submitted": "session.ended=kill"}.get(place, f"{place}=kill")
    path = expanding(repository, [f"in plan hand-over {TWO}"])
    assert repository.council("run", path, failpoints=failpoint).code == -signal.SIGKILL
    before = states(repository)
    assert set(before) == ({"all"} if place == "submitted" else {"all", "all-First-one", "all-second"})
    run = repository.council("resume", "--json")
    assert run.states == {"all": "done", "all-First-one": "landed", "all-second": "landed"}, run
    expanded = [one for one in await happened(repository) if one.type == "task.expanded"]
    assert len(expanded) == 1
    plans = [one for one in repository.spawns.read_text().splitlines() if one.split()[1] == "all"]
    assert len(plans) == (2 if place == "submitted" else 1)
    await repository.assert_invariants()


@pytest.mark.extended
async def test_two_processes_share_the_subtasks(repository: Repository) -> None:
    """The other process finds the tasks, and each lands once; dependents of the plan's task wait for both."""
    tasks = plan(*(planned(f"t{one}", "tick 5 0.3", f"write t{one}.txt {one}") for one in range(6)))
    path = expanding(
        repository,
        ["tick 10 0.3", f"in plan hand-over {tasks}"],
        {"id": "next", "prompt": "write n.txt 1", "needs": ["all"]},
        capacity=2,
    )
    first = repository.start("run", path)
    wait_for(lambda: states(repository).get("all") == "running", limit=60)
    second = repository.start("work", "--capacity", "3")
    assert ended(first, second) == [0, 0]
    assert states(repository) == {"all": "done", **{f"all-t{one}": "landed" for one in range(6)}, "next": "landed"}
    assert sorted(landings(repository)[:6]) == [f"all-t{one}" for one in range(6)]
    events = await happened(repository)
    workers = {one.data["orchestrator"] for one in events if one.type == "run.joined"}
    assert workers
    await repository.assert_invariants()


@pytest.mark.slow
async def test_survivor_continues_the_plan_of_a_killed_process(repository: Repository) -> None:
    """The tasks were recorded, but not yet reported."""
    path = expanding(repository, ["tick 12 0.3", f"in plan hand-over {TWO}"], coordination=QUICK)
    first = repository.start("run", path, failpoints="plan.subtasks=kill")
    wait_for(lambda: states(repository).get("all") == "running", limit=60)
    second = repository.start("work")
    assert ended(first, second) == [-signal.SIGKILL, 0]
    assert states(repository) == {"all": "done", "all-First-one": "landed", "all-second": "landed"}
    assert landings(repository) == ["all-First-one", "all-second"]
    await repository.assert_invariants()


@pytest.mark.slow
async def test_subtasks_share_the_budget_of_their_task(repository: Repository) -> None:
    """A plan of many tasks is no way around it: each of them alone would have enough."""
    tasks = plan(*(planned(f"t{one}", "tick 1 4", f"write t{one}.txt {one}") for one in range(3)))
    path = expanding(repository, [f"in plan hand-over {tasks}"], own={"budget": {"time": "7s"}}, capacity=1)
    run = repository.council("run", path, "--json")
    assert run.states == {"all": "blocked", "all-t0": "landed", "all-t1": "failed", "all-t2": "failed"}, run
    assert {one["failure"] for one in run.result["tasks"][2:]} <= {"budget", None}
    assert reason_of(run, "all-t2").startswith("the task's budget is exhausted")
    await repository.assert_invariants()


@pytest.mark.extended
async def test_checkpoint_before_a_plan_keeps_its_work(repository: Repository) -> None:
    """Subtasks without a session are removed with the plan; another plan is made."""
    path = planned_twice(repository)
    assert repository.council("run", path, failpoints="run.leader_elected=kill").code == -signal.SIGKILL
    checkpoint = repository.council("checkpoint", "create", "--json").result["id"]
    run = repository.council("resume", "--json")
    assert run.states == {"all": "blocked", "all-x": "landed", "all-y": "failed", "all-z": "blocked"}, run
    assert repository.council("checkpoint", "restore", checkpoint).code == 0
    assert states(repository) == {"all": "pending", "all-x": "landed", "all-y": "failed"}
    run = repository.council("resume", "--json")
    assert run.states == {"all": "done", "all.2-y": "landed", "all-x": "landed", "all-y": "failed"}, run
    await repository.assert_invariants()


@pytest.mark.parametrize(
    ("limit", "owned", "steps"),
    [
        pytest.param("*", "src", ["append src/app.py evil"], marks=pytest.mark.slow),
        ("src/*.py", "src/new.py", ["write src/new.py/anything.sh evil"]),
    ],
)
async def test_plan_gives_its_tasks_no_more_than_its_own(
    repository: Repository, limit: str, owned: str, steps: list[str]
) -> None:
    """A path that a plan names as a file's is also a folder's, with everything below it."""
    made = plan(planned("part", *steps, owns=[owned]))
    path = expanding(repository, [f"in plan hand-over {made}"], own={"owns": [limit], "attempts": 1})
    run = repository.council("run", path, "--json")
    assert run.states["all-part"] == "failed", run
    assert "changes paths that the task does not own" in reason_of(run, "all-part")
    assert "evil" not in repository.git("show", "HEAD:src/app.py")


@pytest.mark.extended
async def test_plan_after_a_restore_uses_new_task_names(repository: Repository) -> None:
    """Checkpoints know two plans of one task: a name means the same task in both, and each plan lands."""
    first = plan(planned("x", "write first.txt 1"))
    second = plan(planned("x", "write second.txt 2"))
    path = expanding(repository, [f"attempt 1 in plan hand-over {first}", f"attempt 2 in plan hand-over {second}"])
    assert repository.council("run", path, failpoints="run.leader_elected=kill").code == -signal.SIGKILL
    before = repository.council("checkpoint", "create", "--json").result["id"]
    assert repository.council("resume", failpoints="plan.subtasks=kill").code == -signal.SIGKILL
    planned_first = repository.council("checkpoint", "create", "--json").result["id"]
    assert states(repository) == {"all": "pending", "all-x": "pending"}
    assert repository.council("checkpoint", "restore", before).code == 0
    assert states(repository) == {"all": "pending"}
    run = repository.council("resume", "--json")
    assert run.states == {"all": "done", "all.2-x": "landed"}, run
    assert repository.council("checkpoint", "restore", planned_first).code == 0
    run = repository.council("resume", "--json")
    assert run.states == {"all": "done", "all-x": "landed", "all.2-x": "landed"}, run
    assert (repository.top / "first.txt").read_text() == "1\n"
    assert (repository.top / "second.txt").read_text() == "2\n"
    await repository.assert_invariants()
