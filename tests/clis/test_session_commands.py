"""Session commands of real CLIs, and the isolation between sessions."""

from __future__ import annotations

import json

import pytest

from orchestrator import Council
from orchestrator.protocols import Capability
from tests.clis.conftest import Stage
from tests.clis.programs import Program
from tests.fake_session_service import FakeSessionService, use_in_runs

pytestmark = [pytest.mark.clis, pytest.mark.timeout(300)]


async def test_session_command_of_an_agent_sees_only_its_own_session(
    stage: Stage, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shell has `council`, its model the tools, and files of other sessions are read-only."""
    for name, value in stage.repository.environ.items():
        monkeypatch.setenv(name, value)
    service = FakeSessionService(foreign_owners={"theirs.txt": "run-0/other.1"})
    use_in_runs(service, monkeypatch)
    prompt = "write theirs.txt hi\nrun council lock ours.txt\nwrite ours.txt hi"
    path = stage.configure([{"id": "task", "adapter": next(iter(stage.programs)), "timeout": "3m", "prompt": prompt}])
    async with Council.open(path) as council:
        report = await council.runs.run()
    assert [task.status for task in report.tasks] == ["landed"], report
    names = stage.repository.git("ls-tree", "--name-only", "main").splitlines()
    assert ("ours.txt" in names, "theirs.txt" in names) == (True, not program.can(Capability.PRE_EDIT))
    reported = [json.dumps(one.body) for one in stage.server.requests if one.dialect]
    assert any("theirs.txt belongs to run-0/other.1" in one for one in reported) is program.can(Capability.PRE_EDIT)
    if program.can(Capability.MCP):  # and the tool calls with it
        # A CLI with tool search lists only the server to the model, once it has started.
        known = ("Lock files for this session", "Other agents work on the same")
        assert not program.keeps_path or any(part in one for one in reported for part in known)
        asked = [arguments for _, command, arguments in service.asked if command == "lock"]
        assert asked == ([{"paths": ["ours.txt"]}] if program.keeps_path else [])
    await stage.assert_clean()
