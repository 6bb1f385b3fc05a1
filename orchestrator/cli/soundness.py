"""What a look at the whole state log has found, as a program and as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.cli.output import plain
from orchestrator.config.quantities import shown_size
from orchestrator.protocols import JsonObject, Verified


def verified_json(found: Verified) -> JsonObject:
    """Return it as one object."""
    return {
        "is_sound": found.is_sound,
        "position": found.position,
        "bytes": found.bytes,
        "damage": [one.describe() for one in found.damage],
        "damaged": [str(key) for key in found.damaged],
        "differs": [str(key) for key in found.differs],
    }


def verified_lines(found: Verified) -> Iterator[str]:
    """Yield it line by line, as text that a terminal only shows."""
    verdict = "sound" if found.is_sound else "not all can be trusted"
    yield f"{found.position:,} commits, {shown_size(found.bytes)}: {verdict}"
    for one in found.damage:
        yield plain(f"  {one.describe()}")
    for key in found.damaged:
        yield plain(f"  {key}: a newer version was there than can be read")
    for key in found.differs:
        yield plain(f"  {key}: told otherwise than the log says: restart whatever has this state open")
    if not found.is_sound:
        yield "`council state verify --repair` settles for what can be read"
