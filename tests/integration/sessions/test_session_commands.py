"""Sessions of a run call the session API by the means of their adapter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Council
from orchestrator.api.execution import leadership
from orchestrator.engine.reports.report import RunReport
from orchestrator.engine.run_context import RunContext
from tests.conftest import Repository
from tests.fake_session_service import FakeSessionService, use_in_runs
from tests.fakes.script import ROOT, install


@pytest.fixture
def session_api() -> FakeSessionService:
    """Yield a session API whose files belong to another owner."""
    return FakeSessionService(foreign_owners={"theirs.txt": "run-0/other.1"})


async def run(
    repository: Repository, folder: Path, monkeypatch: pytest.MonkeyPatch, prompt: str, **settings: Any
) -> RunReport:
    """Run one task with a fake Claude Code, in the sandbox."""
    install(folder, "claude", "tests.fakes.claude")
    monkeypatch.setenv("PATH", f"{folder}:{repository.environ['PATH']}")
    config = repository.configure(
        [{"id": "t", "prompt": prompt, "attempts": 1}],
        adapters={"claude": {"use": "claude-code"}},
        readable=[str(folder), sys.prefix, str(ROOT / "tests"), str(ROOT / "orchestrator")],
        **settings,
    )
    async with Council.open(config) as council:
        return await council.runs.run()


async def test_session_requests_from_shell_and_hook(
    repository: Repository, session_api: FakeSessionService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is identified; files of other owners are not written."""
    use_in_runs(session_api, monkeypatch)
    prompt = "write theirs.txt no\nrun council lock ours.txt\nwrite ours.txt yes\ntell told.json"
    report = await run(repository, tmp_path / "bin", monkeypatch, prompt)
    assert [task.status for task in report.tasks] == ["landed"], report
    assert repository.git("ls-tree", "--name-only", "main").splitlines() == [
        "README.md",
        "ours.txt",
        "src",
        "told.json",
    ]
    assert [(str(session), command) for session, command, _ in session_api.asked] == [
        (f"{report.run}/t.1", "check_edit"),
        (f"{report.run}/t.1", "lock"),
        (f"{report.run}/t.1", "check_edit"),
        (f"{report.run}/t.1", "begin_stop"),
    ]
    argv = json.loads((repository.top / "told.json").read_text())["argv"]
    assert {"--settings", "--mcp-config", "--allowedTools=mcp__council"} <= set(argv)
    await repository.assert_invariants()


@pytest.mark.extended
async def test_lock_timeout_comes_from_the_file(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the session sets none."""
    reported: list[float] = []

    def seat(shop: RunContext, *rest: Any) -> RunContext:
        reported.append(rest[-1])
        return shop

    monkeypatch.setattr(leadership, "with_session_service", seat)
    await run(repository, tmp_path / "bin", monkeypatch, "write a.txt x", coordination={"lock_timeout": "2s"})
    assert reported == [2.0]


@pytest.mark.extended
async def test_session_without_a_session_api_gets_nothing(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither server nor hook."""
    prompt = "write theirs.txt yes\ntell told.json"
    report = await run(repository, tmp_path / "bin", monkeypatch, prompt, coordination={"tools": False})
    assert [task.status for task in report.tasks] == ["landed"], report
    argv = json.loads((repository.top / "told.json").read_text())["argv"]
    assert not {"--settings", "--mcp-config", "--allowedTools=mcp__council"} & set(argv)
    await repository.assert_invariants()


def test_server_name_of_the_user_is_kept(repository: Repository) -> None:
    """Ours would replace it."""
    config = repository.configure([{"id": "t", "prompt": "x"}], mcp_servers={"council": {"command": ["x"]}})
    ended = repository.council("validate", str(config))
    assert ended.code == 2
    assert "'council' is reserved for the built-in server" in ended.stderr
    assert "choose another name" in ended.stderr
