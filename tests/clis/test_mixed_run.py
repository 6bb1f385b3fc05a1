"""One run on eight CLIs: each phase of `adw` on another one, with an expired login, a usage limit and a kill."""

from __future__ import annotations

import json
import signal
from collections import Counter
from typing import Any, Final

import pytest

from tests.clis.conftest import SELECTED, Stage
from tests.clis.test_phases import PLAN, REVIEW, answer
from tests.clis.test_reviewing import SCOUT
from tests.conftest import CommandResult, Repository
from tests.model_server import ModelServer
from tests.waiting import wait_for

pytestmark = [pytest.mark.clis, pytest.mark.extended, pytest.mark.timeout(900)]

#: The CLIs of each task, by phase. All report the provider's tokens.
_CLIS: Final = {
    "first": {"scout": "gemini", "plan": "claude-code", "build": "codex", "review": "opencode"},
    "second": {"scout": "qwen-code", "plan": "copilot", "build": "mini-swe-agent", "review": "cline"},
}
_LIMITED, _LOGGED_OUT, _KILLED = "gemini", "qwen-code", "codex"
#: US dollars per million tokens; those of CLIs that report a cost are list prices.
_PRICES: Final = {
    "claude-sonnet-4": (3, 15),
    "claude-sonnet-5": (2, 10),
    "gemini": (1.25, 10),
    "gpt-4o": (2.5, 10),
    "gpt-5": (1.25, 10),
    "qwen3": (1, 5),
}


def phases(task: str) -> list[dict[str, Any]]:
    """Return the phases of `adw`, each on its own CLI."""
    settings: dict[str, dict[str, Any]] = {
        "scout": {"access": "read", "produces": "scout"},
        "plan": {"access": "read", "produces": "plan"},
        "build": {"produces": "build"},
        "review": {"access": "read", "produces": "review", "on_reject": "build"},
    }
    return [{name: {**one, "adapter": _CLIS[task][name]}} for name, one in settings.items()]


def prompt(task: str, **faults: str) -> str:
    """Return the model's script for each phase, with the faults of some; each phase reports other tokens."""
    build = f"write {task}.txt MARMALADE\n" + answer({"artifacts": [], "summary": "It is there."})
    parts = {"scout": answer(SCOUT), "plan": answer(PLAN), "build": build, "review": answer(REVIEW)}
    lines: list[str] = []
    for number, (name, part) in enumerate(parts.items()):
        usage = f"usage {101 + 10 * number} {11 + number}"
        lines += [f"once your result ({name})", *filter(None, [faults.get(name)]), part, usage]
    return "\n".join(lines)


async def test_eight_clis_in_one_run_are_counted_to_the_token(repository: Repository, server: ModelServer) -> None:
    """An expired login, a limited account, a kill of our process: everything lands, and is paid once."""
    names = {name for clis in _CLIS.values() for name in clis.values()}
    if missing := names - SELECTED.keys():
        pytest.skip(f"not chosen by CLIS: {', '.join(sorted(missing))}")
    stage = Stage(repository, server, {name: SELECTED[name] for name in SELECTED if name in names}, server.url)
    stage.set_up()
    prompts = {
        "first": prompt("first", scout=f"fail 429 {SELECTED[_LIMITED].calls} 1", build="delay 3"),
        "second": prompt("second", scout="fail 401 1"),
    }
    tasks = [
        {"id": name, "workflow": f"adw-{name}", "adapter": _CLIS[name]["build"], "prompt": text, "attempts": 1}
        for name, text in prompts.items()
    ]
    prices = {name: {"input": given, "output": taken} for name, (given, taken) in _PRICES.items()}
    workflows = {f"adw-{name}": phases(name) for name in _CLIS}
    path = stage.configure(tasks, workflows=workflows, prices=prices, capacity=2)

    started = repository.start("run", str(path), "--json")
    try:
        wait_for(lambda: any(one.dialect == "openai-responses" for one in server.requests), 400)
        started.send_signal(signal.SIGKILL)
    finally:
        killed = stage.end(started)
    assert killed.code == -signal.SIGKILL
    wait_for(lambda: not stage.clients())

    expired = repository.council("status", "--json").result
    assert [one["name"] for one in expired["adapters"] if one["disabled_reason"]] == [_LOGGED_OUT]

    # The user has logged in again.
    ended = stage.end(repository.start("resume", "--json"))
    assert ended.states == {"first": "landed", "second": "landed"}, stage.diagnostics(ended)
    for name in _CLIS:
        assert repository.git("show", f"main:{name}.txt") == "MARMALADE"
    first, second = ([(one.phase, one.outcome) for one in task.attempts] for task in await stage.tasks())
    assert first == [
        ("scout", "rate_limited"),
        ("scout", "completed"),
        ("plan", "completed"),
        ("build", "interrupted"),
        ("build", "built"),
        ("review", "completed"),
    ]
    assert second == [
        ("scout", "auth"),
        ("scout", "completed"),
        ("plan", "completed"),
        ("build", "built"),
        ("review", "completed"),
    ]
    assert_paid(repository.council("usage", "--json"), server)
    await stage.assert_clean()


def assert_paid(usage: CommandResult, server: ModelServer) -> None:
    """Assert that tokens and cost are those of the answers of the server."""
    given, taken = Counter[str](), Counter[str]()
    for model, tokens in server.answers:
        given[model] += tokens.input
        taken[model] += tokens.output
    total, shown = usage.result["total"], json.dumps([usage.result["adapters"], given, taken], indent=1)
    assert (total["input_tokens"], total["output_tokens"]) == (given.total(), taken.total()), shown
    prices = {model: next(price for name, price in _PRICES.items() if model.startswith(name)) for model in given}
    cost = sum(given[model] * prices[model][0] + taken[model] * prices[model][1] for model in given) / 1e6
    assert total["cost"] == pytest.approx(cost, abs=1e-9), shown
