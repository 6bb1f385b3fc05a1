"""Transcript of a session, parsed from its standard output by the adapter."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from orchestrator.domain.runs.outcome import ToolDenials
from orchestrator.protocols import (
    Adapter,
    AgentMessage,
    ConversationStarted,
    FinalResult,
    SessionEvent,
    ToolCall,
    ToolDenied,
    UsageReport,
)

MAX_LINE_BYTES = 1 << 20  # longer lines are ignored
MAX_EVENTS = 1_000
#: Characters of an answer, from its end.
MAX_ANSWER_CHARS = 1 << 20
#: Characters of the last message that are recorded.
MAX_MESSAGE_CHARS = 2_000
#: Ids are passed back as arguments, so they must be valid and must not look like options.
_ID = re.compile(r"[A-Za-z0-9_][!-~]{0,199}")
_MAX_AMOUNT = 1 << 53


@dataclass(frozen=True, slots=True)
class Transcript:
    """Summary of a session's output so far; the cost is in US dollars, or None."""

    last_message: str | None = None
    """The last message, or the final result."""
    session: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None
    cached_tokens: int = 0
    """The part of the input tokens that was read from a cache."""
    model: str | None = None
    """The name of the model used last."""
    includes_resumed: bool = False
    """Whether the usage includes earlier sessions of the same conversation."""
    priced_tokens: int = 0
    """The number of tokens that the cost covers (`UsageReport.priced_tokens`)."""
    is_estimate: bool = False
    """Whether any of the usage is the CLI's estimate."""
    partial_message: str = ""
    """The parts of the current message that have arrived."""
    denied: tuple[ToolDenied, ...] = ()
    """The denied tool calls; the first ones if there are too many."""
    call: tuple[str, UsageReport] | None = None
    """The last reported model call, with its usage so far."""

    @property
    def denials(self) -> ToolDenials:
        """The denied tool calls as text."""
        return ToolDenials.of([(denial.text, denial.remedy) for denial in self.denied])

    def after(self, event: SessionEvent) -> Transcript:
        """Return the transcript with one more event."""
        match event:
            case AgentMessage(text, part=True):
                partial = (self.partial_message + text)[-MAX_MESSAGE_CHARS:]
                return replace(self, last_message=partial.strip() or self.last_message, partial_message=partial)
            case _ if self.partial_message:
                return replace(self, partial_message="").after(event)
            case AgentMessage(text) | FinalResult(text) if text.strip():
                return replace(self, last_message=text.strip()[-MAX_MESSAGE_CHARS:])
            case ConversationStarted(session) if _ID.fullmatch(session):
                return replace(self, session=session)
            case UsageReport():
                return self._after_usage(_clamp_usage(event))
            case ToolDenied():
                return replace(self, denied=_with_denied(self.denied, event))
            case _:
                return self

    def _after_usage(self, usage: UsageReport) -> Transcript:
        if usage.is_cumulative:
            return replace(
                self,
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
                cached_tokens=usage.cached_tokens,
                cost=self.cost if usage.cost is None else usage.cost,
                model=usage.model or self.model,
                includes_resumed=usage.includes_resumed,
                priced_tokens=usage.priced_tokens,
                is_estimate=usage.is_estimate,
                call=None,
            )
        counted = self.call[1] if self.call is not None and self.call[0] == usage.call else UsageReport()
        cost = None if usage.cost is None else usage.cost - (counted.cost or 0.0)
        return replace(
            self,
            input_tokens=self.input_tokens + usage.input_tokens - counted.input_tokens,
            output_tokens=self.output_tokens + usage.output_tokens - counted.output_tokens,
            cached_tokens=self.cached_tokens + usage.cached_tokens - counted.cached_tokens,
            cost=self.cost if cost is None else (self.cost or 0.0) + cost,
            model=usage.model or self.model,
            is_estimate=self.is_estimate or usage.is_estimate,
            call=None if usage.call is None else (usage.call, usage),
        )


EMPTY_TRANSCRIPT = Transcript()


def _with_denied(denied: tuple[ToolDenied, ...], new: ToolDenied) -> tuple[ToolDenied, ...]:
    """Add a denial; if its call was already reported, prefer the newer details."""
    for index, known in enumerate(denied):
        if known.call is not None and known.call == new.call:
            merged = replace(known, detail=new.detail or known.detail, remedy=known.remedy or new.remedy)
            return (*denied[:index], merged, *denied[index + 1 :])
    return (*denied, new) if len(denied) < MAX_EVENTS else denied


def _clamp_usage(usage: UsageReport) -> UsageReport:
    """Limit counts and amounts to valid ranges, since parsers are plugins."""
    cost = usage.cost
    return replace(
        usage,
        input_tokens=min(max(usage.input_tokens, 0), _MAX_AMOUNT),
        output_tokens=min(max(usage.output_tokens, 0), _MAX_AMOUNT),
        cached_tokens=min(max(usage.cached_tokens, 0), _MAX_AMOUNT),
        priced_tokens=min(max(usage.priced_tokens, 0), _MAX_AMOUNT),
        cost=cost if cost is not None and 0 <= cost <= _MAX_AMOUNT else None,
    )


def has_reported_failure(events: Sequence[SessionEvent]) -> bool:
    """Return whether the program's last final result reports a failure."""
    last = next((event for event in reversed(events) if isinstance(event, FinalResult)), None)
    return last is not None and last.failed is not None


def extract_answer(events: Sequence[SessionEvent]) -> str:
    """Return the messages since the last tool call, or the final result if longer.

    Programs differ in whether the result repeats the messages and whether messages arrive as lines or in parts.
    """
    messages: list[str] = []
    result = ""
    for event in events:
        match event:
            case ToolCall():
                messages.clear()
            case AgentMessage(text, part=part):
                messages.append(text if part else f"{text}\n")
            case FinalResult(text) if text.strip():
                result = text
            case _:
                pass
    whole = "".join(messages)
    return (whole if len(whole.strip()) > len(result.strip()) else result)[-MAX_ANSWER_CHARS:]


def read_transcript(adapter: Adapter, file: Path) -> tuple[Transcript, list[SessionEvent]]:
    """Return the transcript of an output file, with its last events and the start of its conversation. Blocks.

    All are empty if the file does not exist.
    """
    transcript, events = Transcript(), deque[SessionEvent](maxlen=MAX_EVENTS)
    began: ConversationStarted | None = None
    try:
        with file.open("rb") as stream:
            for event in parse_lines(adapter, _lines(stream)):
                transcript = transcript.after(event)
                events.append(event)
                if began is None and isinstance(event, ConversationStarted):
                    began = event
    except FileNotFoundError:
        pass
    kept = list(events)
    return transcript, kept if began is None or began in kept else [began, *kept]


def parse_lines(adapter: Adapter, lines: Iterable[bytes]) -> Iterator[SessionEvent]:
    """Yield the events that an adapter parses from lines."""
    for line in lines:
        if len(line) <= MAX_LINE_BYTES:
            yield from adapter.parse(line.decode(errors="replace").rstrip("\r\n"))


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield lines with bounded memory, truncating longer ones just above the limit."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        rest = line
        while not rest.endswith(b"\n") and (rest := stream.readline(MAX_LINE_BYTES)):
            pass
        yield line
