"""A store that fails once, at any of its calls, costs only time: no traceback, no lost work."""

from __future__ import annotations

import shutil

import pytest

from tests.conftest import Repository

#: Commands that read and write the state; all but the first get an interrupted run.
COMMANDS = {"run": "run {config}", "resume": "resume", "work": "work latest", "status": "status"}


@pytest.mark.extended
@pytest.mark.parametrize("step", [25, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("command", COMMANDS)
async def test_any_failing_call_costs_only_time(repository: Repository, command: str, step: int) -> None:
    """The command ends with one line, or ignores the failure; `resume` completes the run."""
    config = str(repository.configure([{"id": "one", "prompt": "append a.txt 1"}]))
    marker = repository.spawns.parent / "failed"
    call, has_failed = 1, True
    while has_failed:
        repository.remember()
        if command != "run":
            repository.council("run", config, failpoints="run.leader_elected=kill")
        marker.unlink(missing_ok=True)
        repository.environ["COUNCIL_TEST_FAILING_CALL"] = f"{call} {marker}"
        ended = repository.council(*COMMANDS[command].format(config=config).split())
        del repository.environ["COUNCIL_TEST_FAILING_CALL"]
        has_failed = marker.exists()
        success = 130 if command == "status" else 0  # the run is interrupted
        assert ended.code in {success, 1}, (call, ended)
        assert "Traceback" not in ended.stderr, (call, ended)
        assert ended.code == success or "it does not answer" in ended.stderr, (call, ended)
        assert len(ended.stderr.splitlines()) <= 1, (call, ended)
        completed = repository.council("resume", "--json")
        if "there is no run" in completed.result.get("error", ""):  # its first commit failed
            completed = repository.council("run", config, "--json")
        assert (completed.code, completed.states) == (0, {"one": "landed"}), (call, ended, completed)
        await repository.assert_invariants()
        shutil.rmtree(repository.environ["COUNCIL_HOME"])
        shutil.rmtree(repository.top / ".council")
        call += step
    assert call > step, "no call failed"
