"""What a person lands by hand is found, while the run goes on."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests.conftest import Repository
from tests.waiting import wait_for


@pytest.mark.parametrize("squashed", [True, False])
async def test_work_that_a_person_has_merged_counts_as_landed(repository: Repository, squashed: bool) -> None:
    """Though its checks did not pass, and no trailer says so; what needs it goes on."""
    tasks: list[dict[str, Any]] = [
        {"id": "built", "prompt": "write built.txt x", "checks": ["false"], "attempts": 1},
        {"id": "more", "prompt": "write more.txt x", "needs": ["built"]},
        {"id": "long", "prompt": "hang"},
    ]
    child = repository.start("run", str(repository.configure(tasks, coordination={"sweep": "200ms"})), "--json")
    wait_for(lambda: repository.council("status", "--json").result.get("tasks", [{}])[0].get("state") == "failed")
    result = repository.council("status", "--json").result
    repository.git("fetch", "--quiet", result["repository"], result["tasks"][0]["branch"])
    if squashed:
        repository.git("merge", "--quiet", "--squash", "FETCH_HEAD")
        repository.git("commit", "--quiet", "--message", "by hand")
    else:
        repository.git("merge", "--quiet", "--no-ff", "--message", "by hand", "FETCH_HEAD")
    repository.remember()
    by_hand = repository.git("rev-parse", "HEAD")
    wait_for(lambda: repository.council("status", "--json").states["more"] == "landed")
    found = repository.council("status", "--json").result["tasks"][0]
    assert (found["state"], found["landed"], found["reason"]) == ("landed", by_hand, "somebody else has landed it")
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    await repository.assert_invariants()
