"""What one phase hands the next: a record with a digest, and who has received it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

from orchestrator.domain.documents.json_values import compute_digest, parse_object
from orchestrator.domain.documents.times import Instant
from orchestrator.domain.workflow.mediation import Mediation
from orchestrator.errors import HandoffCorrupted

HandoffProtocol = Literal["direct", "mediated", "shared"]
#: How a result was delivered: in its file, by a command or tool, or as the last block of the answer.
Delivery = Literal["file", "tool", "answer"]

#: Characters of a handoff's summary.
MAX_SUMMARY_CHARS: Final = 2_000


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Receipt(_Document):
    """That a visit of a phase was given a handoff, whole. The time is wall-clock seconds."""

    phase: str
    attempt: int
    """The attempt that the visit began with."""
    time: Instant
    digest: str
    """Of what was received."""


class Handoff(_Document):
    """What came of one phase. Made by `make_handoff`."""

    id: str
    """`RUN/TASK/ATTEMPT`, as the document is called."""
    run: str
    task: str
    kind: str
    protocol: HandoffProtocol
    phase: str
    """The phase that it comes from."""
    attempt: int
    to: str | None = None
    """The phase that it is for; None: none follows."""
    time: Instant
    """When, in wall-clock seconds."""
    digest: str
    """Of its data, and of what mediated them; see `compute_digest`."""
    data: dict[str, Any]
    """The result, as its kind has it."""
    summary: str = ""
    """What its session was at, in a few words."""
    status: str = "completed"
    """How the phase ended that it comes from."""
    tokens: int = 0
    """Input and output, of all of the task so far."""
    cost: float | None = None
    """US dollars, of all of the task so far; None where no CLI told."""
    by: Delivery
    mediation: Mediation | None = None
    key: str | None = None
    """The key under which it is shared."""
    version: int | None = None
    """The version of what stood there then."""
    receipts: tuple[Receipt, ...] = ()


def handoff_id(run: str, task: str, attempt: int) -> str:
    """Return what the handoff of an attempt is called."""
    return f"{run}/{task}/{attempt}"


def make_handoff(
    run: str, task: str, attempt: int, data: dict[str, Any], *, mediation: Mediation | None = None, **told: Any
) -> Handoff:
    """Return the handoff of an attempt, with its id and digest; `told` are its other fields."""
    digest = compute_digest(_contents(data, mediation))
    name = handoff_id(run, task, attempt)
    told["summary"] = str(told.get("summary") or "")[:MAX_SUMMARY_CHARS]
    return Handoff(id=name, run=run, task=task, attempt=attempt, data=data, mediation=mediation, digest=digest, **told)


def get_payload(handoff: Handoff) -> dict[str, Any]:
    """Return what the next phase is given: the result, or what was made of it on the way."""
    return handoff.data if handoff.mediation is None else handoff.mediation.processed


def is_intact(handoff: Handoff) -> bool:
    """Whether it holds what its digest says."""
    try:
        return compute_digest(_contents(handoff.data, handoff.mediation)) == handoff.digest
    except ValueError:
        return False


def acknowledge(handoff: Handoff, phase: str, attempt: int, now: float) -> Handoff:
    """Return a handoff that a visit of a phase has received, once; HandoffBroken if it is not what was handed over.

    `attempt` is the attempt that the visit begins with.
    """
    if not is_intact(handoff):
        raise HandoffCorrupted(handoff.id, f"phase {phase!r} can't take it: its digest does not match what it holds")
    if any((one.phase, one.attempt) == (phase, attempt) for one in handoff.receipts):
        return handoff
    receipt = Receipt(phase=phase, attempt=attempt, time=now, digest=handoff.digest)
    return handoff.model_copy(update={"receipts": (*handoff.receipts, receipt)})


def _contents(data: dict[str, Any], mediation: Mediation | None) -> dict[str, Any]:
    return data if mediation is None else {"data": data, "mediation": mediation.model_dump(mode="json")}


@dataclass(frozen=True, slots=True)
class JsonBlock:
    """What an answer ends with: the last fenced JSON object in it, or none."""

    data: dict[str, Any] | None
    skipped: tuple[str, ...] = ()
    """Why later blocks were not taken, or none was, each with the line that it begins at."""


_OPENING: Final = re.compile(r"[ \t]*(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`]*)\Z")


def find_last_json_block(text: str) -> JsonBlock:
    """Return the last fenced block of an answer that is a JSON object.

    Blocks count that say `json` or nothing after the fence. One that says `json` and is none ends the search: what
    stands before it is not what was meant to be handed over.
    """
    skipped: list[str] = []
    for line, info, block in reversed(list(_blocks(text))):
        if info not in {"", "json"}:
            continue
        try:
            return JsonBlock(parse_object(block), tuple(skipped))
        except ValueError as error:
            skipped.append(f"the block at line {line}: {error}")
            if info == "json" and not str(error).endswith("not an object"):
                break
    return JsonBlock(None, tuple(skipped))


def _blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the fenced blocks: the line of the fence, from 1, what is said behind it, and what is between."""
    fence, info, begin, block = "", "", 0, list[str]()
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.rstrip("\r")
        if fence:
            closing = stripped.strip(" \t")
            if len(closing) >= len(fence) and not closing.strip(fence[0]):
                yield begin, info, "\n".join(block)
                fence = ""
            else:
                block.append(stripped)
        elif found := _OPENING.match(stripped):
            fence, info, begin, block = found["fence"], found["info"].strip().lower(), number, []
    if fence:  # it ends with the answer
        yield begin, info, "\n".join(block)
