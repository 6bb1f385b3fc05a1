"""How a file is written in words, for clients that offer no tools and apply what the answer says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from orchestrator.testing.model_server.conversation import Asked
from orchestrator.testing.model_server.tools import Write

Form: TypeAlias = Callable[[Write], str]


def answer_form(asked: Asked) -> Form | None:
    """Return how the client wants files in the answer; None if it has tools for that or says nothing about it."""
    if asked.tools:
        return None
    # Aider repeats its instructions in the last user message for some models.
    told = "\n".join([asked.system, *(turn.text for turn in asked.turns)])
    if "SEARCH/REPLACE" in told:
        return _search_replace
    if "*file listing*" in told:
        return _file_listing
    if "```file " in told:
        return _file_block
    return None


def _search_replace(step: Write) -> str:
    return f"{step.path}\n```\n<<<<<<< SEARCH\n=======\n{step.content}>>>>>>> REPLACE\n```\n"


def _file_listing(step: Write) -> str:
    return f"{step.path}\n```\n{step.content}```\n"


def _file_block(step: Write) -> str:
    """Return the form that the Ollama bridge asks for: a fence with the word `file` and the path."""
    return f"```file {step.path}\n{step.content}```\n"
