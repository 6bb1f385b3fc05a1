"""How a file is written in words, for clients that offer no tools and apply what the answer says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

from tests.model_server.conversation import ModelRequest
from tests.model_server.tools import WriteStep

AnswerFormat: TypeAlias = Callable[[WriteStep], str]


def find_answer_format(asked: ModelRequest) -> AnswerFormat | None:
    """Return how the client wants files in the answer; None if it has tools for that or says nothing about it."""
    if asked.tools:
        return None
    shown = "\n".join(turn.text for turn in asked.turns)
    # Aider repeats its instructions in the last user message for some models.
    told = f"{asked.system}\n{shown}"
    if "SEARCH/REPLACE" in told:
        return lambda step: _search_replace(step, shown)
    if "*file listing*" in told:
        return _file_listing
    if "```file " in told:
        return _file_block
    return None


def _search_replace(step: WriteStep, shown: str) -> str:
    """Return a block of aider's that replaces all that it showed of the file; with nothing to search, it appends."""
    file = re.compile(
        rf"^{re.escape(step.path)}\n(?P<fence>`{{3,}})\w*\n(?P<content>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL
    )
    found = file.search(shown)
    before = found["content"] if found else ""
    return f"{step.path}\n```\n<<<<<<< SEARCH\n{before}=======\n{step.content}>>>>>>> REPLACE\n```\n"


def _file_listing(step: WriteStep) -> str:
    return f"{step.path}\n```\n{step.content}```\n"


def _file_block(step: WriteStep) -> str:
    """Return the form that the Ollama bridge asks for: a fence with the word `file` and the path."""
    return f"```file {step.path}\n{step.content}```\n"
