"""Denied actions of sessions, from recorded CLI output."""

from __future__ import annotations

from functools import reduce

import pytest

from adapters.acp import AcpAdapter, AcpOptions
from adapters.claude_code import ClaudeCodeAdapter, ClaudeCodeOptions
from adapters.codex import CodexAdapter, CodexOptions
from adapters.gemini import GeminiAdapter, GeminiOptions
from adapters.opencode import OpencodeAdapter, OpencodeOptions
from orchestrator.domain.runs.outcome import Failed, ProcessExit, SessionLimits, ToolDenials, classify_outcome
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.protocols import Adapter, ToolDenied
from orchestrator.sessions.output.transcript import Transcript
from orchestrator.testing.recordings import read_recordings
from tests.contract.verdicts import TRANSCRIPTS

BYPASS = "permission_mode: bypassPermissions"


@pytest.mark.parametrize(
    ("adapter", "recording", "tools", "remedy"),
    [
        # 2.1.197 reports it in the result only, 2.1.330 also when it happens: one denial.
        (ClaudeCodeAdapter(ClaudeCodeOptions()), "claude-code/refused", ("Write(/work/.git/hooks/x)",), BYPASS),
        (ClaudeCodeAdapter(ClaudeCodeOptions()), "claude-code/denied", ("Bash(python3 -c 'print(1)')",), BYPASS),
        (ClaudeCodeAdapter(ClaudeCodeOptions(permission_mode="bypassPermissions")), "claude-code/refused",
         ("Write(/work/.git/hooks/x)",), "a rule or hook"),
        (CodexAdapter(CodexOptions(sandbox="read-only")), "codex/denied",
         ("shell(/bin/bash -lc 'touch made.txt')",), "sandbox: none"),
        (GeminiAdapter(GeminiOptions(approval_mode="yolo")), "gemini/refused",
         ('write_file(Path not in workspace: Attempted path "/scratch/beside.txt"',), ""),
        (GeminiAdapter(GeminiOptions(approval_mode="yolo")), "gemini/denied",
         ("run_shell_command(Blocked: command substitution detected",), ""),
        (OpencodeAdapter(OpencodeOptions()), "opencode/refused", ("write(/work/hello.txt)",), "`permission`"),
        (AcpAdapter(AcpOptions(argv=("claude-agent-acp",))), "acp-claude/outside",
         ("Write /scratch/beside.txt('/scratch/beside.txt' is outside of the worktree",), ""),
        (AcpAdapter(AcpOptions(argv=("opencode", "acp"))), "acp-opencode/outside",
         ("/work/..('/work/..' is outside of the worktree",), ""),
        (ClaudeCodeAdapter(ClaudeCodeOptions()), "claude-code/edit", (), ""),
        (CodexAdapter(CodexOptions()), "codex/tool", (), ""),
    ],
)  # fmt: skip
def test_denied_tool_is_counted_once(adapter: Adapter, recording: str, tools: tuple[str, ...], remedy: str) -> None:
    """With its tool, its argument and the setting that allows it."""
    folder, name = recording.split("/")
    lines = read_recordings(TRANSCRIPTS / folder)[name].stdout
    said = reduce(Transcript.after, (event for line in lines for event in adapter.parse(line)), Transcript())
    assert said.denials.count == len(tools)
    assert all(found.startswith(tool) for found, tool in zip(said.denials.tools, tools, strict=True))
    assert remedy in said.denials.remedy
    assert bool(said.denials.remedy) == bool(remedy)


def test_denied_tool_of_an_early_end_is_named() -> None:
    """Without a result only the reason is known, not the argument."""
    adapter = ClaudeCodeAdapter(ClaudeCodeOptions())
    lines = [line for line in read_recordings(TRANSCRIPTS / "claude-code")["denied"].stdout if '"result"' not in line]
    said = reduce(Transcript.after, (event for line in lines for event in adapter.parse(line)), Transcript())
    assert said.denials.tools == ("Bash(This command requires approval)",)


def test_no_change_because_of_denials_is_reported() -> None:
    denials = ToolDenials.of([("Bash(make)", ""), ("Bash(make)", "allow it"), *((f"Write({n})", "") for n in "abc")])
    outcome = classify_outcome(
        ProcessExit(0, None, "exit", None), SessionLimits(1.0), None, None, None, denials=denials
    )
    assert isinstance(outcome, Failed)
    assert outcome.failure is FailureClass.NO_CHANGE
    reported = "5 tools denied: Bash(make), Write(a), Write(b), …: allow it"
    assert outcome.reason == f"the program succeeded but changed nothing: {reported}"


def test_first_of_many_denials_are_kept() -> None:
    said = reduce(Transcript.after, (ToolDenied("Bash", str(n)) for n in range(2000)), Transcript())
    assert (said.denials.count, len(said.denials.tools)) == (1000, 20)
