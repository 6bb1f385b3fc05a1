"""Scripts in prompts, and the next step of the model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeAlias

from tests.model_server.conversation import (
    ApiFault,
    ConversationTurn,
    ModelAnswer,
    ModelRequest,
    TokenUsage,
    ToolCall,
)
from tests.model_server.text_answers import find_answer_format
from tests.model_server.tools import RunStep, ScriptStep, UseToolStep, WriteStep, ending_command, tool_call_for


@dataclass(frozen=True, slots=True)
class ConnectionDrop:
    """The connection closes in the middle of an answer."""


@dataclass(frozen=True, slots=True)
class AnswerTruncation:
    """The answer is truncated at the token limit."""


@dataclass(frozen=True, slots=True)
class ScriptedFailure:
    """A failure and the number of affected requests; None is all."""

    kind: ApiFault | ConnectionDrop | AnswerTruncation
    times: int | None


@dataclass(frozen=True, slots=True)
class Script:
    """The model's script in a prompt; `prompt` identifies it."""

    prompt: str
    steps: tuple[ScriptStep, ...]
    says: tuple[str, ...]
    disturbances: tuple[ScriptedFailure, ...]
    delay: float
    usage: TokenUsage

    def failure_for(self, request: int) -> ApiFault | ConnectionDrop | AnswerTruncation | None:
        """Return the failure of the conversation's n-th model request, counted from 0."""
        for disturbance in self.disturbances:
            if disturbance.times is None or request < disturbance.times:
                return disturbance.kind
            request -= disturbance.times
        return None


Directive: TypeAlias = ScriptStep | str | ScriptedFailure | float | TokenUsage

_CONDITION: Final = re.compile(r"[ \t]*once[ ](?P<text>\S.*?)[ \t]*")
_LINE: Final = re.compile(
    r"""[ \t]*(?:
        write[ ](?P<path>\S+)(?:[ ](?P<content>.*))?
      | run[ ](?P<command>\S.*)
      | call[ ](?P<tool>\w+)[ ](?P<arguments>\{.*\})[ \t]*
      | say[ ](?P<say>\S.*)
      | fail[ ](?P<status>[45]\d\d)(?:[ ](?P<times>\d+)(?:[ ](?P<after>\d+))?)?[ \t]*
      | (?P<drop>drop)(?:[ ](?P<drops>\d+))?[ \t]*
      | (?P<cut>cut)(?:[ ](?P<cuts>\d+))?[ \t]*
      | (?P<overflow>overflow)[ \t]*
      | delay[ ](?P<delay>\d+(?:\.\d+)?)[ \t]*
      | usage[ ](?P<input>\d+)[ ](?P<output>\d+)[ \t]*
    )""",
    re.VERBOSE,
)
# Text that CLIs add to a turn in the user's name, with arbitrary lines; but the output of a stop hook counts.
_REMINDER: Final = re.compile(r"<system-reminder>(?:(?!Stop hook feedback).)*?</system-reminder>", re.DOTALL)
# The time at which Copilot got a message, in front of it: without it, each session of a prompt has the same script.
_TIME: Final = re.compile(r"<current_datetime>.*?</current_datetime>\s*")
# Text of the Ollama bridge between the shown files, with arbitrary lines, and the prompt.
_SHOWN: Final = "\nThe task:\n\n"
# Requests of a CLI outside of the conversation, with the prompt and without tools.
_ASIDE: Final = re.compile(r"\b(?:title|summari[sz]e|classif|topic|router)", re.IGNORECASE)


def read_script(text: str, later: Sequence[str] = ()) -> Script | None:
    """Return the script of a text, None without a directive.

    Of its parts that begin with `once`, the last one whose words occur elsewhere in the text, or in `later` messages,
    is used; without such a part, the directives before the first of them.
    """
    text = _TIME.sub("", text)
    before, *parts = _parts(_REMINDER.sub("", text).rpartition(_SHOWN)[2].splitlines())
    words = "\n".join((*(line for line in text.splitlines() if not _CONDITION.fullmatch(line)), *later))
    chosen = next((part for part in reversed(parts) if part.condition in words), before)
    if not any((before.directives, *(part.directives for part in parts))):
        return None
    directives = chosen.directives
    return Script(
        text if chosen is before else f"{text}\n{chosen.condition}",
        tuple(each for each in directives if isinstance(each, ScriptStep)),
        tuple(each for each in directives if isinstance(each, str)),
        tuple(each for each in directives if isinstance(each, ScriptedFailure)),
        sum(each for each in directives if isinstance(each, float)),
        next((each for each in directives if isinstance(each, TokenUsage)), TokenUsage()),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """A group of directives and the words that activate it; "" for those before all groups."""

    condition: str
    directives: list[Directive]


def _parts(lines: Sequence[str]) -> list[_Part]:
    """Return the parts of a script in order; the first one is unconditional."""
    parts = [_Part("", [])]
    for line in lines:
        if (heading := _CONDITION.fullmatch(line)) is not None:
            parts.append(_Part(heading["text"], []))
        elif (found := _LINE.fullmatch(line)) is not None:
            with suppress(ValueError):  # of a call whose arguments are not JSON
                parts[-1].directives.append(_directive(found))
    return parts


def _directive(found: re.Match[str]) -> Directive:
    if (disturbance := _disturbance(found)) is not None:
        return disturbance
    if found["path"] is not None:
        return WriteStep(found["path"], f"{found['content'] or ''}\n")
    if found["command"] is not None:
        return RunStep(found["command"])
    if found["tool"] is not None:
        return UseToolStep(found["tool"], json.loads(found["arguments"]))
    if found["say"] is not None:
        return found["say"]
    if found["delay"] is not None:
        return float(found["delay"])
    return TokenUsage(int(found["input"]), int(found["output"]))


def _disturbance(found: re.Match[str]) -> ScriptedFailure | None:
    if found["status"] is not None:
        fault = ApiFault(int(found["status"]), int(found["after"]) if found["after"] else None)
        return ScriptedFailure(fault, int(found["times"]) if found["times"] else None)
    if found["drop"] is not None:
        return ScriptedFailure(ConnectionDrop(), int(found["drops"]) if found["drops"] else None)
    if found["cut"] is not None:
        return ScriptedFailure(AnswerTruncation(), int(found["cuts"]) if found["cuts"] else None)
    return None if found["overflow"] is None else ScriptedFailure(ApiFault(400, is_too_long=True), None)


@dataclass(frozen=True, slots=True)
class ScriptPosition:
    """The state of a conversation: its script, and the number of tool results since."""

    script: Script
    results: int


def find_script_position(asked: ModelRequest) -> ScriptPosition | None:
    """Return the position of a request in its script; None without one or outside of the conversation."""
    turns = asked.turns
    for at in range(len(turns) - 1, -1, -1):
        if (script := _script_at(turns, at, len(turns))) is None:
            continue
        begun = next(end for end in range(at + 1, len(turns) + 1) if _script_at(turns, at, end) == script)
        results = sum(turn.role == "tool" for turn in turns[begun:])
        return None if _is_side_request(asked, script.steps) else ScriptPosition(script, results)
    return None


def _script_at(turns: Sequence[ConversationTurn], at: int, end: int) -> Script | None:
    """Return the script of a turn, given the turns before `end`."""
    later = [turn.text for turn in turns[at + 1 : end] if turn.role == "user"]
    return read_script(turns[at].text, later) if turns[at].role == "user" else None


def _is_side_request(asked: ModelRequest, steps: Sequence[ScriptStep]) -> bool:
    if asked.tools or find_answer_format(asked) is not None:
        return False
    return bool(steps) or _ASIDE.search(asked.system) is not None


def next_answer(asked: ModelRequest, place: ScriptPosition | None) -> ModelAnswer:
    """Return the model's answer: the next step by an offered tool, or all of them as text without tools."""
    if place is None:
        return ModelAnswer("Done.")
    script = place.script
    last = "\n".join(script.says) or "Done."
    if (form := find_answer_format(asked)) is not None:
        blocks = [form(step) for step in script.steps if isinstance(step, WriteStep)]
        return ModelAnswer("\n".join([*blocks, last]), usage=script.usage)
    ending = ending_command(asked, last)
    steps = script.steps if ending is None else (*script.steps, ending)
    if place.results >= len(steps):
        return ModelAnswer(last, usage=script.usage)
    step = steps[place.results]
    if (made := tool_call_for(step, asked)) is None:
        offered = ", ".join(tool.name for tool in asked.tools)
        return ModelAnswer(f"None of the tools offered can {step.verb}: {offered}", usage=script.usage)
    key = hashlib.sha256(script.prompt.encode()).hexdigest()[:16]
    return ModelAnswer("", ToolCall(made.tool, made.arguments, key, len(asked.turns)), script.usage)
