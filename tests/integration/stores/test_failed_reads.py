"""Reads that the disk fails: one line with the file and exit code 1, from any command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CommandResult, Repository
from tests.faults import strace_fails


def fails_to_read(repository: Repository, path: Path, *command: str) -> CommandResult:
    """Run a command for which each read of a file is an input/output error."""
    if (reason := strace_fails(repository.spawns.parent)) is not None:
        pytest.skip(reason)
    inject = ["-P", str(path), "-e", "trace=read,pread64", "-e", "inject=read,pread64:error=EIO"]
    argv = ["strace", "-f", "-qq", "-o", os.devnull, *inject, sys.executable, "-m", "orchestrator.cli.main", *command]
    done = subprocess.run(
        argv, cwd=repository.top, env=repository.environ, capture_output=True, text=True, check=False, timeout=100
    )
    return CommandResult(done.returncode, done.stdout, done.stderr)


@pytest.mark.extended
def test_failed_read_of_a_state_file_names_it(repository: Repository) -> None:
    """Of the state's identity and log, the list of known states, a session's log, and the run's file."""
    config = repository.configure([{"id": "t", "prompt": "print hello\nwrite t.txt x"}])
    run = repository.council("run", str(config), "--json").result["run"]
    home, state = Path(repository.environ["COUNCIL_HOME"]), repository.log.parent
    logs = state.parent / "logs" / run
    for path, named, *command in (
        (home / "known_stores", home / "known_stores", "status"),
        (state / "identity", state / "identity", "status"),
        (repository.log / "lock", repository.log, "runs"),
        (logs / "t.1.stdout", logs / "t.1.stdout", "logs", "t"),
        (config, config, "validate", str(config)),
    ):
        failed = fails_to_read(repository, path, *command)
        [line] = failed.stderr.splitlines() or failed.stdout.splitlines()
        assert (str(named) in line, "input/output error" in line.lower()) == (True, True), failed
        assert failed.code == (2 if path == config else 1), failed
    doctor = fails_to_read(repository, home / "known_stores", "doctor")
    assert f"can't read the newest run: [Errno 5] Input/output error: '{home / 'known_stores'}'" in doctor.stderr, (
        doctor
    )
