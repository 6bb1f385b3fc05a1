"""Handoffs between phases: records with a digest and receipts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from orchestrator.domain.documents.json_values import compute_digest, parse_object
from orchestrator.domain.documents.stored import StoredDocument
from orchestrator.domain.documents.times import Instant
from orchestrator.domain.workflow.mediation import Mediation
from orchestrator.errors import HandoffCorrupted

HandoffProtocol = Literal["direct", "mediated", "shared"]
#: The means of submission of a result: its file, a command or tool, or the last block of the response.
Delivery = Literal["file", "tool", "message"]

#: The longest summary of a handoff, in characters.
MAX_SUMMARY_CHARS: Final = 2_000


class Receipt(StoredDocument):
    """The receipt of a complete handoff by a phase visit, in wall-clock seconds."""

    phase: str
    attempt: int
    """The first attempt of the visit."""
    time: Instant
    digest: str
    """The digest of the received handoff."""


class Handoff(StoredDocument):
    """The result of one phase. Created by `make_handoff`."""

    id: str
    """`RUN/TASK/ATTEMPT`, the id of its document."""
    run: str
    task: str
    kind: str
    protocol: HandoffProtocol
    phase: str
    """The phase that produced it."""
    attempt: int
    to: str | None = None
    """The phase that receives it; None: no phase follows."""
    time: Instant
    """The time in wall-clock seconds."""
    digest: str
    """The digest of its data and mediation; see `compute_digest`."""
    data: dict[str, Any]
    """The result, normalized by its kind."""
    summary: str = ""
    """A short description of the session's work."""
    status: str = "completed"
    """The final status of the phase that produced it."""
    tokens: int = 0
    """Input and output tokens of the task so far."""
    cost: float | None = None
    """The known cost of the task so far in US dollars; None if unknown."""
    via: Delivery
    """Its means of delivery."""
    mediation: Mediation | None = None
    """The mediated data, if it was mediated."""
    key: str | None = None
    """The key under which it is shared."""
    version: int | None = None
    """The version of the shared value at that time."""
    receipts: tuple[Receipt, ...] = ()


def handoff_id(run: str, task: str, attempt: int) -> str:
    """Return the id of the handoff of an attempt."""
    return f"{run}/{task}/{attempt}"


def make_handoff(
    run: str, task: str, attempt: int, data: dict[str, Any], *, mediation: Mediation | None = None, **fields: Any
) -> Handoff:
    """Return an attempt's handoff with id and digest; `fields` are its other fields."""
    digest = compute_digest(_contents(data, mediation))
    name = handoff_id(run, task, attempt)
    fields["summary"] = str(fields.get("summary") or "")[:MAX_SUMMARY_CHARS]
    return Handoff(
        id=name, run=run, task=task, attempt=attempt, data=data, mediation=mediation, digest=digest, **fields
    )


def get_payload(handoff: Handoff) -> dict[str, Any]:
    """Return the input of the next phase: the result, or its mediated form."""
    return handoff.data if handoff.mediation is None else handoff.mediation.processed


def is_intact(handoff: Handoff) -> bool:
    """Return whether the digest matches the contents."""
    try:
        return compute_digest(_contents(handoff.data, handoff.mediation)) == handoff.digest
    except ValueError:
        return False


def acknowledge(handoff: Handoff, phase: str, attempt: int, now: float) -> Handoff:
    """Return a handoff with a visit's receipt; raise HandoffCorrupted if changed.

    A receipt is added once. The handoff is corrupted if its digest does not match. `attempt` is the first attempt of
    the visit.
    """
    if not is_intact(handoff):
        raise HandoffCorrupted(handoff.id, f"unusable for phase {phase!r}: its digest does not match its contents")
    if any((receipt.phase, receipt.attempt) == (phase, attempt) for receipt in handoff.receipts):
        return handoff
    receipt = Receipt(phase=phase, attempt=attempt, time=now, digest=handoff.digest)
    return handoff.model_copy(update={"receipts": (*handoff.receipts, receipt)})


def _contents(data: dict[str, Any], mediation: Mediation | None) -> dict[str, Any]:
    return data if mediation is None else {"data": data, "mediation": mediation.model_dump(mode="json")}


@dataclass(frozen=True, slots=True)
class JsonBlock:
    """The last fenced JSON object in a response, if any."""

    data: dict[str, Any] | None
    skipped: tuple[str, ...] = ()
    """The reasons for skipping later blocks, with their line numbers."""


_OPENING: Final = re.compile(r"[ \t]*(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`]*)\Z")


def find_last_json_block(text: str) -> JsonBlock:
    """Return the last fenced block of a response that is a JSON object.

    Only blocks with the info string `json` or none count. An invalid `json` block ends the search: an earlier block is
    not the intended handoff.
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
    """Yield fenced blocks: the opening line (from 1), the info string, the content."""
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
        elif opening := _OPENING.match(stripped):
            fence, info, begin, block = opening["fence"], opening["info"].strip().lower(), number, []
    if fence:  # an unclosed block ends with the response
        yield begin, info, "\n".join(block)
