"""Read the repository from a config file before the file is validated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from orchestrator.config.source.document import MAX_DEPTH
from orchestrator.config.source.files import MAX_FILE_BYTES, open_regular_file
from orchestrator.domain.settings.names import is_url


def named_repository(path: Path) -> Path | None:
    """Return the folder under a file's key `repo`; None if missing or unreadable.

    Blocks. Stops reading at that key.
    """
    try:
        with open_regular_file(path) as file:
            events = yaml.parse(file.read(MAX_FILE_BYTES), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            repo = next((value for key, value in _top_scalars(events) if key == "repo"), None)
        return None if repo is None or is_url(repo) else Path(os.path.realpath(path.parent / repo))
    except (yaml.YAMLError, OSError, ValueError, OverflowError):
        return None


def _top_scalars(events: Iterator[yaml.Event]) -> Iterator[tuple[str, str]]:
    """Yield the keys and values of the top mapping whose values are scalars."""
    depth, key = 0, None
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:  # rejected later; the cost of parsing is proportional to depth times length
                return
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            key = None if depth == 1 else key
        elif depth == 1 and isinstance(event, yaml.ScalarEvent):
            if key is None:
                key = event.value
            else:
                yield key, event.value
                key = None
