"""A run with a partly lost record continues after a repair."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.conftest import Repository
from tests.waiting import wait_for


def lose_from(repository: Repository, event: bytes) -> None:
    """Truncate the log from the first commit with a matching event."""
    (segment,) = (repository.top / ".council/state").glob("*/*.jsonl")
    lines = segment.read_bytes().splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if event in line)
    segment.write_bytes(b"".join(lines[:first]))


def sessions(repository: Repository) -> set[str]:
    """Return the existing session folders."""
    return {path.name for path in Path(repository.environ["COUNCIL_HOME"]).glob("*/sessions/*/*")}


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("failpoint", "kept"), [("session.ended=kill", {"two.1"}), ("worktree.partly_made=kill", set[str]())]
)
def test_run_with_a_lost_attempt_continues_after_a_repair(
    repository: Repository, failpoint: str, kept: set[str]
) -> None:
    """The rejection names the repair; the unknown session costs no attempt, and its content stays."""
    path = repository.configure([{"id": "two", "prompt": "write two.txt 2", "attempts": 1}])
    assert repository.council("run", str(path), failpoints=failpoint).code == -signal.SIGKILL
    assert sessions(repository) == {"two.1"}
    lose_from(repository, b'"task.started"')
    refused = repository.council("resume", "--json")
    assert (refused.code, refused.result["status"]) == (2, "refused"), refused
    assert refused.result["remedy"].startswith("recover the readable part with `council state verify --repair`")
    assert refused.result["error"].count(".jsonl, byte") == 1
    assert repository.council("state", "verify", "--repair").code == 0
    resumed = repository.council("resume", "--json")
    assert (resumed.code, resumed.states) == (0, {"two": "landed"}), resumed
    assert resumed.result["tasks"][0]["attempts"] == 1
    assert sessions(repository) == kept
    listed = repository.council("salvage", "list", "--json").result["preserved"]
    assert [one["name"] for one in listed if one["worktree"]] == ["two/1/worktree"] * len(kept)
    assert (repository.top / "two.txt").read_text().strip() == "2"


def test_run_with_a_truncated_log_reports_the_loss(repository: Repository) -> None:
    """With the way to continue."""
    child = repository.start("run", str(repository.configure([{"id": "a", "prompt": "write a.txt a\nhang"}])))
    wait_for(lambda: repository.spawns.exists() and " a " in repository.spawns.read_text())
    lose_from(repository, b'"task.started"')
    assert repository.council("cancel", "a").code != 0
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert "the log is shorter than the part that was read before: restore" in stderr
    assert "`council state verify --repair`" in stderr
    assert "Some recorded state is lost." in stderr
    assert "Nothing that was recorded is lost" not in stderr
