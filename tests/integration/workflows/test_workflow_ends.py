"""Workflows whose work can't land, is rejected or interrupted: the work survives, and every loop ends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import CommandResult, Repository

PLAN = json.dumps({"tasks": [{"id": "t1", "prompt": "write b"}], "dependencies": [], "timeline": [], "resources": []})
APPROVE = json.dumps({"verdict": "approve"})
REJECT = json.dumps({"verdict": "reject", "findings": ["say more"]})
REVIEW: dict[str, Any] = {"review": {"access": "read", "produces": "review"}}


def entered(ended: CommandResult) -> list[str]:
    """Return the entered phases in order."""
    return [one["phase"] for one in ended.lines if one.get("event") == "phase.entered"]


@pytest.mark.extended
async def test_work_that_never_passes_its_checks_ends(repository: Repository) -> None:
    """A complete phase does not reset the count of failed landings."""
    steps = ("in build append b.txt more", f"in review hand-over {APPROVE}")
    path = repository.configure(
        [
            {
                "id": "t",
                "prompt": "\n".join(steps),
                "workflow": "two",
                "attempts": 2,
                "allow_failing_base": True,
                "checks": ["false"],
            }
        ],
        workflows={"two": [{"build": {}}, REVIEW]},
    )
    ended = repository.council("run", str(path), "--json", timeout=60)
    assert ended.states == {"t": "failed"}, ended
    assert entered(ended) == ["build", "review", "build", "review"]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_unlandable_work_is_repaired_by_an_unskipped_phase(repository: Repository) -> None:
    """The last writing phase may not have been entered: then the one before it has the work."""
    steps = ("in build append b.txt more", f"in review hand-over {APPROVE}")
    docs = {"docs": {"when": "false"}}
    path = repository.configure(
        [
            {
                "id": "t",
                "prompt": "\n".join(steps),
                "workflow": "three",
                "attempts": 3,
                "allow_failing_base": True,
                "checks": ["test $(wc -l < b.txt) = 2"],
            }
        ],
        workflows={"three": [{"build": {}}, docs, REVIEW]},
    )
    ended = repository.council("run", str(path), "--json", timeout=60)
    assert ended.states == {"t": "landed"}, ended
    assert entered(ended) == ["build", "review", "build", "review"]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_work_rejected_to_a_skipped_phase_continues(repository: Repository) -> None:
    """A rejection goes back to a phase that has produced something."""
    steps = (
        "in build append b.txt more",
        f"in review attempt 2 hand-over {REJECT}",
        f"in review attempt 4 hand-over {APPROVE}",
    )
    docs = {"docs": {"when": "false"}}
    path = repository.configure(
        [{"id": "t", "prompt": "\n".join(steps), "workflow": "three"}],
        workflows={"three": [{"build": {}}, docs, REVIEW]},
    )
    ended = repository.council("run", str(path), "--json", timeout=60)
    assert ended.states == {"t": "landed"}, ended
    assert entered(ended) == ["build", "review", "build", "review"]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_work_survives_a_new_plan(repository: Repository) -> None:
    """A review may reject to a read-only phase: the built work continues from its state."""
    steps = (
        f"in plan hand-over {PLAN}",
        "in plan keep-prompt",
        "in build append b.txt more",
        "in build keep-prompt",
        f"in review attempt 3 hand-over {REJECT}",
        f"in review attempt 6 hand-over {APPROVE}",
    )
    plan = {"plan": {"access": "read", "produces": "plan"}}
    review = {"review": {"access": "read", "produces": "review", "on_reject": "plan"}}
    path = repository.configure(
        [{"id": "t", "prompt": "\n".join(steps), "workflow": "three"}],
        workflows={"three": [plan, {"build": {}}, review]},
    )
    ended = repository.council("run", str(path), "--json", timeout=60)
    assert ended.states == {"t": "landed"}, ended
    assert entered(ended) == ["plan", "build", "review"] * 2
    assert "say more" in repository.council("logs", "t", "--session", "4").stdout
    assert (repository.top / "b.txt").read_text() == "more\nmore\n"
    await repository.assert_invariants()


@pytest.mark.extended
async def test_retry_has_all_rounds_again(repository: Repository) -> None:
    steps = (
        "in build append b.txt more",
        *(f"in review attempt {n} hand-over {REJECT}" for n in (2, 4, 6)),
        f"in review attempt 8 hand-over {APPROVE}",
    )
    review = {"review": {"access": "read", "produces": "review", "max_rounds": 1}}
    path = repository.configure(
        [{"id": "t", "prompt": "\n".join(steps), "workflow": "two"}], workflows={"two": [{"build": {}}, review]}
    )
    ended = repository.council("run", str(path), "--json", timeout=60)
    assert ended.states == {"t": "failed"}, ended
    repository.council("retry", "t")
    ended = repository.council("resume", "--json", timeout=60)
    assert ended.states == {"t": "landed"}, ended
    await repository.assert_invariants()


async def test_only_a_review_rejects_its_subject(repository: Repository) -> None:
    """Another handoff with such a field is data: the phase ends, and passes the check."""
    own: dict[str, Any] = {"access": "read", "produces": {"kind": "opinion", "schema": {"type": "object"}}}
    path = repository.configure(
        [
            {"id": "rejects", "prompt": f"in ask hand-over {REJECT}", "workflow": "own"},
            {"id": "other", "prompt": 'in ask hand-over {"verdict": ["perhaps"]}', "workflow": "own"},
        ],
        workflows={"own": [{"ask": own}]},
    )
    ended = repository.council("run", str(path), "--json", timeout=60)
    assert ended.states == {"rejects": "done", "other": "done"}, ended
    assert entered(ended) == ["ask", "ask"]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_conflicting_work_of_several_phases_is_repeated_by_all(repository: Repository) -> None:
    """The last one would continue from the conflict."""
    steps = ("in one write src/app.py one", "in two append two.txt more")
    path = repository.configure(
        [
            {"id": "first", "prompt": "write src/app.py first"},
            {"id": "t", "prompt": "\n".join(steps), "workflow": "pair", "attempts": 3, "on_conflict": "rebase"},
        ],
        workflows={"pair": [{"one": {}}, {"two": {}}]},
    )
    ended = repository.council("run", str(path), "--json", timeout=60)
    assert ended.states == {"t": "landed", "first": "landed"}, ended
    assert entered(ended) == ["one", "two"] * 2
    assert (repository.top / "src/app.py").read_text() == "one\n"
    await repository.assert_invariants()


@pytest.mark.extended
async def test_rejected_work_that_conflicts_restarts_with_its_diff_and_findings(repository: Repository) -> None:
    """Another task has landed meanwhile; the restart survives a failed attempt, and is reported."""
    landed = repository.spawns.parent / "landed"
    steps = (
        f"in review attempt 2 await {landed}",
        "in build attempt 1 write shared.txt first draft",
        "in build keep-prompt",
        "in build attempt 3 exit 1",
        "in build attempt 4 append shared.txt second",
        f"in review attempt 2 hand-over {REJECT}",
        f"in review attempt 5 hand-over {APPROVE}",
    )
    path = repository.configure(
        [
            {"id": "t", "prompt": "\n".join(steps), "workflow": "two", "attempts": 3, "priority": 10},
            {"id": "other", "prompt": "write shared.txt other"},
            {"id": "later", "prompt": f"write {landed} x\nwrite later.txt x", "needs": ["other"]},
        ],
        workflows={"two": [{"build": {}}, REVIEW]},
    )
    ended = repository.council("run", str(path), "--json", timeout=60)
    assert ended.states == {"t": "landed", "other": "landed", "later": "landed"}, ended
    assert (repository.top / "shared.txt").read_text() == "other\nsecond\n"
    reason = "the earlier work (t/1) conflicts with the target in shared.txt: starting from scratch"
    for session in ("3", "4"):
        prompt = repository.council("logs", "t", "--session", session).stdout
        assert "+first draft" in prompt
        assert "say more" in prompt
    started = [one for one in ended.lines if one.get("event") == "task.started" and one["task"] == "t"]
    assert [one.get("reason", "") for one in started] == ["", "", reason, reason, ""]
    assert " ".join(repository.council("show", "t").stdout.split()).count(reason) == 2
    await repository.assert_invariants()


@pytest.mark.extended
async def test_later_entry_phase_omits_nothing(repository: Repository) -> None:
    """A retry at a later phase treats all earlier ones as done: a task that builds still needs its work."""
    steps = ("in build attempt 2 append b.txt more", "in build attempt 1 exit 1", f"in review hand-over {APPROVE}")
    path = repository.configure(
        [{"id": "t", "prompt": "\n".join(steps), "workflow": "two", "attempts": 1}],
        workflows={"two": [{"build": {}}, REVIEW]},
    )
    ended = repository.council("run", str(path), "--json", timeout=60)
    assert ended.states == {"t": "failed"}, ended
    refused = repository.council("retry", "t", "--from", "review")
    assert refused.code == 2, refused
    assert "`council retry t --from build" in refused.stderr
    repository.council("retry", "t", "--from", "build")
    ended = repository.council("resume", "--json", timeout=60)
    assert ended.states == {"t": "landed"}, ended
    await repository.assert_invariants()


async def test_unset_value_does_not_fail_the_check(repository: Repository) -> None:
    """A phase that gets the file's own value has received nothing, if the value before it was empty."""
    scout = json.dumps({"scout_findings": ["x"], "requirements": []})
    phases: list[dict[str, Any]] = [
        {"scout": {"access": "read", "produces": "scout"}},
        {"look": {"access": "read", "needs": ["requirements"]}},
    ]
    path = repository.configure(
        [
            {
                "id": "t",
                "prompt": f"in scout hand-over {scout}",
                "workflow": "own",
                "context": {"requirements": ["of the file"]},
            }
        ],
        workflows={"own": phases},
    )
    ended = repository.council("run", str(path), "--json", timeout=60)
    assert ended.states == {"t": "done"}, ended
    await repository.assert_invariants()
