"""Commands in messages: the command line accepts them as they are printed."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from orchestrator.cli.render.next_steps import task_steps
from orchestrator.domain.events import EVENT_TYPES
from orchestrator.domain.runs.statuses import TaskStatus
from tests.printed_commands import check_syntax, printed_commands
from tests.unit.test_result import run, task


def printed_texts() -> Iterator[str]:
    """Yield the sentences of all events, and the next steps of a task in each status, of any run."""
    for event in EVENT_TYPES.values():
        for sentence in (event.sentence, *(event.sentence_without or ())):
            yield re.sub(r"\{[^{}]*\}", "x", sentence)
    for status in TaskStatus:
        one = task(status, branch="council/run/t/1")
        for is_newest in (True, False):
            yield from map(str, task_steps(one, run(one), is_newest=is_newest))


@pytest.mark.parametrize("command", [one for text in printed_texts() for one in printed_commands(text)], ids=" ".join)
def test_printed_command_is_accepted(command: list[str]) -> None:
    """No argument is missing, and each option exists."""
    check_syntax(command)
