"""What a session said last, from what its program printed piece by piece."""

from __future__ import annotations

from functools import reduce

import pytest

from orchestrator.protocols import Concluded, Said, SessionEvent, Spent, UsedTool
from orchestrator.sessions.output.transcript import LONGEST_WORDS, NOTHING_SAID, Transcript

LOOKING = (Said("I am lo", part=True), Said("oking. ", part=True))
DONE = (Said("It is ", part=True), Said("done.", part=True))


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (LOOKING, "I am looking."),
        ((*LOOKING, UsedTool("edit"), *DONE), "It is done."),
        ((*LOOKING, Said("Whole."), *DONE), "It is done."),
        ((*DONE, Spent(1, 2, in_all=True), Concluded()), "It is done."),
        ((*DONE, Said(" ", part=True)), "It is done."),
        ((Said("Whole."), Said("\n", part=True)), "Whole."),
        ((*[Said("ab", part=True)] * LONGEST_WORDS,), "ab" * (LONGEST_WORDS // 2)),
    ],
)
def test_parts_are_one_until_something_else_happens(events: tuple[SessionEvent, ...], words: str) -> None:
    """Nothing is put between them, and of a long speech the end is kept."""
    assert reduce(Transcript.after, events, NOTHING_SAID).words == words
