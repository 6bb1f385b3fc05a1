"""Kills during the creation or restore of a checkpoint: the result is the old or the new state."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests.conftest import Repository
from tests.crash.test_crashes import CHECKPOINT_FAILPOINTS, chain_and_sides, configure, resume_and_check


@pytest.mark.extended
@pytest.mark.parametrize(
    "name",
    [
        "checkpoint.restored",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in sorted(CHECKPOINT_FAILPOINTS - {"checkpoint.restored"})
        ),
    ],
)
async def test_restore_killed_at_a_failpoint_is_complete_or_absent(repository: Repository, name: str) -> None:
    """In both cases the run resumes and lands each task once."""
    config = configure(repository, chain_and_sides(4))
    assert repository.council("run", str(config), failpoints="session.spawned=kill@2").code == -signal.SIGKILL
    made = repository.council("checkpoint", "create", "--json").result
    before = _states(repository)
    assert repository.council("cancel", "--yes").code == 0
    cancelled = _states(repository)
    killed = repository.council("checkpoint", "restore", made["id"], failpoints=f"{name}=kill")
    assert killed.code == -signal.SIGKILL, killed
    assert _states(repository) == (before if name == "checkpoint.restored" else cancelled)
    assert repository.council("checkpoint", "restore", made["id"]).code == 0
    assert _states(repository) == before
    await resume_and_check(repository, 4)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("landing.pushed", "run.leader_elected", "recovery.session_reaped", "landing.intended")
    ],
)
async def test_run_killed_after_a_restore_resumes(repository: Repository, name: str) -> None:
    """The resume of a restored run is killed like any other."""
    config = configure(repository, chain_and_sides(4))
    assert repository.council("run", str(config), failpoints="landing.recorded=kill").code == -signal.SIGKILL
    made = repository.council("checkpoint", "create", "--json").result
    assert repository.council("resume", failpoints="session.spawned=kill@2").code == -signal.SIGKILL
    assert repository.council("checkpoint", "restore", made["id"]).code == 0
    assert repository.council("resume", failpoints=f"{name}=kill").code == -signal.SIGKILL
    assert repository.council("checkpoint", "restore", made["id"]).code == 0
    await resume_and_check(repository, 4)


def _states(repository: Repository) -> dict[str, Any]:
    return repository.council("status", "--json").states
