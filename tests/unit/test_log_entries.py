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
from orchestrator.protocols import Adapter, AdapterType, ToolCall, ToolResult
from orchestrator.sessions.output.entries import OutputEntryBuilder, OutputEntryKind
from orchestrator.testing.recordings import read_recordings

TRANSCRIPTS = Path(__file__).parents[1] / "transcripts"
PROFILES = load_plugins({"COUNCIL_PLUGINS": ""}).adapters
PROGRAMS: dict[str, tuple[AdapterType, dict[str, Any]]] = {
    "claude-code": (ClaudeCodeAdapter, {}),
    "codex": (CodexAdapter, {}),
    "gemini": (GeminiAdapter, {}),
    "opencode": (OpencodeAdapter, {}),
    **{name: (PROFILES[name], {}) for name in ("aider", "continue", "copilot", "llm", "qwen-code")},
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
        (
            "qwen-code",
            ["> run_shell_command echo from-the-shell: ok", "> write_file /work/out/b.txt: ok", "Both done."],
        ),
        ("acp-claude", ["> execute echo from-the-shell: ok", "> edit Write out/b.txt: ok", "Both done."]),
        ("acp-opencode", ["> execute echo from-the-shell: ok", "> edit write /work/out/b.txt: ok", "Both done."]),
        ("acp-gemini", ["> execute echo from-the-shell: ok", "> edit Writing to out/b.txt: ok", "Both done."]),
    ],
)
def test_tool_call_is_a_line_with_argument_and_outcome(program: str, lines: list[str]) -> None:
    """The agent's text is shown once, although results repeat it."""
    assert recorded(program, "tool") == lines


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", ["server-error", "no-login"])
def test_failure_is_shown(program: str, name: str) -> None:
    """Once, in the program's words, with its class and without its raw JSON."""
    lines = recorded(program, name)
    errors = [line for line in lines if line.startswith("error: ")]
    # The others report it in text or on standard error.
    assert len(errors) == (0 if program in {"aider", "continue", "llm"} else 1), lines
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


@pytest.mark.parametrize("program", ["claude-code", "codex", "gemini", "opencode", "qwen-code", "copilot"])
def test_call_has_the_output_of_its_tool_and_changed_lines(program: str) -> None:
    """Codex reports no changes, and Copilot's model edited by a command."""
    entries = OutputEntryBuilder()
    lines = read_recordings(TRANSCRIPTS / program)["tool"].stdout
    found = [entry for line in lines for entry in entries.read(adapter_of(program), line)]
    ran, edited = [entry for entry in found if entry.kind is OutputEntryKind.TOOL]
    assert ran.output.splitlines()[0] == "from-the-shell"
    assert edited.diff == ("" if program in {"codex", "copilot"} else "+two")


def test_plan_is_shown_and_its_tool_is_not() -> None:
    todos = [{"content": "Look", "status": "completed"}, {"content": "Fix", "status": "in_progress"}, {"content": "Go"}]
    blocks = [{"type": "tool_use", "id": "t", "name": "TodoWrite", "input": {"todos": todos}}]
    done = [{"type": "tool_result", "tool_use_id": "t", "content": "Todos have been modified"}]
    lines = [json.dumps({"type": "assistant", "message": {"content": content}}) for content in (blocks, done)]
    assert displayed(CLAUDE, *lines) == ["[x] Look\n[>] Fix\n[ ] Go"]


def test_result_is_shown_unless_it_repeats_the_reason() -> None:
    """A late result has the call's line again, but not its changes."""
    entries = OutputEntryBuilder()
    call = ToolCall("Edit", "a.py", ("a.py",), "c", "+x")
    (first,) = [*entries.add([call]), *entries.flush()]
    assert (first.line, first.diff, first.output) == ("> Edit a.py", "+x", "")
    assert [*entries.add([ToolResult("c", output="The file a.py was changed.")])] == []
    [*entries.add([ToolCall("Bash", "make", call="m")]), *entries.flush()]
    (late,) = entries.add([ToolResult("m", output="one\ntwo")])
    assert (late.line, late.output) == ("> Bash make: ok", "one\ntwo")
    ended = ToolResult("n", "exit code 2: no", "exit code 2:\nno")
    (failed,) = entries.add([ToolCall("Bash", "make", call="n"), ended])
    assert (failed.line, failed.output) == ("> Bash make: failed: exit code 2: no", "")


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
        "> Bash make a: ok",
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
