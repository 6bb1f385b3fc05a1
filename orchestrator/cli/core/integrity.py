"""The result of an integrity check of the state log, as JSON and as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from orchestrator.cli.render.text import printable
from orchestrator.domain.events.state import StateRepaired
from orchestrator.domain.settings.quantities import format_size_short
from orchestrator.protocols import CommitRecord, JsonObject, VerificationReport


@dataclass(frozen=True, slots=True)
class RepairedDocument:
    """A document that a repair has repaired: its version since; None as nothing of it could be read, and it is gone."""

    key: str
    version: int | None


def repaired_documents(records: Iterable[CommitRecord]) -> list[RepairedDocument]:
    """Return what the repairs among some commits have settled."""
    found = []
    for record in records:
        versions = {str(key): version for key, (version, _) in record.documents.items()}
        repaired = [event.data for event in record.events if event.type == StateRepaired.type]
        found += [RepairedDocument(one["key"], versions[one["key"]] if one["is_known"] else None) for one in repaired]
    return found


def verification_json(found: VerificationReport, settled: Sequence[RepairedDocument]) -> JsonObject:
    """Return it as one object, with what was settled before."""
    return {
        "is_valid": found.is_valid,
        "position": found.position,
        "bytes": found.bytes,
        "damage": [one.describe() for one in found.damage],
        "damaged": [str(key) for key in found.damaged],
        "differs": [str(key) for key in found.mismatched],
        "unreadable": {str(key): flaw for key, flaw in found.unreadable.items()},
        "settled": [{"key": one.key, "version": one.version} for one in settled],
    }


def verification_lines(found: VerificationReport, settled: Sequence[RepairedDocument]) -> Iterator[str]:
    """Yield it line by line, as text that a terminal only shows; before it, what was settled."""
    for document in settled:
        version = document.version
        stands = (
            "deleted, no value is known"
            if version is None
            else f"restored to its last known value, now version {version}"
        )
        yield printable(f"repaired: {document.key}: {stands}")
    verdict = "sound" if found.is_valid else "damaged"
    yield f"{found.position:,} commits, {format_size_short(found.bytes)}: {verdict}"
    for one in found.damage:
        yield printable(f"  {one.describe()}")
    for key in found.damaged:
        yield printable(f"  {key}: its newest version is unreadable")
    for key, flaw in found.unreadable.items():
        yield printable(f"  {key}: can't be read: {flaw}")
    for key in found.mismatched:
        yield printable(f"  {key}: differs from the log: restart the processes that have this state open")
    if not found.is_valid:
        yield "`council state verify --repair` restores the readable state"
