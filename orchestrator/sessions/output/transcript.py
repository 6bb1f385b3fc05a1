"""What a program said, from the file that holds its standard output, in the words of its adapter."""

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

MAX_LINE_BYTES = 1 << 20  # bytes; longer ones are left out
MAX_EVENTS = 1_000
#: Characters of an answer, from its end.
MAX_ANSWER_CHARS = 1 << 20
#: Characters of the last words that are recorded.
MAX_MESSAGE_CHARS = 2_000
#: Ids become arguments again: none that is an option, or that no argument can be.
_ID = re.compile(r"[A-Za-z0-9_][!-~]{0,199}")
_MOST = 1 << 53


@dataclass(frozen=True, slots=True)
class Transcript:
    """What a session said up to some line: tokens, US dollars (None: not known), the CLI's own id of it."""

    words: str | None = None
    """What it said last, or its result."""
    session: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None
    cached_tokens: int = 0
    """Of the input, what was read from a cache."""
    model: str | None = None
    """The one that was used last, by its name."""
    includes_resumed: bool = False
    """Whether earlier sessions of the same conversation are among what was used up."""
    priced_tokens: int = 0
    """How many tokens the cost covers (`UsageReport.priced_tokens`)."""
    begun: str = ""
    """What it is saying, as far as its parts have come."""
    denied: tuple[ToolDenied, ...] = ()
    """The tools that it was denied, of very many the first."""
    call: tuple[str, UsageReport] | None = None
    """The call of the model that was told of last, with what it had used up by then."""

    @property
    def denials(self) -> ToolDenials:
        """What it was denied, in words."""
        return ToolDenials.of([(one.text, one.remedy) for one in self.denied])

    def after(self, event: SessionEvent) -> Transcript:
        """Return the transcript with one more event."""
        match event:
            case AgentMessage(text, part=True):
                begun = (self.begun + text)[-MAX_MESSAGE_CHARS:]
                return replace(self, words=begun.strip() or self.words, begun=begun)
            case _ if self.begun:
                return replace(self, begun="").after(event)
            case AgentMessage(text) | FinalResult(text) if text.strip():
                return replace(self, words=text.strip()[-MAX_MESSAGE_CHARS:])
            case ConversationStarted(session) if _ID.fullmatch(session):
                return replace(self, session=session)
            case UsageReport():
                return self._after_spending(_clamp_usage(event))
            case ToolDenied():
                return replace(self, denied=_with_denied(self.denied, event))
            case _:
                return self

    def _after_spending(self, spent: UsageReport) -> Transcript:
        if spent.is_cumulative:
            return replace(
                self,
                input_tokens=spent.input_tokens,
                output_tokens=spent.output_tokens,
                cached_tokens=spent.cached_tokens,
                cost=self.cost if spent.cost is None else spent.cost,
                model=spent.model or self.model,
                includes_resumed=spent.includes_resumed,
                priced_tokens=spent.priced_tokens,
                call=None,
            )
        told = self.call[1] if self.call is not None and self.call[0] == spent.call else UsageReport()
        cost = None if spent.cost is None else spent.cost - (told.cost or 0.0)
        return replace(
            self,
            input_tokens=self.input_tokens + spent.input_tokens - told.input_tokens,
            output_tokens=self.output_tokens + spent.output_tokens - told.output_tokens,
            cached_tokens=self.cached_tokens + spent.cached_tokens - told.cached_tokens,
            cost=self.cost if cost is None else (self.cost or 0.0) + cost,
            model=spent.model or self.model,
            call=None if spent.call is None else (spent.call, spent),
        )


EMPTY_TRANSCRIPT = Transcript()


def _with_denied(denied: tuple[ToolDenied, ...], new: ToolDenied) -> tuple[ToolDenied, ...]:
    """Return denials with one more; of one that was reported before, the newer detail counts."""
    for at, one in enumerate(denied):
        if one.call is not None and one.call == new.call:
            told = replace(one, detail=new.detail or one.detail, remedy=one.remedy or new.remedy)
            return (*denied[:at], told, *denied[at + 1 :])
    return (*denied, new) if len(denied) < MAX_EVENTS else denied


def _clamp_usage(spent: UsageReport) -> UsageReport:
    """Return what was used up with counts and amounts that mean something: parsers are plugins, too."""
    cost = spent.cost
    return replace(
        spent,
        input_tokens=min(max(spent.input_tokens, 0), _MOST),
        output_tokens=min(max(spent.output_tokens, 0), _MOST),
        cached_tokens=min(max(spent.cached_tokens, 0), _MOST),
        priced_tokens=min(max(spent.priced_tokens, 0), _MOST),
        cost=cost if cost is not None and 0 <= cost <= _MOST else None,
    )


def has_reported_failure(events: Sequence[SessionEvent]) -> bool:
    """Whether the program's last word about its end was that it failed."""
    last = next((event for event in reversed(events) if isinstance(event, FinalResult)), None)
    return last is not None and last.failed is not None


def extract_answer(events: Sequence[SessionEvent]) -> str:
    """Return all that was said since a tool was used last, or the result that the program itself named, if it is more.

    Programs differ in whether their result repeats what they said, and in whether they say it by lines or in parts.
    """
    said: list[str] = []
    result = ""
    for event in events:
        match event:
            case ToolCall():
                said.clear()
            case AgentMessage(text, part=part):
                said.append(text if part else f"{text}\n")
            case FinalResult(text) if text.strip():
                result = text
            case _:
                pass
    whole = "".join(said)
    return (whole if len(whole.strip()) > len(result.strip()) else result)[-MAX_ANSWER_CHARS:]


def read_transcript(adapter: Adapter, file: Path) -> tuple[Transcript, list[SessionEvent]]:
    """Return what a file of standard output comes to, and its last events; nothing if there is no file. Blocks."""
    transcript, events = Transcript(), deque[SessionEvent](maxlen=MAX_EVENTS)
    try:
        with file.open("rb") as stream:
            for event in parse_lines(adapter, _lines(stream)):
                transcript = transcript.after(event)
                events.append(event)
    except FileNotFoundError:
        pass
    return transcript, list(events)


def parse_lines(adapter: Adapter, lines: Iterable[bytes]) -> Iterator[SessionEvent]:
    """Yield what lines mean to an adapter."""
    for line in lines:
        if len(line) <= MAX_LINE_BYTES:
            yield from adapter.parse(line.decode(errors="replace").rstrip("\r\n"))


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield lines without holding one of any length in memory: what is too long comes as one that is too long."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        rest = line
        while not rest.endswith(b"\n") and (rest := stream.readline(MAX_LINE_BYTES)):
            pass
        yield line
