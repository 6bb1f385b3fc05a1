"""The invariant checker detects each violation."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Repository

CANARY = "canary-value-0451"


def in_a_log(repository: Repository, run: str, house: Path) -> None:
    """Plant a secret in a program's output."""
    log = repository.top / f".council/logs/{run}/t.1.stdout"
    log.write_text(f"it is {CANARY}\n")


def in_a_commit(repository: Repository, run: str, house: Path) -> None:
    """Plant a secret in an unreferenced object."""
    command = ["git", "hash-object", "-w", "--stdin"]
    subprocess.run(command, cwd=house / "trusted.git", input=CANARY.encode(), check=True, capture_output=True)


def worktree_of_a_check(repository: Repository, run: str, house: Path) -> None:
    """Leave the folder of a check behind."""
    (house / "sessions" / run / "t.1.check").mkdir(parents=True)


def slot_without_owner(repository: Repository, run: str, house: Path) -> None:
    """Leave a worktree slot without an owner, and with unknown content."""
    next(house.glob("slots/*/record.json")).unlink()


def slot_of_another_session(repository: Repository, run: str, house: Path) -> None:
    """Leave a session that names another slot than the slot that names it."""
    session = house / "sessions" / "another" / "t.1"
    session.mkdir(parents=True)
    slot_without_owner(repository, run, house)
    for user in house.glob("slots/*/user"):
        user.write_text(str(session))


def half_deleted(repository: Repository, run: str, house: Path) -> None:
    """Leave files in the trash."""
    (house / "trash" / "1-0123456789abcdef" / "tree").mkdir(parents=True)


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("act", "number"),
    [
        (in_a_log, 14),
        (in_a_commit, 14),
        (worktree_of_a_check, 10),
        (slot_without_owner, 10),
        (slot_of_another_session, 10),
        (half_deleted, 10),
    ],
)
async def test_violation_is_named(
    repository: Repository, act: Callable[[Repository, str, Path], None], number: int
) -> None:
    ended = repository.council("run", str(repository.configure([{"id": "t", "prompt": "write t.txt x"}])), "--json")
    await repository.assert_invariants(canaries=[CANARY])
    act(repository, ended.result["run"], Path(ended.result["repository"]).parent)
    with pytest.raises(AssertionError, match=rf"^{number}: ") as found:
        await repository.assert_invariants(canaries=[CANARY])
    assert len(str(found.value).splitlines()) == 1


async def test_process_of_a_check_is_found_anywhere(repository: Repository) -> None:
    """By its environment, if it has left the worktree."""
    ended = repository.council("run", str(repository.configure([{"id": "t", "prompt": "write t.txt x"}])), "--json")
    place = Path(ended.result["repository"]).parent / "sessions" / ended.result["run"] / "t.1.check" / "prompt.md"
    with subprocess.Popen(["sleep", "60"], cwd="/", env={"COUNCIL_PROMPT_FILE": str(place)}) as left:
        try:
            with pytest.raises(AssertionError, match=rf"^9: process {left.pid} "):
                await repository.assert_invariants()
        finally:
            left.kill()
    await repository.assert_invariants()
