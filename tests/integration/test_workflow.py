"""Tasks that go through the phases of a workflow, by a real program that does what its prompt says."""

from __future__ import annotations

import json

from tests.conftest import Repository

SCOUT = json.dumps({"scout_findings": ["there is a.txt"], "requirements": ["b.txt"], "constraints": []})
PLAN = json.dumps({"tasks": [{"id": "t1", "prompt": "write b"}], "dependencies": [], "timeline": [], "resources": []})
APPROVE = json.dumps({"verdict": "approve", "findings": []})
REJECT = json.dumps(
    {"verdict": "reject", "findings": [{"path": "b.txt", "line": 1, "severity": "major", "message": "say more"}]}
)


async def test_a_task_goes_through_its_phases_and_lands(repository: Repository) -> None:
    """Scout, plan, build, review: each hands over to the next, and what was built lands."""
    prompt = "\n".join(
        (
            f"in scout hand-over {SCOUT}",
            f"in plan answer {PLAN}",
            "in build write b.txt hello",
            "in build built b.txt",
            f"in review tell {APPROVE}",
        )
    )
    path = repository.configure([{"id": "t", "prompt": prompt, "workflow": "adw"}])
    ended = repository.council("run", str(path), "--json")
    assert ended.states == {"t": "landed"}, ended
    assert (repository.top / "b.txt").read_text() == "hello\n"
    await repository.assert_invariants()
