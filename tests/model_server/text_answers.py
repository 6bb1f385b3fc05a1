"""Files as text, for clients that offer no tools and apply the answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

from tests.model_server.conversation import ModelRequest
from tests.model_server.tools import WriteStep

AnswerFormat: TypeAlias = Callable[[WriteStep], str]


def find_answer_format(asked: ModelRequest) -> AnswerFormat | None:
    """Return the answer format that the client asks for; None if it has tools or names no format."""
    if asked.tools:
        return None
    shown = "\n".join(turn.text for turn in asked.turns)
    # Aider repeats its instructions in the last user message for some models.
    reported = f"{asked.system}\n{shown}"
    if "SEARCH/REPLACE" in reported:
        return lambda step: _search_replace(step, shown)
    if "*file listing*" in reported:
        return _file_listing
    if "```file " in reported:
        return _file_block
    return None


def _search_replace(step: WriteStep, shown: str) -> str:
    """Return an aider block that replaces the whole shown file; with an empty search part it appends."""
    file = re.compile(
        rf"^{re.escape(step.path)}\n(?P<fence>`{{3,}})\w*\n(?P<content>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL
    )
    found = file.search(shown)
    before = found["content"] if found else ""
    return f"{step.path}\n```\n<<<<<<< SEARCH\n{before}=======\n{step.content}>>>>>>> REPLACE\n```\n"


def _file_listing(step: WriteStep) -> str:
    return f"{step.path}\n```\n{step.content}```\n"


def _file_block(step: WriteStep) -> str:
    """Return a block in the format of the Ollama bridge: a fence with the word `file` and the path."""
    return f"```file {step.path}\n{step.content}```\n"
