"""Sessions, tasks and runs stop at their budgets, with a warning before."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FAKE_CLI, CommandResult, Repository
from tests.fakes.script import ROOT

#: Longer than any of these tests: a session that is not stopped fails its test.
LONG = "90s"


def configured(repository: Repository, *prompts: str, task: dict[str, Any] | None = None, **more: Any) -> Path:
    """Write a file with tasks t0, t1, … in a row."""
    tasks = [
        {"id": f"t{number}", "prompt": prompt, **({"needs": [f"t{number - 1}"]} if number else {}), **(task or {})}
        for number, prompt in enumerate(prompts)
    ]
    defaults = {"timeout": LONG, "attempts": 2, "backoff": {"initial": "10ms", "max": "10ms", "jitter": False}}
    adapters = {"claude": {"use": "claude-code"}}
    readable = [str(repository.top.parent / "bin"), sys.prefix, str(ROOT / "tests")]
    return repository.configure(tasks, adapters=adapters, defaults=defaults, readable=readable, sandbox="off", **more)


def happened(ended: CommandResult, event: str) -> list[dict[str, Any]]:
    return [line for line in ended.lines if line.get("event") == event]


async def test_session_is_stopped_at_its_token_limit(claude: Repository) -> None:
    """A call that is reported twice counts once; no further attempt follows by itself."""
    prompt = "spend 400\nspend 401\nwrite a.txt half\nspend 200\nhang"
    ended = claude.council("run", str(configured(claude, prompt, task={"session_budget": {"tokens": 1000}})), "--json")
    (task,) = ended.result["tasks"]
    assert (task["status"], task["failure"], task["attempts"]) == ("failed", "budget", 1), ended
    assert "1,001 of 1,000 tokens" in task["reason"]
    assert "session_budget" in task["reason"]
    kept = claude.git("--git-dir", ended.result["repository"], "show", f"{task['branch']}:a.txt")
    assert kept == "half", "its work is preserved"
    await claude.assert_invariants()


@pytest.mark.extended
async def test_session_near_its_budget_causes_one_warning(claude: Repository) -> None:
    """At 80%, and the session continues."""
    budget = {"session_budget": {"tokens": 1000}, "budget": {"tokens": 1000}}
    ended = claude.council("run", str(configured(claude, "spend 800\nwrite a.txt a", task=budget)), "--json")
    assert ended.states == {"t0": "landed"}, ended
    assert [one["owner"] for one in happened(ended, "budget.low")] in (["task t0"], ["session t0.1", "task t0"])


async def test_task_at_its_budget_gets_no_further_session(claude: Repository) -> None:
    """The first attempt's usage counts, also if it is known only at its end."""
    prompt = "attempt 1 spend 600\nattempt 1 fail overloaded\nattempt 2 write a.txt a"
    ended = claude.council("run", str(configured(claude, prompt, task={"budget": {"tokens": 600}})), "--json")
    (task,) = ended.result["tasks"]
    assert (task["status"], task["attempts"]) == ("failed", 1), ended
    assert "the task's budget is exhausted" in task["reason"]


async def test_run_at_its_budget_is_halted_and_continues_with_more(claude: Repository) -> None:
    """Waiting tasks are done after the budget was raised."""
    prompts = (
        "spend 700\nwrite a.txt a",
        "attempt 1 spend 400\nattempt 1 hang\nattempt 2 write b.txt b",
        "write c.txt c",
    )
    path = configured(claude, *prompts, budget={"tokens": 1000})
    ended = claude.council("run", str(path), "--json")
    assert (ended.result["status"], ended.code) == ("halted", 1), ended
    assert ended.states == {"t0": "landed", "t1": "pending", "t2": "pending"}
    assert "the run's budget is exhausted" in ended.result["halted"]
    again = claude.council("resume", "--json")
    assert again.result["status"] == "halted"
    assert [task["attempts"] for task in again.result["tasks"]] == [1, 0, 0], (
        "a stopped session does not count as an attempt"
    )
    assert claude.council("usage", "--json").result["total"]["sessions"] == 2, "no session was started"
    shown = claude.council("status")
    assert "--budget" in shown.stdout
    done = claude.council("resume", "--budget", "tokens=10k", "--json")
    assert set(done.states.values()) == {"landed"}, done
    assert done.result["halted"] is None
    await claude.assert_invariants()


@pytest.mark.extended
async def test_cost_is_estimated_by_the_price_of_the_model(claude: Repository) -> None:
    """The session was stopped before its result, which has the cost."""
    prices = {"claude-opus-4-8": {"input": 1000, "output": 1000}}
    path = configured(claude, "spend 600\nspend 401\nhang", task={"session_budget": {"cost": 1}}, prices=prices)
    ended = claude.council("run", str(path), "--json")
    (task,) = ended.result["tasks"]
    assert (task["failure"], task["attempts"]) == ("budget", 1), ended
    assert "$1.0010 of $1.00" in task["reason"]


@pytest.mark.extended
async def test_program_that_stops_at_its_own_limit_exhausted_the_budget(claude: Repository) -> None:
    """The program reports a limit of its own, which council passed to it."""
    prompt = "attempt 1 spend 600\nattempt 1 fail turns\nattempt 2 write a.txt a"
    ended = claude.council("run", str(configured(claude, prompt, budget={"cost": 0.01})), "--json")
    assert ended.result["status"] == "halted", ended
    done = claude.council("resume", "--budget", "cost=5", "--json")
    assert set(done.states.values()) == {"landed"}, done


@pytest.mark.extended
async def test_exhausted_task_is_not_retried(claude: Repository) -> None:
    """Even if its session's failure class is worth a retry."""
    task = {"budget": {"tokens": 1000}, "retry_on": ["budget"], "attempts": 3}
    ended = claude.council("run", str(configured(claude, "spend 600\nspend 401\nhang", task=task)), "--json")
    (exhausted,) = ended.result["tasks"]
    assert (exhausted["failure"], exhausted["attempts"]) == ("budget", 1), ended
    task = {"session_budget": {"tokens": 1000}, "retry_on": ["budget"], "attempts": 2}
    prompt = "attempt 1 spend 1001\nattempt 1 hang\nattempt 2 write b.txt b"
    ended = claude.council("run", str(configured(claude, prompt, task=task)), "--json")
    assert ended.states == {"t0": "landed"}, ended


@pytest.mark.extended
async def test_uncountable_cost_is_reported(repository: Repository) -> None:
    """Neither the program nor a price gives the cost."""
    adapter = {
        "use": "command",
        "argv": [sys.executable, "-S", str(FAKE_CLI), "{prompt_file}"],
        "output": "jsonl",
        "model": "nobody-knows",
        "read": [{"input_tokens": "n"}],
    }
    task = {"id": "t", "prompt": 'print {"n": 50}\nwrite a.txt a'}
    path = repository.configure([task], adapters={"it": adapter}, sandbox="off", budget={"cost": 1})
    ended = repository.council("run", str(path), "--json")
    assert ended.states == {"t": "landed"}, ended
    (event,) = happened(ended, "budget.price_unknown")
    assert (event["adapter"], event["model"]) == ("it", "nobody-knows")
    known = repository.configure([task], adapters={"it": adapter}, sandbox="off", budget={"cost": 1}, target="two",
                                 prices={"nobody-knows": {"input": 1, "output": 1}})  # fmt: skip
    assert happened(repository.council("run", str(known), "--json"), "budget.price_unknown") == []


@pytest.mark.extended
async def test_session_time_is_limited_over_all_attempts(claude: Repository) -> None:
    """A silent session uses up time as well."""
    ended = claude.council("run", str(configured(claude, "hang", task={"budget": {"time": "2s"}})), "--json")
    (task,) = ended.result["tasks"]
    assert (task["failure"], task["attempts"]) == ("budget", 1), ended
    usage = claude.council("usage", "--json").result
    assert 2 <= usage["total"]["seconds"] < 30


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ("tokens=0", "positive"),
        ("cost=nan", "US dollars"),
        ("time=5", "unit"),
        ("tokens=1,tokens=2", "at most once"),
        ("tokns=1", "is not a limit"),
        ("", "is not a limit"),
    ],
)
async def test_invalid_limits_are_rejected(claude: Repository, limits: str, expected: str) -> None:
    ended = claude.council("resume", "--budget", limits)
    assert ended.code == 2
    assert expected in ended.stderr


@pytest.mark.extended
async def test_exhausted_task_is_retried_with_a_raised_budget(claude: Repository) -> None:
    """The run keeps the recorded budget: a retry without `--reload` fails again, and the printed commands work."""
    prompt = "attempt 1 spend 600\nattempt 1 fail overloaded\nwrite a.txt a"
    config = configured(claude, prompt, task={"budget": {"tokens": 600}})
    claude.council("run", str(config))
    steps = [f"next: raise the budget of t0 in {config}", "then: council retry t0 --reload"]
    for command in (("status",), ("show", "t0")):
        shown = [line.strip() for line in claude.council(*command).stdout.splitlines()]
        assert [line for line in shown if line in steps] == steps, shown
        assert "then: council retry t0" not in shown
    configured(claude, prompt, task={"budget": {"tokens": 60_000}})
    assert claude.council("retry", "t0", "--reload").code == 0
    assert claude.council("resume", "--json").states == {"t0": "landed"}
