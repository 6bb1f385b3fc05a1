"""The display of a run: a table on a terminal, lines elsewhere, finally the landings and next commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Repository
from tests.terminal import Terminal
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest

Start = Callable[..., Terminal]


@pytest.fixture
def start(repository: Repository) -> Iterator[Start]:
    """Return a starter of `council` on a terminal."""
    started: list[Terminal] = []

    def begin(*arguments: str, environ: dict[str, str] | None = None, **facts: Any) -> Terminal:
        started.append(Terminal(arguments, repository.top, {**repository.environ, **(environ or {})}, **facts))
        return started[-1]

    yield begin
    for one in started:
        one.close()


def shell(repository: Repository, *tasks: dict[str, Any], **settings: Any) -> tuple[Path, Path]:
    """Write a config of shell scripts; return it, and the file that a script with `gate` waits for."""
    gate = repository.spawns.parent / "gate"
    adapters = {"sh": {"use": "command", "argv": ["sh", "{prompt_file}"]}}
    waiting = f"while ! test -e {gate}; do sleep 0.05; done"
    reported = [{**task, "prompt": task["prompt"].replace("gate", waiting)} for task in tasks]
    return repository.configure(reported, adapters=adapters, readable=[str(gate.parent)], **settings), gate


@pytest.mark.extended
async def test_run_on_a_terminal_is_a_table(repository: Repository, start: Start) -> None:
    """It shows each task with its last output and lines, survives a resize, and leaves the landings behind."""
    config, gate = shell(
        repository,
        {"id": "talker", "prompt": "echo first; echo 'Reading the model'; printf '1\\n2\\n' > a.txt; gate"},
        {"id": "tries", "prompt": "test $COUNCIL_ATTEMPT = 2 || exit 3; gate; echo x > b.txt", "attempts": 2},
        {"id": "after", "prompt": "echo c > c.txt", "needs": ["talker"]},
    )
    terminal = start("run", str(config), "-v")
    # Output, changes and running sessions are polled in separate rounds.
    whole = re.compile(r"\+2 -0 +Reading the model$")
    wait_for(lambda: bool(whole.search(terminal.row("talker"))) and "2/2" in terminal.row("tries"), 60)
    assert re.fullmatch(r"talker +build +sh +1/3 +0:\d\d +\+2 -0 +Reading the model", terminal.row("talker"))
    assert re.fullmatch(r"after +waiting +sh +waits for 'talker'", terminal.row("after"))
    assert re.search(r"^0 landed · 2 running · 1 waiting · 0:\d\d · ", terminal.text, re.MULTILINE)
    assert re.search(r"^\S+ created run \S+ \(target: main\)$", terminal.text, re.MULTILINE)
    assert not terminal.cursor_is_shown
    terminal.resize(60, 12)
    wait_for(lambda: terminal.row("task") == "task    phase    time  lines  details")
    assert terminal.row("talker").endswith("Reading the model")
    terminal.resize(110, 30)
    wait_for(lambda: "adapter" in terminal.row("task"))
    assert terminal.text.count("Reading the model") == 1
    gate.touch()
    assert terminal.wait() == 0
    assert terminal.cursor_is_shown
    assert "3 of 3 landed on main" in terminal.text
    assert re.search(r"^  talker +landed +\w{10} on main, 1 file \+2 -0$", terminal.text, re.MULTILINE)
    assert re.search(r"^  tries +landed +\w{10} on main, 1 file \+1 -0$", terminal.text, re.MULTILINE)
    assert "running" not in terminal.text
    await repository.assert_invariants()


@pytest.mark.extended
async def test_unlanded_tasks_have_their_next_commands(repository: Repository, start: Start) -> None:
    """At the end, in `status` on a terminal and in plain text: the reason, the preserved work, the next command."""
    config, _ = shell(
        repository,
        {"id": "left", "prompt": "echo left > README.md", "priority": 1},
        {"id": "right", "prompt": "echo right > README.md; sleep 1"},
        {"id": "broken", "prompt": "echo half > half.txt; exit 7", "attempts": 1},
        {"id": "child", "prompt": "true", "needs": ["broken"]},
    )
    terminal = start("run", str(config), "-v", columns=140)
    assert terminal.wait() == 1
    status, plain = start("status", columns=140), repository.council("status").stdout
    assert status.wait() == 1
    for text in (terminal.text, status.text, plain):
        assert "1 of 4 landed on main" in text
        assert "merge conflict in README.md; saved as right/conflict" in text
        assert "next: council salvage apply right/conflict --branch right-conflict\n" in text
        assert "or: council retry right\n" in text
        assert "the program ended with exit code 7; saved as broken/1" in text
        for step in ("next: council logs broken", "then: council retry broken", "or: council salvage apply broken/1"):
            assert f"{step}\n" in text
        assert "needs 'broken', which did not land" in text
    assert re.search(r"^ *left +landed +\w{10} on main, 1 file \+1 -1$", plain, re.MULTILINE)
    assert "\x1b" not in plain
    await repository.assert_invariants()
    assert repository.council("salvage", "apply", "right/conflict", "--branch", "right-conflict").code == 0


@pytest.mark.parametrize(
    "variables",
    [{"CI": "true"}, pytest.param({"TERM": "dumb"}, marks=pytest.mark.slow)],
    ids=lambda one: next(iter(one)),
)
def test_terminal_can_show_lines(variables: dict[str, str], repository: Repository, start: Start) -> None:
    """With CI set, or on a limited terminal, one line per event, without escape sequences."""
    config, _ = shell(repository, {"id": "one", "prompt": "echo 1 > one.txt"})
    terminal = start("run", str(config), environ=variables)
    assert terminal.wait() == 0, terminal.text
    assert "one: started (session 1, sh)" in terminal.text
    assert "one: landed as " in terminal.text
    assert b"\x1b" not in terminal.raw


@pytest.mark.extended
def test_no_color_affects_colours_only(repository: Repository, start: Start) -> None:
    """With NO_COLOR the table is the same in the terminal's default colours; so are a diff and a log."""
    config, gate = shell(repository, {"id": "one", "prompt": "echo 1 > one.txt; echo ready; gate"})
    terminal = start("run", str(config), environ={"NO_COLOR": "1"})
    wait_for(lambda: terminal.row("one").endswith("ready"))
    gate.touch()
    assert terminal.wait() == 0, terminal.text
    colour = re.compile(rb"\x1b\[(?:[0-9]+;)*(?:3[0-9]|4[0-9]|9[0-7])[;m]")
    assert not colour.search(terminal.raw)
    for command in ("diff", "logs"):
        shown = start(command, "one", environ={"NO_COLOR": "1"})
        assert shown.wait() == 0
        assert b"\x1b[" not in shown.raw
    wanted = start("diff", "one", "--color", environ={"NO_COLOR": "1"})
    assert wanted.wait() == 0
    assert colour.search(wanted.raw)
    coloured = start("logs", "one")
    assert coloured.wait() == 0
    assert b"\x1b[1msession 1, sh, started " in coloured.raw


def test_pipe_gets_lines(repository: Repository) -> None:
    config, _ = shell(repository, {"id": "one", "prompt": "echo 1 > one.txt"})
    ended = repository.council("run", str(config), "-v")
    assert ended.code == 0
    assert re.search(r"^\d\d:\d\d:\d\d one: started \(session 1, sh\)$", ended.stdout, re.MULTILINE)
    assert re.search(r"^  one  landed  \w{10} on main, 1 file \+1 -0$", ended.stdout, re.MULTILINE)
    assert "\x1b" not in ended.stdout


@pytest.mark.extended
def test_ctrl_c_is_answered_above_the_table(repository: Repository, start: Start) -> None:
    """The stop is reported at once, the table stays until all work is kept, and `resume` is the next command."""
    config, gate = shell(repository, {"id": "slow", "prompt": "echo 1 > one.txt; echo ready; gate"})
    terminal = start("run", str(config))
    wait_for(lambda: terminal.row("slow").endswith("ready"))
    terminal.type("\x03")
    wait_for(lambda: "stopping sessions and saving their work" in terminal.text)
    assert terminal.wait() == 130
    assert terminal.cursor_is_shown
    assert re.search(r"^  slow: interrupted|^  1 pending$", terminal.text, re.MULTILINE)
    assert "council resume" in terminal.text
    gate.touch()
    assert start("resume").wait() == 0


@pytest.mark.extended
def test_second_ctrl_c_leaves_a_usable_terminal(repository: Repository, start: Start) -> None:
    """Even after an immediate end the cursor is visible, and messages are below the table."""
    config, gate = shell(repository, {"id": "slow", "prompt": "trap '' TERM; echo ready; gate"})
    terminal = start("run", str(config))
    wait_for(lambda: terminal.row("slow").endswith("ready"))
    terminal.type("\x03")
    wait_for(lambda: "stopping sessions" in terminal.text)
    terminal.type("\x03")
    assert terminal.wait() == 130
    assert terminal.cursor_is_shown
    assert terminal.row("council: stopped; `council resume 2") != ""
    gate.touch()


@pytest.mark.extended
def test_shown_text_is_not_interpreted(repository: Repository, start: Start) -> None:
    """A program's escape sequences and markup are text in the table and the result; it can't set our title."""
    evil = r"printf '\033]0;owned\007\033[31m[red]stop[/red]\033[2J\r\n'"
    config, gate = shell(
        repository, {"id": "evil", "prompt": f"{evil}; echo 1 > one.txt; gate; {evil} >&2; exit 3", "attempts": 1}
    )
    terminal = start("run", str(config))
    wait_for(lambda: "[red]stop[/red]" in terminal.row("evil"))
    assert "]0;owned" in terminal.row("evil")
    gate.touch()
    assert terminal.wait() == 1
    assert terminal.title == ""
    assert b"\x1b]" not in terminal.raw
    assert b"\x1b[2J" not in terminal.raw


@pytest.mark.extended
async def test_run_survives_its_terminal(repository: Repository, start: Start) -> None:
    """With SIGHUP ignored, as under nohup, a closed window does not end it."""
    config, gate = shell(repository, {"id": "one", "prompt": "echo ready; gate; echo 1 > one.txt"})
    terminal = start("run", str(config), nohup=True)
    wait_for(lambda: terminal.row("one").endswith("ready"))
    terminal.hang_up()
    gate.touch()
    wait_for(lambda: repository.council("status", "--json").states["one"] == "landed")
    assert terminal.wait() == 0
    await repository.assert_invariants()


@pytest.mark.extended
async def test_watch_shows_a_run_of_another_process(repository: Repository, start: Start) -> None:
    """It is the same table; Ctrl-C ends only the display; it ends with the run and its exit code."""
    config, gate = shell(
        repository,
        {"id": "one", "prompt": "echo 'at it'; echo 1 > one.txt; gate"},
        {"id": "two", "prompt": "gate; false"},
    )
    child = repository.start("run", str(config), "--json")
    wait_for(lambda: "running" in repository.council("status").stdout)
    first = start("watch")
    wait_for(lambda: first.row("one").endswith("at it") and "+1 -0" in first.row("one"))
    first.type("\x03")
    assert first.wait() == 130
    assert re.search(r"the display ended; run \S+ continues", first.text)
    assert "interrupted" not in first.text
    assert first.cursor_is_shown
    assert child.poll() is None
    second = start("watch", "-v")
    wait_for(lambda: second.row("one").endswith("at it"))
    gate.touch()
    assert second.wait() == 1
    assert "1 of 2 landed on main" in second.text
    assert re.search(r"^ *one +landed +\w{10} on main, 1 file \+1 -0$", second.text, re.MULTILINE)
    child.communicate(timeout=30)
    assert child.returncode == 1
    assert repository.council("watch", "--json").result["status"] == "incomplete"
    await repository.assert_invariants()


@pytest.mark.extended
async def test_watch_ends_when_the_run_is_killed(repository: Repository, start: Start) -> None:
    """A killed process reports nothing: its end is detected, and the next command is `resume`."""
    config, gate = shell(repository, {"id": "one", "prompt": "echo 1 > one.txt; gate"})
    child = repository.start("run", str(config), "--json")
    wait_for(lambda: "running" in repository.council("status").stdout)
    terminal = start("watch")
    wait_for(lambda: terminal.row("one") != "")
    child.kill()
    child.communicate()
    assert terminal.wait() == 130
    assert "council resume" in terminal.text
    gate.touch()
    assert repository.council("resume", "--json").code == 0
    await repository.assert_invariants()


def test_adapter_cooldown_is_shown_above_the_table(repository: Repository, start: Start) -> None:
    """A message about the whole run is a permanent line, without a remaining time."""
    adapters = {"sh": {"use": "command", "argv": ["sh", "{prompt_file}"],
                       "failures": {"rate_limited": "again in (?P<seconds>[0-9]+) s"}}}  # fmt: skip
    config = repository.configure([{"id": "limited", "prompt": "echo again in 3600 s; exit 1"}], adapters=adapters)
    terminal = start("run", str(config))
    wait_for(
        lambda: "adapter sh is paused until" in terminal.text and terminal.row("limited").split()[1:2] == ["retry"]
    )
    assert "left" not in terminal.row("0 landed")
    terminal.type("\x03")
    assert terminal.wait() == 130
    assert "Adapter sh is paused until" in terminal.text


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux, a terminal that rewraps its content")
@pytest.mark.slow
def test_rewrapping_terminal_shows_one_table(repository: Repository, tmp_path: Path) -> None:
    """After several reductions of its width no rest of a wider table is on the screen."""
    config, gate = shell(
        repository, {"id": "talker", "prompt": f"echo {'word ' * 40}; gate"}, {"id": "b", "prompt": "gate"}
    )

    def tmux(*arguments: str) -> str:
        environ = {**repository.environ, "TERM": "xterm-256color"}
        command = ["tmux", "-S", str(tmp_path / "tmux"), "-f", os.devnull, *arguments]
        return subprocess.run(
            command, cwd=repository.top, env=environ, check=True, capture_output=True, text=True
        ).stdout

    def screen() -> list[str]:
        return [line for line in tmux("capture-pane", "-p").splitlines() if line]

    run = shlex.join([sys.executable, "-m", "orchestrator.cli.main", "run", str(config)])
    tmux("new-session", "-d", "-x", "150", "-y", "14", f"seq 9; {run}; sleep 60")
    try:
        for width in (150, 120, 100, 75):
            # Right after a redraw: output during a resize can't be corrected.
            before = screen()
            wait_for(lambda before=before: screen() != before)  # type: ignore[misc]
            tmux("resize-window", "-x", str(width), "-y", "14")
            # The text reaches the end of the line, where it is cut.
            wait_for(lambda width=width: any(len(line) == width and line.endswith("…") for line in screen()))  # type: ignore[misc]
            assert sum(line.startswith("task ") for line in screen()) == 1, screen()
            assert sum(line.startswith("talker ") for line in screen()) == 1, screen()
        gate.touch()
        wait_for(lambda: any("council logs" in line for line in screen()))
    finally:
        gate.touch()
        tmux("kill-server")
