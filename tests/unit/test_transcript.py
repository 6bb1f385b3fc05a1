"""The final message of a session, joined from partial output."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path

import pytest

from adapters.codex import CodexAdapter, CodexOptions
from orchestrator.protocols import (
    AgentMessage,
    ConversationStarted,
    FinalResult,
    SessionEvent,
    ToolCall,
    UsageReport,
)
from orchestrator.sessions.output.transcript import EMPTY_TRANSCRIPT, MAX_MESSAGE_CHARS, Transcript, read_transcript

LOOKING = (AgentMessage("I am lo", part=True), AgentMessage("oking. ", part=True))
DONE = (AgentMessage("It is ", part=True), AgentMessage("done.", part=True))


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (LOOKING, "I am looking."),
        ((*LOOKING, ToolCall("edit"), *DONE), "It is done."),
        ((*LOOKING, AgentMessage("Whole."), *DONE), "It is done."),
        ((*DONE, UsageReport(1, 2, is_cumulative=True), FinalResult()), "It is done."),
        ((*DONE, AgentMessage(" ", part=True)), "It is done."),
        ((AgentMessage("Whole."), AgentMessage("\n", part=True)), "Whole."),
        ((*[AgentMessage("ab", part=True)] * MAX_MESSAGE_CHARS,), "ab" * (MAX_MESSAGE_CHARS // 2)),
    ],
)
def test_parts_are_joined_until_another_event(events: tuple[SessionEvent, ...], words: str) -> None:
    """Without separators; of a long message the end is kept."""
    assert reduce(Transcript.after, events, EMPTY_TRANSCRIPT).last_message == words


@pytest.mark.parametrize("messages", [5, 1500])
def test_long_session_without_its_final_result_is_interrupted(tmp_path: Path, messages: int) -> None:
    """The start of the conversation stays known, although only the last events are kept."""
    said = {"type": "item.completed", "item": {"type": "agent_message", "text": "working"}}
    lines = [{"type": "thread.started", "thread_id": "t1"}, *[said] * messages]
    (tmp_path / "stdout").write_text("".join(json.dumps(line) + "\n" for line in lines))
    adapter = CodexAdapter(CodexOptions())
    transcript, events = read_transcript(adapter, tmp_path / "stdout")
    assert events[0] == ConversationStarted("t1")
    assert transcript.session == "t1"
