"""Watch documents by a pattern."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from fnmatch import fnmatchcase
from typing import NamedTuple

from orchestrator.protocols import JsonObject, Key, Store


class DocumentChange(NamedTuple):
    """A new version of a document; `value` is None if it was deleted."""

    key: Key
    version: int
    value: JsonObject | None
    position: int
    time: float
    by: str


async def subscribe(store: Store, pattern: str, after: int | None = None) -> AsyncGenerator[DocumentChange]:
    """Yield each new version of the documents whose name (`kind/id`) matches a pattern of fnmatch(3).

    `*` matches any characters, including `/`. It starts after the position `after`: 0 is the beginning of the log, None
    is now. An expired document is reported when it is deleted from the store.
    """
    begin = await store.position() if after is None else after
    async with aclosing(store.watch(begin)) as records:
        async for record in records:
            for key, (version, value) in record.documents.items():
                if fnmatchcase(str(key), pattern):
                    yield DocumentChange(key, version, value, record.position, record.time, record.by)
