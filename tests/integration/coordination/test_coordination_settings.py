"""Settings of a shared run are recorded with it, and validated before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.api.council import Council
from orchestrator.protocols import Key
from tests.conftest import Repository

TASK = [{"id": "a", "prompt": "write a.txt a"}]


async def recorded(repository: Repository) -> dict[str, Any]:
    async with Council.open(repository.top, environ=repository.environ) as council:
        document = await council.state.get(Key("run", await council.runs.newest()))
    assert document is not None
    found: dict[str, Any] = document.value["coordination"]
    return found


@pytest.mark.extended
async def test_run_records_the_settings_of_its_creation(repository: Repository) -> None:
    """The file's, overridden by the environment, overridden by options."""
    file = repository.configure(
        TASK, coordination={"heartbeat_interval": "1s", "stale_after": "9s", "owner_stale_after": "9s"}
    )
    repository.environ["SHARED_STATE_STALE_THRESHOLD_MS"] = "7000"
    assert repository.council("run", str(file), "--max-retries", "5").code == 0
    found = await recorded(repository)
    assert (found["heartbeat_interval"], found["stale_after"], found["max_retries"]) == (1.0, 7.0, 5)


def test_invalid_environment_prevents_a_run(repository: Repository) -> None:
    """Also a dry run, and a resume."""
    file = repository.configure(TASK)
    assert repository.council("run", str(file)).code == 0
    repository.environ["SHARED_STATE_MAX_RETRIES"] = "many"
    for words in (["run", str(file)], ["run", str(file), "--dry-run"], ["resume"]):
        ended = repository.council(*words)
        assert ended.code == 2, words
        assert "invalid value 'many' of SHARED_STATE_MAX_RETRIES" in ended.stderr


@pytest.mark.extended_variants
@pytest.mark.parametrize(("retries", "attempts"), [(0, 1), (1, 2), (5, 4)])
def test_number_of_retries_is_a_limit(repository: Repository, retries: int, attempts: int) -> None:
    """A task that always fails is retried that often, or as often as its own setting says, whichever is less."""
    file = repository.configure([{"id": "a", "prompt": "exit 1", "attempts": 4, "backoff": {"initial": "1ms"}}])
    repository.environ["SHARED_STATE_MAX_RETRIES"] = str(retries)
    [task] = repository.council("run", str(file), "--json").result["tasks"]
    assert (task["status"], task["attempts"]) == ("failed", attempts)


@pytest.mark.extended_variants
@pytest.mark.parametrize(("retries", "attempts"), [(None, 3), (0, 1), (1, 2), (5, 6)])
@pytest.mark.parametrize("place", ["variable", "option", "file"])
def test_task_without_retries_uses_the_setting(
    repository: Repository, place: str, retries: int | None, attempts: int
) -> None:
    """From wherever it is set; without it, three times; a dry run shows the number."""
    in_file = place == "file" and retries is not None
    settings: dict[str, Any] = {"coordination": {"max_retries": retries}} if in_file else {}
    file = repository.configure([{"id": "a", "prompt": "exit 1", "backoff": {"initial": "1ms"}}], **settings)
    words = ["--max-retries", str(retries)] if place == "option" and retries is not None else []
    if place == "variable" and retries is not None:
        repository.environ["SHARED_STATE_MAX_RETRIES"] = str(retries)
    [wave] = repository.council("run", str(file), *words, "--dry-run", "--json").result["waves"]
    assert [one["attempts"] for one in wave["tasks"]] == [attempts]
    [task] = repository.council("run", str(file), *words, "--json").result["tasks"]
    assert (task["status"], task["attempts"]) == ("failed", attempts)
