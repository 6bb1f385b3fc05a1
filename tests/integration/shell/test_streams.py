"""Broken streams, files and machines give a message and an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import RefusedError, to_path_refusal
from tests.conftest import CommandResult, Repository

pytestmark = pytest.mark.extended_rest


def through_shell(repository: Repository, arguments: str, **variables: str) -> CommandResult:
    """Run the command with the shell's redirections."""
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "{sys.executable}" -m orchestrator.cli.main {arguments}'],
        cwd=repository.top,
        env={**repository.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return CommandResult(done.returncode, done.stdout, done.stderr)


@pytest.mark.extended
@pytest.mark.parametrize(
    "closed", ["<&- >&- 2>&-", *(pytest.param(one, marks=pytest.mark.slow) for one in ("<&-", ">&-", "2>&-"))]
)
async def test_closed_streams_are_handled(repository: Repository, closed: str) -> None:
    """A run without streams lands, and no output has gone into a file that it opened."""
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    ended = through_shell(repository, f"run {config} {closed}")
    assert (ended.code, ended.stderr) == (0, "")
    await repository.assert_invariants()
    assert repository.council("status", "--json").result["damage"] == []


@pytest.mark.extended_variants
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
@pytest.mark.parametrize(("command", "code"), [("validate council.yaml", 1), ("--help", 1)])
def test_incomplete_output_is_reported(repository: Repository, command: str, code: int) -> None:
    """Output truncated by a full disk does not count as complete."""
    repository.configure([{"id": "one", "prompt": "write one.txt 1"}]).rename(repository.top / "council.yaml")
    ended = through_shell(repository, f"{command} >/dev/full")
    assert ended == CommandResult(code, "", f"council: can't write to standard output: {os.strerror(errno.ENOSPC)}\n")


def test_terminal_without_unicode_works(repository: Repository) -> None:
    ended = through_shell(repository, "adapters", PYTHONIOENCODING="ascii")
    assert ended.code == 0, ended
    assert ended.stdout.isascii()
    assert "\\u2192" in ended.stdout


@pytest.mark.parametrize(
    "command",
    ["run council.yaml", *(pytest.param(one, marks=pytest.mark.slow) for one in ("init other.yaml", "run --task x"))],
)
def test_missing_git_is_reported(repository: Repository, tmp_path: Path, command: str) -> None:
    """Each command that needs git names it, with the remedy."""
    repository.configure([{"id": "one", "prompt": "write one.txt 1"}]).rename(repository.top / "council.yaml")
    empty = tmp_path / "empty"
    empty.mkdir()
    ended = through_shell(repository, command, PATH=str(empty))
    assert ended.code == 2, ended
    assert ended.stderr == "council: git is not on PATH: install git 2.38 or newer\n"


@pytest.mark.parametrize(
    "command", ["validate", *(pytest.param(one, marks=pytest.mark.slow) for one in ("doctor", "run --dry-run"))]
)
def test_pipe_in_place_of_the_file_does_not_hang(repository: Repository, command: str) -> None:
    """A repository may contain anything under the default file name."""
    os.mkfifo(repository.top / "council.yaml")
    ended = through_shell(repository, command)
    assert ended.code in {1, 2}, ended
    assert "not a regular file" in ended.stdout + ended.stderr


def test_refused_system_calls_are_no_internal_error() -> None:
    """With its position and a remedy; other exceptions may be internal errors."""
    refused = to_path_refusal(PermissionError(errno.EACCES, "Permission denied", "/home/.council"))
    assert isinstance(refused, RefusedError)
    assert str(refused) == "/home/.council: permission denied: grant yourself access to it"
    assert to_path_refusal(FileNotFoundError(errno.ENOENT, "No such file or directory", "/x")) is None
    assert to_path_refusal(OSError("anything")) is None


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    "command",
    ["status", "run --task x", *(pytest.param(one, marks=pytest.mark.slow) for one in ("init", "doctor", "clean"))],
)
def test_deleted_current_folder_is_reported(repository: Repository, command: str) -> None:
    """Another process may have removed it under the shell."""
    program = Path(sys.executable).with_name("council")
    done = subprocess.run(
        ["/bin/sh", "-c", f'mkdir gone; cd gone; rmdir ../gone; exec "{program}" {command}'],
        cwd=repository.top,
        env=repository.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    reported = "council: the current folder no longer exists: cd to an existing folder\n"
    assert (done.returncode, done.stderr) == (2, reported)
