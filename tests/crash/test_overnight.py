"""A night with agents of every kind: each task ends as expected, and every commit of the target passes the tests."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CommandResult, Repository
from tests.crash.overnight import (
    PYTEST,
    UNITTEST,
    Operator,
    OvernightRun,
    few_tasks,
    is_running_elsewhere,
    many_tasks,
    read_task_states,
    resume_to_end,
)
from tests.crash.sdists import download, unpack

PROJECT = "pluggy==1.6.0"


@pytest.fixture
def person(repository: Repository) -> Iterator[Operator]:
    """Return an operator in another terminal."""
    made = Operator(repository)
    yield made
    made.done.set()
    made.join()


@pytest.fixture
def short(repository: Repository) -> OvernightRun:
    """Return nine tasks in a small repository."""
    repository.commit({"test_app.py": UNITTEST.template.format(name="app", claim="True")})
    return OvernightRun(repository, UNITTEST, *few_tasks(UNITTEST, repository.spawns))


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the source archive of a project with fast tests."""
    return download(PROJECT, tmp_path_factory.mktemp("archive"))


@pytest.fixture
def long(archive: Path, repository: Repository) -> OvernightRun:
    """Return forty tasks in a real project."""
    unpack(archive, repository)
    night = OvernightRun(repository, PYTEST, *many_tasks(PYTEST, repository.spawns, repository.top))
    assert len(night.jobs) == 40
    return night


async def run_uninterrupted(night: OvernightRun, person: Operator) -> None:
    """Run without a crash."""
    config = night.prepare()
    person.may_cancel.set()
    person.start()
    ended = night.repository.council("run", str(config), "--json", timeout=400)
    person.done.set()
    person.join()
    await night.assert_ended_well(ended)


async def run_with_kills(
    night: OvernightRun, person: Operator, kills: int, dice: random.Random, longest: float
) -> None:
    """Kill the owner of the run at random times, `kills` times, then let the last one finish."""
    repository, command = night.repository, ["run", str(night.prepare()), "--json"]
    person.start()
    while kills:
        child = repository.start(*command)
        try:
            ended = CommandResult(-1, *child.communicate(timeout=dice.uniform(0.3, longest)))
            assert is_running_elsewhere(CommandResult(child.returncode, ended.stdout, ended.stderr)), ended
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.communicate()
            kills -= 1
        # Without a recorded run there is nothing to resume.
        command = ["resume", "--json"] if await read_task_states(repository) else command
    person.may_cancel.set()
    ended = resume_to_end(repository) if command[0] == "resume" else repository.council(*command, timeout=400)
    person.done.set()
    person.join()
    await night.assert_ended_well(ended)


@pytest.mark.slow
async def test_short_overnight_run_lands_everything(short: OvernightRun, person: Operator) -> None:
    """Tasks that succeed, crash, hang, conflict, break the tests, are cancelled and retried."""
    await run_uninterrupted(short, person)


@pytest.mark.slow
async def test_short_overnight_run_with_kills_lands_everything(short: OvernightRun, person: Operator) -> None:
    """The results are the same with three killed owners."""
    await run_with_kills(short, person, 3, random.Random(0), 2.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_long_overnight_run_lands_everything(long: OvernightRun, person: Operator) -> None:
    """Forty tasks of every kind on a real project with its own tests as checks."""
    await run_uninterrupted(long, person)
