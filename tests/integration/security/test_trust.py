"""Requests of a repository's file beyond the sandbox are confirmed before any of its programs runs."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandResult, Repository
from tests.sandboxes import needs_sandbox
from tests.terminal import Terminal
from tests.waiting import wait_for

pytestmark = [pytest.mark.extended_rest, needs_sandbox]

COMMANDS = (("doctor",), ("adapters",), ("run",), ("run", "--dry-run"), ("adapters", "test", "evil", "--no-live"))


@pytest.fixture
def cloned(repository: Repository) -> Repository:
    """Return a repository cloned with a file, for a user without confirmations."""
    del repository.environ["COUNCIL_TRUST"]
    repository.environ["XDG_CONFIG_HOME"] = str(repository.top.parent / "config")
    return repository


def write_config(repository: Repository, **settings: Any) -> Path:
    """Write the repository's council.yaml with a program that leaves a trace; return the trace."""
    trace = repository.top.parent / "trace"
    program = repository.top / "evil"
    program.write_text(f'#!/bin/sh\necho "$*" >> "{trace}"\n')
    program.chmod(0o755)
    config = {
        "version": 1,
        "adapters": {"evil": {"use": "claude-code", "bin": str(program)}},
        "tasks": [{"id": "t", "prompt": "x"}],
        **settings,
    }
    (repository.top / "council.yaml").write_text(json.dumps(config))
    return trace


def printed(ended: CommandResult) -> str:
    return ended.stdout + ended.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_unconfirmed_programs_of_a_file_are_not_run(cloned: Repository, command: tuple[str, ...]) -> None:
    """Without a terminal there is one error, with the requests and the remedy."""
    trace = write_config(cloned)
    ended = cloned.council(*command)
    assert ended.code == 2, ended
    assert f"adapters.evil.bin: {cloned.top}/evil" in printed(ended)
    assert "--trust" in printed(ended)
    assert not trace.exists()


def test_confirmation_is_remembered_and_only_new_requests_are_asked(cloned: Repository) -> None:
    """In a private file of the user, outside of the repository."""
    trace = write_config(cloned)
    assert cloned.council("doctor", "--trust").code in {0, 1}
    assert trace.exists()
    store = cloned.top.parent / "config/council/trust.json"
    assert stat.S_IMODE(store.stat().st_mode) == 0o600
    assert list(json.loads(store.read_text())["files"]) == [os.path.realpath(cloned.top / "council.yaml")]
    assert cloned.council("doctor").code in {0, 1}
    write_config(cloned, sandbox="off")
    ended = cloned.council("doctor")
    assert ended.code == 2
    assert "sandbox: off" in printed(ended)
    assert "evil.bin" not in printed(ended)
    write_config(cloned)
    assert cloned.council("adapters").code == 0


def test_environment_confirms_without_a_terminal(cloned: Repository) -> None:
    """For this command only."""
    write_config(cloned)
    cloned.environ["COUNCIL_TRUST"] = "1"
    assert cloned.council("adapters").code == 0
    del cloned.environ["COUNCIL_TRUST"]
    assert cloned.council("adapters").code == 2


def test_harmless_or_chosen_file_needs_no_confirmation(cloned: Repository, tmp_path: Path) -> None:
    """Nor does a file that `council init` wrote here."""
    write_config(cloned, adapters={"evil": {"use": "command", "argv": ["sh", "{prompt_file}"]}})
    assert cloned.council("adapters").code == 0
    trace = write_config(cloned, repo=str(cloned.top))
    (cloned.top / "council.yaml").rename(tmp_path / "mine.yaml")
    assert cloned.council("doctor", str(tmp_path / "mine.yaml")).code in {0, 1}
    assert trace.exists()
    assert cloned.council("init", "--adapter", "command").code == 0
    text = (cloned.top / "council.yaml").read_text()
    assert "env: [HOME]" in text
    assert cloned.council("adapters").code == 0
    # Nor does its first edit: HOME is also passed to all built-in CLIs.
    (cloned.top / "council.yaml").write_text(text.replace("command:\n", "mine:\n", 1))
    assert cloned.council("adapters").code == 0


def test_reading_a_file_needs_no_confirmation(cloned: Repository) -> None:
    """`validate` runs nothing of it."""
    trace = write_config(cloned, sandbox="off")
    assert cloned.council("validate").code == 0
    assert not trace.exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_signal_ends_the_question_immediately(cloned: Repository, how: int) -> None:
    """As in any command; nothing is confirmed and no program of the file runs."""
    trace = write_config(cloned)
    terminal = Terminal(("doctor",), cloned.top, cloned.environ)
    try:
        wait_for(lambda: "Trust this file? [y/N]" in terminal.text)
        if how == signal.SIGINT:
            terminal.type("\x03")
        else:
            terminal.send_signal(how)
        assert terminal.wait(10) == 130
    finally:
        terminal.close()
    assert not trace.exists()


@pytest.mark.parametrize("answer", ["y", ""])
def test_answer_at_the_terminal_decides(cloned: Repository, answer: str) -> None:
    """No answer means no."""
    trace = write_config(cloned)
    terminal = Terminal(("doctor",), cloned.top, cloned.environ)
    try:
        wait_for(lambda: "Trust this file? [y/N]" in terminal.text)
        terminal.type(f"{answer}\n")
        code = terminal.wait()
    finally:
        terminal.close()
    assert (code == 2, trace.exists()) == ((False, True) if answer else (True, False))
