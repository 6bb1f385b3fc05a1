"""A user attaches to the conversation of a real CLI from a terminal."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from tests.clis.conftest import SELECTED, Stage
from tests.terminal import Terminal
from tests.waiting import wait_for

pytestmark = [pytest.mark.clis, pytest.mark.timeout(500)]

_UP = "\x1b[A"


def _work_in_claude_code(terminal: Terminal) -> None:
    """It asks only whether to use the key in its environment."""
    _wait_for_text(terminal, "Do you want to use this API key?")
    terminal.type(_UP)
    _wait_for_text(terminal, "\N{HEAVY RIGHT-POINTING ANGLE QUOTATION MARK ORNAMENT} Yes")
    terminal.type("\r")
    _wait_for_text(terminal, "Wrote 1 line to first.txt")
    _wait_for_text(terminal, "bypass permissions on")
    _enter(terminal, "write second.txt 2", "write second.txt 2")
    _wait_for_text(terminal, "Wrote 1 line to second.txt")
    _enter(terminal, "/exit", "Exit the CLI")


def _work_in_codex(terminal: Terminal) -> None:
    """It asks to open the worktree without trust, and offers a newer model."""
    _answer(terminal, "Open restricted", "\r")
    _answer(terminal, "Use existing model", "2")
    _wait_for_text(terminal, "Added first.txt")
    _enter(terminal, "write second.txt 2", "write second.txt 2")
    _wait_for_text(terminal, "Added second.txt")
    _enter(terminal, "/quit", "exit Codex")


_DIALOGUES: Final = {"claude-code": _work_in_claude_code, "codex": _work_in_codex}


@pytest.mark.parametrize("name", [name for name in _DIALOGUES if name in SELECTED])
async def test_user_finishes_the_work_of_a_running_session(stage: Stage, name: str, tmp_path: Path) -> None:
    """It is stopped; the CLI opens its conversation, does what the user types, and the work lands."""
    folder = tmp_path / "signals"
    folder.mkdir()
    # Codex continues after ten seconds of a command.
    prompt = "write first.txt 1" + f"\nrun touch {folder}/waits; sleep 600" * 20
    started = stage.start(prompt, {"writable": [str(folder)]})
    try:
        wait_for((folder / "waits").exists, 150)
        terminal = Terminal(["attach", "task", "--then", "land"], stage.repository.top, stage.repository.environ)
        try:
            _DIALOGUES[name](terminal)
            assert terminal.wait() == 0, terminal.text
        finally:
            terminal.close()
    except BaseException:
        started.kill()
        raise
    ended = stage.end(started)
    assert ended.states == {"task": "landed"}, stage.diagnostics(ended)
    assert stage.repository.git("show", "main:first.txt", "main:second.txt") == "1\n2"
    first, second = (await stage.task()).attempts
    assert first.session == second.session
    assert (first.attached, second.attached) == (False, True)
    await stage.assert_clean()


def _wait_for_text(terminal: Terminal, text: str) -> None:
    try:
        wait_for(lambda: text in terminal.text or not terminal.is_running, 60)
    except AssertionError:
        raise AssertionError(terminal.text) from None
    assert text in terminal.text, terminal.text


def _answer(terminal: Terminal, question: str, key: str) -> None:
    """Press a key until a question is answered: a CLI discards keys that come before it reads them."""
    _wait_for_text(terminal, question)
    deadline = time.monotonic() + 60
    while question in terminal.text and terminal.is_running:
        assert time.monotonic() < deadline, terminal.text
        terminal.type(key)
        with suppress(AssertionError):
            wait_for(lambda: question not in terminal.text, 5)


def _enter(terminal: Terminal, text: str, shown: str) -> None:
    """Type a line, and press Enter once it is shown."""
    terminal.type(text)
    _wait_for_text(terminal, shown)
    terminal.type("\r")
