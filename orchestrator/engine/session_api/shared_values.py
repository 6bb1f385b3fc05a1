"""Values that the sessions of a run share by name: put there by one, read and waited for by others.

A value is a document; its version is the document's, which only rises, also where a value was gone in between. What
sessions say is data: it is bounded, and no secret is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import aclosing, suppress
from functools import cache
from typing import Any, Final, NamedTuple

import anyio
import anyio.to_thread
import orjson
from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter

from orchestrator.client import strict_json
from orchestrator.client.commands import MAX_SHARED_BYTES
from orchestrator.config.source.names import check_name
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.security.secrets import Redactor
from orchestrator.errors import HistoryCompacted, InvalidDocument, RefusedError
from orchestrator.protocols import Commit, Document, Event, Guard, JsonObject, Key, Store, Write
from orchestrator.state.documents.update import retry_on_conflict
from orchestrator.system.clock import Clock

KIND: Final = "shared"

#: Characters of a key; how many keys a run has. Whoever writes at the very same moment may get past that.
MAX_KEY_LENGTH: Final = 200
MAX_KEYS: Final = 1000
#: Bytes of all values of a run, as they are stored: one commit must be able to write them all.
MAX_BYTES: Final = 32 << 20
#: Seconds for which a value is waited for by whoever does not say how long.
DEFAULT_WAIT: Final = 30.0


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    value: JsonValue
    writer: str | None
    time: float


class SharedValue(NamedTuple):
    """A value as it was read: its version, the session that put it there, and when (wall-clock seconds).

    Without a writer, no session did.
    """

    key: str
    version: int
    value: Any
    writer: str | None
    time: float

    def to_json(self) -> JsonObject:
        """Return the object that programs get."""
        return self._asdict()


class SharedEntry(NamedTuple):
    """What a list says of a value: as `SharedValue`, but for its size in bytes in place of the value."""

    key: str
    version: int
    size: int
    writer: str | None
    time: float

    def to_json(self) -> JsonObject:
        """Return the object that programs get."""
        return self._asdict()


class SharedValues:
    """What the sessions of one run share."""

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
        """Put a value under a key in place of what is there, and return it as it was stored.

        With `if_version`, only if that is its version still (0: if there is none). RefusedError for what does not fit,
        with nothing changed; LeaseLost where the `claim` is not the writer's.
        """
        name, kept = self._named(key), await anyio.to_thread.run_sync(self._check_value, value)

        async def attempt() -> SharedValue:
            found = await self._store.get(name)
            version = found.version if found else 0
            if if_version is not None and if_version != version:
                raise _version_conflict(key, if_version, version)
            stored = _Stored(value=kept, writer=None if writer is None else str(writer), time=self._clock.now())
            task, attempt = (None, None) if writer is None else (writer.task, writer.attempt)
            event = Event("shared.put", {"run": self._run, "task": task, "attempt": attempt, "key": key})
            write = Write(name, version, stored.model_dump())
            await self._check_room(name, len(orjson.dumps(write.value)))
            position = await self._store.commit(Commit([write], [event], [claim] if claim else []))
            made = version + 1 if found else await self._version_at(name, position)
            return SharedValue(key, made, stored.value, stored.writer, stored.time)

        try:
            return await retry_on_conflict(attempt)
        except InvalidDocument as error:
            raise RefusedError(f"the value for {key} can't be stored: {error}", "share plain JSON") from None

    async def get(self, key: str) -> SharedValue | None:
        """Return what is under a key now; None if nothing is. RefusedError for what is no key."""
        found = await self._store.get(self._named(key))
        return None if found is None else _read(key, found)

    async def wait(
        self,
        key: str,
        *,
        after: int | None = None,
        timeout: float = DEFAULT_WAIT,
    ) -> SharedValue | None:
        """Return what is under a key as soon as there is anything, or a version later than `after`.

        None where nothing such comes within `timeout` seconds. RefusedError for what is no key.
        """
        name, least = self._named(key), after or 0
        until = self._clock.monotonic() + timeout
        while True:
            position = await self._store.position()
            found = await self._store.get(name)
            if found is not None and found.version > least:
                return _read(key, found)
            if not math.isinf(until) and self._clock.monotonic() >= until:
                return None
            await self._change(name, position, until)

    async def list(self, prefix: str = "") -> Sequence[SharedEntry]:
        """Return what there is under keys that begin with a prefix, by key."""
        found = [one for one in await self._store.list(KIND, f"{self._run}/{prefix}") if not one.damaged]
        return [_entry(one.key.id.removeprefix(f"{self._run}/"), one) for one in found]

    async def _change(self, name: Key, position: int, until: float) -> None:
        """Wait until a document may have changed since a position, or the time has come."""
        changed = anyio.Event()

        async def look() -> None:
            with suppress(HistoryCompacted):  # what came in between is seen by looking anew
                async with aclosing(self._store.watch(position)) as records:
                    async for record in records:
                        if name in record.documents or name in record.unreadable:
                            break
            changed.set()

        async with anyio.create_task_group() as group:
            group.start_soon(look)
            await self._clock.wait(changed, None if math.isinf(until) else until)
            group.cancel_scope.cancel()

    async def _check_room(self, name: Key, size: int) -> None:
        """Refuse a document of so many bytes where the run has no room for it beside the others."""
        sizes = {one.key: len(one.encoded) for one in await self._store.list(KIND, f"{self._run}/")}
        sizes[name] = size
        if len(sizes) > MAX_KEYS or sum(sizes.values()) > MAX_BYTES:
            key = name.id.removeprefix(f"{self._run}/")
            what = f"there is no room for {key}: run {self._run} has {len(sizes) - 1} other shared values"
            remedy = f"{MAX_KEYS} fit, of {MAX_BYTES >> 20} MiB in all: use a key that is there, or less text"
            raise RefusedError(what, remedy)

    async def _version_at(self, name: Key, position: int) -> int:
        """Return the version that a commit made: versions go on behind those of a document that was gone."""
        made = [one.version for one in await self._store.history(name) if one.position == position]
        return made[0] if made else 1

    def _named(self, key: str) -> Key:
        try:
            parts = [check_name(part) for part in key.split("/")]
        except ValueError:
            parts = []
        if not parts or len(key) > MAX_KEY_LENGTH:
            remedy = f"use up to {MAX_KEY_LENGTH} characters: names of letters, digits, '.', '_' and '-', with '/' between them"
            raise RefusedError(f"{key[:80]!r} can't be the key of a shared value", remedy)
        if self._redactor.text(key) != key:
            raise RefusedError("the key of a shared value has a secret in it", "name it after what it is about")
        return Key(KIND, f"{self._run}/{key}")

    def _check_value(self, value: Any) -> Any:
        """Return a value as it is stored. Takes its time."""
        try:
            plain = orjson.loads(orjson.dumps(value))
            strict_json.check_value(value)  # what orjson writes as null, it does not tell of
            kept = self._redactor.json(plain)
            size = len(orjson.dumps(kept))
        except (ValueError, TypeError) as error:
            raise RefusedError(f"the value can't be shared: {error}", "share plain JSON") from None
        if size > MAX_SHARED_BYTES:
            remedy = "share what others need, and put the rest into a file of the repository"
            raise RefusedError(f"the value has {size} bytes, {MAX_SHARED_BYTES} fit", remedy)
        return kept


def require_value(key: str, found: SharedValue | None) -> SharedValue:
    """Return what was found under a key; RefusedError where nothing was."""
    if found is None:
        remedy = "`council share list` names what there is, `council share wait` waits for what is to come"
        raise RefusedError(f"nothing is shared as {key}", remedy)
    return found


def require_new_value(key: str, found: SharedValue | None, timeout: float) -> SharedValue:
    """Return what was waited for so many seconds; RefusedError where it did not come."""
    if found is None:
        remedy = "go on with something else and ask again, or wait longer with --timeout"
        raise RefusedError(f"nothing new was shared as {key} within {timeout:g} s", remedy)
    return found


@cache
def _stored() -> TypeAdapter[_Stored]:
    return TypeAdapter(_Stored)


def _read(key: str, found: Document) -> SharedValue:
    stored = None
    if not found.damaged:
        try:
            stored = _stored().validate_json(found.encoded)
        except ValueError:  # somebody wrote it who should not have
            stored = None
    if stored is None:
        raise RefusedError(f"what is shared as {key} can't be read", "put it there anew")
    return SharedValue(key, found.version, stored.value, stored.writer, stored.time)


def _entry(key: str, found: Document) -> SharedEntry:
    value = found.value
    return SharedEntry(key, found.version, len(orjson.dumps(value.get("value"))), value.get("writer"), found.time)


def _version_conflict(key: str, expected: int, found: int) -> RefusedError:
    now = f"is at version {found}" if found else "is not there"
    what = f"{key} {now}, not at version {expected}" if expected else f"{key} {now}, and was to be new"
    return RefusedError(what, "look at what it is now, and put what follows from that")
