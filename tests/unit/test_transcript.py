"""The final message of a session, joined from partial output."""

from __future__ import annotations

from functools import reduce

import pytest

from orchestrator.protocols import AgentMessage, FinalResult, SessionEvent, ToolCall, UsageReport
from orchestrator.sessions.output.transcript import EMPTY_TRANSCRIPT, MAX_MESSAGE_CHARS, Transcript

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
