"""What a look at the whole state log has found, as a program and as a person reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from orchestrator.cli.render.output import plain
from orchestrator.config.source.quantities import shown_size
from orchestrator.protocols import JsonObject, Record, Verified


@dataclass(frozen=True, slots=True)
class Settlement:
    """A document that a repair has settled: its version since; None as nothing of it could be read, and it is gone."""

    key: str
    version: int | None


def settlements(records: Iterable[Record]) -> list[Settlement]:
    """Return what the repairs among some commits have settled."""
    found = []
    for record in records:
        versions = {str(key): version for key, (version, _) in record.documents.items()}
        repaired = [event.data for event in record.events if event.type == "state.repaired"]
        found += [Settlement(one["key"], versions[one["key"]] if one["is_known"] else None) for one in repaired]
    return found


def verified_json(found: Verified, settled: Sequence[Settlement]) -> JsonObject:
    """Return it as one object, with what was settled before."""
    return {
        "is_sound": found.is_sound,
        "position": found.position,
        "bytes": found.bytes,
        "damage": [one.describe() for one in found.damage],
        "damaged": [str(key) for key in found.damaged],
        "differs": [str(key) for key in found.differs],
        "unreadable": {str(key): flaw for key, flaw in found.unreadable.items()},
        "settled": [{"key": one.key, "version": one.version} for one in settled],
    }


def verified_lines(found: Verified, settled: Sequence[Settlement]) -> Iterator[str]:
    """Yield it line by line, as text that a terminal only shows; before it, what was settled."""
    for document in settled:
        version = document.version
        stands = "gone, none of its values is known" if version is None else f"as last known, now version {version}"
        yield plain(f"settled: {document.key}: {stands}")
    verdict = "sound" if found.is_sound else "not all can be trusted"
    yield f"{found.position:,} commits, {shown_size(found.bytes)}: {verdict}"
    for one in found.damage:
        yield plain(f"  {one.describe()}")
    for key in found.damaged:
        yield plain(f"  {key}: a newer version was there than can be read")
    for key, flaw in found.unreadable.items():
        yield plain(f"  {key}: can't be read: {flaw}")
    for key in found.differs:
        yield plain(f"  {key}: told otherwise than the log says: restart whatever has this state open")
    if not found.is_sound:
        yield "`council state verify --repair` settles for what can be read"
