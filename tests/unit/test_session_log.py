"""The log of a session as lines with styles."""

from __future__ import annotations

import pytest

from orchestrator.api.topics.logs import AttemptMarker, LogEntry
from orchestrator.cli.render.session_log import LogFormatter
from orchestrator.domain.runs.model import Attempt
from orchestrator.sessions.output.entries import OutputEntryKind

TOOL, TEXT = OutputEntryKind.TOOL, OutputEntryKind.TEXT
CYAN, DIM, GREEN, RED, YELLOW = "36", "2", "32", "31", "33"


@pytest.fixture
def formatter(monkeypatch: pytest.MonkeyPatch) -> LogFormatter:
    """Return a formatter for 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    return LogFormatter()


def test_call_is_followed_by_its_changes_and_output(formatter: LogFormatter) -> None:
    """Indented, in the usual colours of a diff, without the colours of the program and control characters."""
    output = "\x1b[31mred\x1b[0m\r\n\x1b]0;t\x07b\x07"
    entry = LogEntry(TOOL, "a.py", "Edit", "ok", " def f():\n-    old\n+\tnew", output)
    assert list(formatter.lines(entry)) == [
        ("> Edit a.py: ok", CYAN),
        ("     def f():", DIM),
        ("    -    old", RED),
        ("    +   new", GREEN),
        ("    red", DIM),
        ("    b\N{REPLACEMENT CHARACTER}", DIM),
    ]


def test_long_output_is_shortened(formatter: LogFormatter) -> None:
    """Its middle is omitted, and its lines are cut at the width, in cells."""
    output = "\n".join(["漢" * 100, *map(str, range(50))])
    lines = [line for line, _ in formatter.lines(LogEntry(TOOL, "x", "Bash", "ok", "", output))]
    assert lines[1] == f"    {'漢' * 37} …"
    assert lines[6:9] == ["    4", "    … 39 more lines", "    44"]
    assert len(lines) == 14
    changed = "\n".join(f"+{number}" for number in range(41))
    assert len(list(formatter.lines(LogEntry(TOOL, "x", "Edit", "ok", changed)))) == 42


@pytest.mark.parametrize(
    ("outcome", "style"), [(None, CYAN), ("ok", CYAN), ("denied", YELLOW), ("failed: exit code 2", RED)]
)
def test_style_of_a_call_is_that_of_its_outcome(formatter: LogFormatter, outcome: str | None, style: str) -> None:
    ((line, found),) = formatter.lines(LogEntry(TOOL, "make", "Bash", outcome))
    assert found == style
    assert line == f"> Bash make{f': {outcome}' if outcome else ''}"


def test_tables_and_code_are_not_wrapped(formatter: LogFormatter) -> None:
    """A block of code may arrive in several messages."""
    row, code, words = f"| {'a b ' * 30}|", f"x = {'1 + ' * 30}1", "word " * 30
    lines = [line for line, _ in formatter.lines(LogEntry(TEXT, f"{row}\n```py\n{code}"))]
    assert lines == [row, "```py", code]
    lines = [line for line, _ in formatter.lines(LogEntry(TEXT, f"{code}\n```\n{words}"))]
    assert lines[:2] == [code, "```"]
    assert max(map(len, lines[2:])) <= 80
    assert " ".join(lines[2:]) == words.strip()


def test_plan_has_a_line_per_step(formatter: LogFormatter) -> None:
    entry = LogEntry(OutputEntryKind.PLAN, "[x] look\n[ ] fix")
    assert list(formatter.lines(entry)) == [("[x] look", CYAN), ("[ ] fix", CYAN)]


@pytest.mark.parametrize(
    ("outcome", "reason", "end"),
    [
        ("invalid_handoff", "invalid handoff from phase 'plan'", "invalid handoff from phase 'plan'"),
        ("crashed", "exit code 4", "crashed: exit code 4"),
        ("built", None, "built"),
    ],
)
def test_end_of_a_session_states_its_outcome_once(
    formatter: LogFormatter, outcome: str, reason: str | None, end: str
) -> None:
    attempt = Attempt(
        number=1, adapter="fake", base="0" * 40, started=0, ended=1, seconds=1, outcome=outcome, reason=reason
    )
    ((line, _),) = formatter.lines(AttemptMarker("ended", attempt))
    assert line == f"session 1 ended after 0:01: {end}"
