"""Python code in the current folder, which may be anybody's repository, is never imported by our programs."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.json_output import bridge_command
from orchestrator.cli.commands.setup.adapter_test import contract_command
from orchestrator.system import process
from orchestrator.system.process import internal_program
from tests.conftest import Repository

#: Names that our programs import, of this package and of others.
MODULES = ("orchestrator", "adapters", "json", "typing", "click", "pytest", "anyio", "sitecustomize", "usercustomize")


@pytest.fixture
def trap(tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fill the current folder with modules that leave a trace when imported; return the trace."""
    folder, trace = tmp_path / "repository", tmp_path / "trace"
    folder.mkdir()
    code = f"open({str(trace)!r}, 'a').write(__name__ + '\\n')\n"
    for name in (*MODULES, "conftest"):
        (folder / f"{name}.py").write_text(code)
    for name in ("orchestrator", "adapters"):
        (folder / f"{name}.py").unlink()
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(code)
    monkeypatch.chdir(folder)
    return trace


def own(module: str, function: str) -> list[str]:
    """Return the command line of our program that reads its job from standard input."""
    return internal_program(module, function)[0]


COMMANDS = {
    "the adapter contract": contract_command(),
    "a bridge": [*bridge_command("acp", "--ready")],
    "the command of a session": [*own("orchestrator.__main__", "main"), "--help"],
    "the supervisor": own("orchestrator.sessions.supervision.supervisor", "main"),
    "the walker": own("orchestrator.repo.worktrees.files.scan_worker", "serve"),
    "the console script": [sys.executable, str(Path(sys.executable).with_name("council")), "adapters", "--json"],
}


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    "what",
    [
        pytest.param(name, marks=pytest.mark.slow if name in {"the adapter contract", "a bridge"} else ())
        for name in COMMANDS
    ],
)
def test_started_processes_import_nothing_from_the_current_folder(
    trap: Path, environ: dict[str, str], what: str
) -> None:
    """Whatever the program then reports about its input."""
    spec = {"use": "command", "options": {"argv": ["true"]}, "plugin_folders": []}
    done = subprocess.run(
        COMMANDS[what], env=environ, input=json.dumps(spec), capture_output=True, text=True, check=False
    )
    assert not trap.exists(), (trap.read_text(), done)
    if what == "the adapter contract":
        assert len(json.loads(done.stdout)["results"]) > 30


def test_python_m_imports_nothing_from_the_current_folder(trap: Path, environ: dict[str, str]) -> None:
    """Python itself would run a package `orchestrator` there in place of ours; `-P` turns that off."""
    package = Path("orchestrator")
    (package / "__init__.py").unlink()
    package.rmdir()
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "--help"], env=environ, capture_output=True, text=True, check=False
    )
    assert not trap.exists(), trap.read_text()
    assert done.stdout.startswith("Usage: council"), done


@pytest.mark.extended
async def test_adapter_contract_runs_no_conftest_of_a_shared_folder(
    trap: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    """For example one that another user of the machine left in `/tmp`."""
    spec = {"use": "command", "options": {"argv": ["true"]}, "plugin_folders": []}
    shared = {**environ, "TMPDIR": str(Path.cwd())}
    done = await process.run(contract_command(), env=shared, cwd=tmp_path, input=json.dumps(spec).encode())
    assert json.loads(done.stdout)["results"]
    assert not trap.exists(), (trap.read_text(), shlex.join(contract_command()))


@pytest.mark.extended_variants
@pytest.mark.parametrize("entry", [".", "", "tools"])
def test_no_program_of_the_repository_is_run_by_name(repository: Repository, tmp_path: Path, entry: str) -> None:
    """With a relative folder on PATH, or an empty entry, which is the current folder."""
    ran = tmp_path / "ran"
    for name in ("git", "bwrap", "claude", "codex", "gemini", "rm", "sh"):
        program = repository.top / entry / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ntouch {ran}\n")
        program.chmod(0o755)
    repository.environ["PATH"] = f"{entry}:{repository.environ['PATH']}"
    config = repository.configure([{"id": "t", "prompt": "write a.txt a"}])
    for command in (["doctor"], ["adapters"], ["run", str(config)], ["status"]):
        repository.council(*command)
    assert not ran.exists()
