"""Session logs for people, from recorded CLI output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.acp import AcpAdapter
from adapters.claude_code import ClaudeCodeAdapter
from adapters.codex import CodexAdapter
from adapters.command.adapter import CommandAdapter
from adapters.gemini import GeminiAdapter
from adapters.ollama import OllamaAdapter
from adapters.opencode import OpencodeAdapter
from orchestrator.plugins import load_plugins
from orchestrator.protocols import Adapter, AdapterType
from orchestrator.sessions.output.entries import OutputEntryBuilder, OutputEntryKind
from orchestrator.testing.recordings import read_recordings

TRANSCRIPTS = Path(__file__).parents[1] / "transcripts"
PROGRAMS: dict[str, tuple[AdapterType, dict[str, Any]]] = {
    "claude-code": (ClaudeCodeAdapter, {}),
    "codex": (CodexAdapter, {}),
    "gemini": (GeminiAdapter, {}),
    "opencode": (OpencodeAdapter, {}),
    "aider": (load_plugins({"COUNCIL_PLUGINS": ""}).adapters["aider"], {}),
    "ollama": (OllamaAdapter, {"model": "x"}),
    "acp-claude": (AcpAdapter, {"argv": ["x"]}),
    "acp-gemini": (AcpAdapter, {"argv": ["x"]}),
    "acp-opencode": (AcpAdapter, {"argv": ["x"]}),
}
CLAUDE = ClaudeCodeAdapter(ClaudeCodeAdapter.Options())  # type: ignore[arg-type]
PLAIN, CUSTOM = (
    CommandAdapter(CommandAdapter.Options.model_validate(options))  # type: ignore[arg-type]
    for options in ({"argv": ["x"]}, {"argv": ["x"], "output": "jsonl", "read": [{"when": {"t": 1}, "text": "x"}]})
)


def adapter_of(program: str) -> Adapter:
    type_, options = PROGRAMS[program]
    return type_(type_.Options.model_validate(options))


def displayed(adapter: Adapter, *lines: str) -> list[str]:
    """Return the displayed text of all lines."""
    entries = OutputEntryBuilder()
    found = [entry for line in lines for entry in entries.read(adapter, line)]
    return [entry.line for entry in (*found, *entries.end())]


def recorded(program: str, name: str) -> list[str]:
    recording = read_recordings(TRANSCRIPTS / program)[name]
    return displayed(adapter_of(program), *recording.stdout)


@pytest.mark.parametrize(
    ("program", "lines"),
    [
        ("claude-code", ["> Bash echo from-the-shell: ok", "> Write /work/out/b.txt: ok", "Both done."]),
        (
            "codex",
            ["> shell /bin/bash -lc 'echo from-the-shell': ok", "> edit /work/out/b.txt: ok", "Both done."],
        ),
        ("gemini", ["> run_shell_command echo from-the-shell: ok", "> write_file out/b.txt: ok", "Both done."]),
        ("opencode", ["> bash echo from-the-shell: ok", "> write /work/out/b.txt: ok", "Both done."]),
        ("acp-claude", ["> execute echo from-the-shell: ok", "> edit Write out/b.txt: ok", "Both done."]),
        ("acp-opencode", ["> execute echo from-the-shell: ok", "> edit write /work/out/b.txt: ok", "Both done."]),
        ("acp-gemini", ["> execute echo from-the-shell: ok", "> edit Writing to out/b.txt: ok", "Both done."]),
    ],
)
def test_tool_call_is_a_line_with_argument_and_outcome(program: str, lines: list[str]) -> None:
    """The agent's text is shown once, although results repeat it."""
    assert recorded(program, "tool") == lines


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", ["limited", "no-login"])
def test_failure_is_shown(program: str, name: str) -> None:
    """Once, in the program's words, with its class and without its raw JSON."""
    lines = recorded(program, name)
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == (0 if program == "aider" else 1), lines
    assert not [line for line in lines if line.startswith("{")]
    assert sum(map(len, lines)) < 4_000


@pytest.mark.parametrize("program", PROGRAMS)
def test_all_recordings_can_be_shown(program: str) -> None:
    """Shorter than the recording; lines without JSON are unchanged."""
    for name, recording in read_recordings(TRANSCRIPTS / program).items():
        lines = displayed(adapter_of(program), *recording.stdout)
        words = "\n".join(lines)
        assert [line for line in recording.stdout if not line.startswith("{") and line not in words] == [], name
        assert len(words) <= sum(len(line) + 1 for line in recording.stdout), name


def test_failed_tool_has_its_reason() -> None:
    """On the same line, for any number of parallel calls; a late outcome has a line of its own."""

    def claude(type_: str, **block: Any) -> str:
        return json.dumps({"type": type_, "message": {"content": [block]}})

    calls = [
        claude("assistant", type="tool_use", id=name, name="Bash", input={"command": f"make {name}"}) for name in "ab"
    ]
    failed = claude("user", type="tool_result", tool_use_id="b", is_error=True, content="Exit code 2\nno rule")
    ended = claude("user", type="tool_result", tool_use_id="a", content="fine")
    assert displayed(CLAUDE, *calls, failed, ended) == [
        "> Bash make b: failed: Exit code 2 no rule",
        "> Bash make a: ok",
    ]
    words = claude("assistant", type="text", text="Meanwhile.")
    assert displayed(CLAUDE, *calls, words, failed, ended) == [
        "> Bash make a",
        "> Bash make b",
        "Meanwhile.",
        "> Bash make b: failed: Exit code 2 no rule",
    ]


def test_blocked_command_is_shown_as_denied() -> None:
    """Gemini CLI reports it as a successful call with output."""
    assert recorded("gemini", "denied") == ["> run_shell_command echo $(pwd): denied", "Tried."]


def test_unknown_json_is_shown_unchanged() -> None:
    """At the end, or after more JSON than a program prints at startup."""
    lines = [json.dumps({"step": number}) for number in range(30)]
    assert displayed(CUSTOM, *lines[:2]) == lines[:2]
    entries = OutputEntryBuilder()
    soon = [entry for line in lines[:20] for entry in entries.read(CUSTOM, line)]
    assert [entry.line for entry in soon] == lines[:20]
    plain = [entry for line in lines for entry in OutputEntryBuilder().read(PLAIN, line)]
    assert [entry.line for entry in plain] == lines
    assert {entry.kind for entry in (*soon, *plain)} == {OutputEntryKind.LINE}
