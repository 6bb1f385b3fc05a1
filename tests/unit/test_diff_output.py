"""Diffs written by agents are safe to review: no line hides, moves or imitates another."""

from __future__ import annotations

import re

import pytest

from orchestrator.cli.render.output import Output
from orchestrator.cli.render.text import escape_unprintable, printable

HIDING = {
    "conceal": "\x1b[8m",
    "black on black": "\x1b[30;40m",
    "true colour": "\x1b[38;2;0;0;0m",
    "reset": "\x1b[0m",
    "git's own red": "\x1b[31m",
    "cursor up": "\x1b[1A",
    "erase line": "\x1b[2K",
    "erase display": "\x1b[2J",
    "alternate screen": "\x1b[?1049h",
    "link": "\x1b]8;;https://example.org\x1b\\",
    "clipboard": "\x1b]52;c;Y3VybA==\x07",
    "title": "\x1b]0;title\x07",
    "device control": "\x1bP$q\x1b\\",
    "C1 CSI": "\x9b8m",
    "C1 OSC": "\x9d52;c;Y3VybA==\x9c",
    "carriage return": "\r",
    "backspace": "\x08",
    "delete": "\x7f",
    "form feed": "\f",
    "next line": "\x85",
    "line separator": "\u2028",
    "right-to-left override": "\u202e",
    "isolate": "\u2066",
    "Arabic letter mark": "\u061c",
    "zero-width space": "\u200b",
    "zero-width joiner": "\u200d",
    "byte order mark": "\ufeff",
    "soft hyphen": "\u00ad",
    "tag": "\U000e0041",
    "Hangul filler": "\u3164",
    "braille blank": "\u2800",
    "grapheme joiner": "\u034f",
    "variation selector": "\U000e0100",
    "no-break space": "\u00a0",
}


@pytest.mark.parametrize("what", HIDING)
@pytest.mark.parametrize("color", [True, False])
def test_hidden_characters_of_a_diff_are_shown(
    what: str, color: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    line = f"+import os; {HIDING[what]}os.system('evil') # fine"
    Output(as_json=False).difference(f"@@ -1 +1 @@\n{line}\n context\n".encode(), color=color)
    said = capsys.readouterr().out
    shown = re.sub(r"^\x1b\[(?:1|31|32|33|36)m(.*)\x1b\[m$", r"\1", said, flags=re.MULTILINE) if color else said
    first, second, third, end = shown.split("\n")
    assert (first, third, end) == ("@@ -1 +1 @@", " context", "")
    assert second.isprintable()
    assert second.startswith("+import os; ")
    assert second.endswith("os.system('evil') # fine")
    assert re.search(r"\^.|<U\+[0-9A-F]{4,6}>", second)
    assert HIDING[what] not in printable(line)


def test_diff_for_a_program_is_exact(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Output to a program is a patch that must apply."""
    patch = b"+\x1b[8mhidden\xff\r\n\\ No newline at end of file"
    Output(as_json=False).difference(patch, color=False)
    assert capfdbinary.readouterr().out == patch


def test_visible_text_is_unchanged() -> None:
    """Letters of any script, tabs, and emoji in both styles."""
    for text in ("\tif x:", "naïve «ça»", "日本語", "✔\ufe0f done", "e\u0301"):
        assert escape_unprintable(text) == text
