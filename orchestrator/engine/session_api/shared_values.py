"""Share values between the sessions of a run by key: put, get, and wait.

Each value is a document. Its version is the version of the document, which only increases, even if the value is deleted
in between. Sizes are limited, and secrets are redacted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import aclosing, suppress
from typing import Any, Final, NamedTuple

import anyio
import anyio.to_thread
import orjson

from orchestrator.client import strict_json
from orchestrator.client.commands import MAX_SHARED_BYTES
from orchestrator.domain.documents import stored as stored_values
from orchestrator.domain.events.coordination import SharedPut
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.settings.names import check_name
from orchestrator.errors import HistoryCompacted, InvalidDocument, RefusedError
from orchestrator.protocols import Commit, Document, Event, Guard, JsonObject, Key, Store, Write
from orchestrator.state.documents.update import retry_on_conflict
from orchestrator.system.clock import Clock

KIND: Final = "shared"

#: The maximum length of a key, and number of keys per run, which simultaneous writes can exceed.
MAX_KEY_LENGTH: Final = 200
MAX_KEYS: Final = 1000
#: The maximum stored size of all values of a run in bytes: they must fit into one commit.
MAX_BYTES: Final = 32 << 20
#: The default time to wait for a value, in seconds.
DEFAULT_WAIT: Final = 30.0


class SharedValue(NamedTuple):
    """A value, its version, its writing session, and its time (wall-clock seconds).

    The writer is None if no session wrote it.
    """

    key: str
    version: int
    value: Any
    writer: str | None
    time: float

    def to_json(self) -> JsonObject:
        """Return the object for `--json`."""
        return self._asdict()


class SharedEntry(NamedTuple):
    """A list entry: like `SharedValue`, with the size in bytes instead of the value."""

    key: str
    version: int
    size: int
    writer: str | None
    time: float

    def to_json(self) -> JsonObject:
        """Return the object for `--json`."""
        return self._asdict()


class SharedValues:
    """The shared values of one run."""

    def __init__(self, store: Store, clock: Clock, redactor: Redactor, run: str) -> None:
        self._store, self._clock, self._redactor, self._run = store, clock, redactor, run

    async def put(
        self,
        key: str,
        value: Any,
        *,
        writer: SessionName | None = None,
        claim: Guard | None = None,
        if_version: int | None = None,
    ) -> SharedValue:
        """Set the value of a key, and return it as stored.

        With `if_version`, only if the key still has that version (0: no value). Raises RefusedError, without a change,
        if the value is not allowed or the version differs, LeaseLost if the writer has lost its `claim`.
        """
        name, redacted = self._document_key(key), await anyio.to_thread.run_sync(self._check_value, value)

        async def attempt() -> SharedValue:
            document = await self._store.get(name)
            version = document.version if document else 0
            if if_version is not None and if_version != version:
                raise _version_conflict(key, if_version, version)
            stored = stored_values.SharedValue(
                value=redacted, writer=None if writer is None else str(writer), time=self._clock.now()
            )
            task, attempt = (None, None) if writer is None else (writer.task, writer.attempt)
            event = Event.of(SharedPut(run=self._run, task=task, attempt=attempt, key=key))
            write = Write(name, version, stored.model_dump())
            await self._check_capacity(name, len(orjson.dumps(write.value)))
            position = await self._store.commit(Commit([write], [event], [claim] if claim else []))
            created = version + 1 if document else await self._version_at(name, position)
            return SharedValue(key, created, stored.value, stored.writer, stored.time)

        try:
            return await retry_on_conflict(attempt)
        except InvalidDocument as error:
            raise RefusedError(f"can't store the value for {key}: {error}", "share a plain JSON value") from None

    async def get(self, key: str) -> SharedValue | None:
        """Return the value of a key, or None; raise RefusedError for an invalid key."""
        document = await self._store.get(self._document_key(key))
        return None if document is None else _read(key, document)

    async def wait(
        self,
        key: str,
        *,
        after: int | None = None,
        timeout: float = DEFAULT_WAIT,  # noqa: ASYNC109  a timeout of our clock that returns None
    ) -> SharedValue | None:
        """Wait for a value of a key with a version later than `after` (None: any value).

        Return None after `timeout` seconds. Raises RefusedError for an invalid key.
        """
        name, least = self._document_key(key), after or 0
        until = self._clock.monotonic() + timeout
        while True:
            position = await self._store.position()
            document = await self._store.get(name)
            if document is not None and document.version > least:
                return _read(key, document)
            if not math.isinf(until) and self._clock.monotonic() >= until:
                return None
            await self._wait_for_change(name, position, until)

    async def list(self, prefix: str = "") -> Sequence[SharedEntry]:
        """Return the entries whose keys begin with a prefix, by key."""
        documents = [one for one in await self._store.list(KIND, f"{self._run}/{prefix}") if not one.damaged]
        return [_entry(one.key.id.removeprefix(f"{self._run}/"), one) for one in documents]

    async def _wait_for_change(self, name: Key, position: int, until: float) -> None:
        """Wait until a document may have changed since a position, or until the deadline."""
        changed = anyio.Event()

        async def watch() -> None:
            with suppress(HistoryCompacted):  # the caller reads the document again
                async with aclosing(self._store.watch(position)) as records:
                    async for record in records:
                        if name in record.documents or name in record.unreadable:
                            break
            changed.set()

        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            await self._clock.wait(changed, None if math.isinf(until) else until)
            group.cancel_scope.cancel()

    async def _check_capacity(self, name: Key, size: int) -> None:
        """Raise RefusedError if a document of `size` bytes would exceed the run's limits."""
        sizes = {one.key: len(one.encoded) for one in await self._store.list(KIND, f"{self._run}/")}
        sizes[name] = size
        if len(sizes) > MAX_KEYS or sum(sizes.values()) > MAX_BYTES:
            key = name.id.removeprefix(f"{self._run}/")
            message = f"can't store {key}: run {self._run} already has {len(sizes) - 1} other shared values"
            limits = f"limits: {MAX_KEYS} values, {MAX_BYTES >> 20} MiB in total"
            raise RefusedError(f"{message} ({limits})", "reuse a key, or share less text")

    async def _version_at(self, name: Key, position: int) -> int:
        """Return the version that a commit created.

        Versions continue after a deleted document.
        """
        versions = [one.version for one in await self._store.history(name) if one.position == position]
        return versions[0] if versions else 1

    def _document_key(self, key: str) -> Key:
        try:
            parts = [check_name(part) for part in key.split("/")]
        except ValueError:
            parts = []
        if not parts or len(key) > MAX_KEY_LENGTH:
            remedy = f"use names of letters, digits, '.', '_' and '-' joined by '/', up to {MAX_KEY_LENGTH} characters"
            raise RefusedError(f"invalid key for a shared value: {key[:80]!r}", remedy)
        if self._redactor.text(key) != key:
            raise RefusedError("the key of a shared value contains a secret", "use another key")
        return Key(KIND, f"{self._run}/{key}")

    def _check_value(self, value: Any) -> Any:
        """Return the stored form of a value. Blocks."""
        try:
            plain = orjson.loads(orjson.dumps(value))
            strict_json.check_value(value)  # orjson silently writes NaN and the like as null
            redacted = self._redactor.json(plain)
            size = len(orjson.dumps(redacted))
        except (ValueError, TypeError) as error:
            raise RefusedError(f"can't share the value: {error}", "share a plain JSON value") from None
        if size > MAX_SHARED_BYTES:
            remedy = "share only data that other sessions need, and put the rest into a file in the repository"
            raise RefusedError(f"the value has {size} bytes (limit: {MAX_SHARED_BYTES})", remedy)
        return redacted


def require_value(key: str, value: SharedValue | None) -> SharedValue:
    """Return the value of a key; raise RefusedError if there is none."""
    if value is None:
        remedy = "list all values with `council share list`, or wait for this one with `council share wait`"
        raise RefusedError(f"there is no shared value {key}", remedy)
    return value


def require_new_value(key: str, value: SharedValue | None, timeout: float) -> SharedValue:
    """Return the awaited value; raise RefusedError after a timeout (seconds)."""
    if value is None:
        remedy = "continue with other work and try again, or wait longer with --timeout"
        raise RefusedError(f"no new shared value {key} within {timeout:g} s", remedy)
    return value


def _read(key: str, document: Document) -> SharedValue:
    stored = None
    if not document.damaged:
        try:
            stored = stored_values.SharedValue.model_validate_json(document.encoded)
        except ValueError:  # not written by `SharedValues`
            stored = None
    if stored is None:
        raise RefusedError(f"the shared value {key} is unreadable", "put the value again")
    return SharedValue(key, document.version, stored.value, stored.writer, stored.time)


def _entry(key: str, document: Document) -> SharedEntry:
    value = document.value
    size = len(orjson.dumps(value.get("value")))
    return SharedEntry(key, document.version, size, value.get("writer"), document.time)


def _version_conflict(key: str, expected: int, actual: int) -> RefusedError:
    state = f"is at version {actual}" if actual else "has no value"
    message = f"{key} {state}, not at version {expected}" if expected else f"{key} {state}, but was expected to be new"
    return RefusedError(message, "get the current value, and put a new one based on it")
