r"""The codec of the commit log: one line per commit, which makes damage locatable.

    <crc of the rest of the head> <header length> <payload length> <header> <payload crc> <payload>\n

Numbers are eight hexadecimal digits. The header has the position, time and writer, the position up to which the log was
durable at that time, and for each document its kind, id, version, encoded length, the position of its previous version
and an optional expiry. The payload is `[[value, …], [[event type, data], …]]`. Each part has its own checksum: if the
payload is damaged, the header still shows which documents lost which version. Lengths are covered by the header's
checksum, so that a reader can skip a damaged payload. A value is extracted from the payload by its length, without
parsing.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import orjson

from orchestrator.errors import InvalidDocument
from orchestrator.protocols import (
    Commit,
    CommitRecord,
    DocumentVersion,
    DumpedCommit,
    DumpedDocument,
    Event,
    Guard,
    JsonObject,
    Key,
)

MAX_DOCUMENT_BYTES: Final = 4 << 20
MAX_COMMIT_BYTES: Final = 64 << 20
MAX_TTL: Final = 1e9  # seconds, about thirty years
MAX_DEPTH: Final = 254
"""The maximum nesting depth of values: the limit of orjson, and far below the recursion limits of other readers."""
MAX_CONTAINERS: Final = 100_000
"""The maximum number of lists and objects per level: a value that contains itself twice would grow forever."""

#: Only JSON types: no dates, no data classes.
_PLAIN: Final = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS

_HEAD = re.compile(rb"([0-9a-f]{8}) ([0-9a-f]{8}) ([0-9a-f]{8}) ")
_HEAD_BYTES: Final = 27
_CHECKED_FROM: Final = 9  # after the head's own checksum
_CHECKSUM_BYTES: Final = 10  # of the payload, with a space on each side


class LineChange(NamedTuple):
    """A document in a header: its new version, and its length in bytes (0: deleted)."""

    key: Key
    version: int
    length: int
    previous: int = 0
    """The position of the previous version; 0 if there is none or it is unknown."""
    expires: float | None = None


class EncodedWrite(NamedTuple):
    """A `Write` with the length of its value in place of the value."""

    key: Key
    expected: int
    length: int
    ttl: float | None


@dataclass(frozen=True, slots=True)
class EncodedCommit:
    """A commit validated by the strict codec."""

    writes: Sequence[EncodedWrite]
    guards: Sequence[Guard]
    payload: bytes
    durable: bool
    id: str


class LogLine(NamedTuple):
    """A commit in the log. `payload` is empty if its bytes are damaged."""

    position: int
    time: float
    changes: Sequence[LineChange]
    payload: bytes
    writer: str = ""
    durable: int = 0
    """The position up to which the log was known to be durable when this was written."""

    @property
    def is_damaged(self) -> bool:
        """Whether only the header is readable."""
        return not self.payload


class DecodedLine(NamedTuple):
    """A line with a valid header, ending before offset `end`.

    `terminator` is the byte in place of its newline.
    """

    end: int
    line: LogLine
    terminator: bytes


@dataclass(frozen=True, slots=True)
class UnreadableBytes:
    """Bytes up to offset `end` that are not a valid line."""

    end: int


@dataclass(frozen=True, slots=True)
class IncompleteLine:
    """The beginning of a line whose rest does not exist (yet)."""

    end: int


class RecordedDocuments(Mapping[Key, tuple[int, JsonObject | None]]):
    """The documents of a `CommitRecord`, decoded when they are read: most followers read few of them."""

    def __init__(self, encoded: Mapping[Key, tuple[int, bytes | None]]) -> None:
        """Take the version and the encoded value (None: deleted) of each document."""
        self._encoded = encoded
        self._decoded: dict[Key, tuple[int, JsonObject | None]] = {}

    def __getitem__(self, key: Key) -> tuple[int, JsonObject | None]:
        if key not in self._decoded:
            version, value = self._encoded[key]
            self._decoded[key] = version, None if value is None else json.loads(value)
        return self._decoded[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._encoded)

    def __len__(self) -> int:
        return len(self._encoded)

    def __contains__(self, key: object) -> bool:
        return key in self._encoded

    def __repr__(self) -> str:
        return repr(dict(self))


ScanResult = DecodedLine | UnreadableBytes | IncompleteLine


def encode_commit(commit: Commit) -> EncodedCommit:
    """Return `commit` as bytes, ready for any position.

    Raises InvalidDocument if a value can't be stored.
    """
    writes, values = [], []
    for write in commit.writes:
        encoded = b"" if write.value is None else encode_object(write.key, write.value)
        if write.ttl is not None and not 0 < write.ttl <= MAX_TTL:
            raise InvalidDocument(
                str(write.key), f"its time to live is {write.ttl}, not between 0 and {MAX_TTL:g} seconds"
            )
        writes.append(EncodedWrite(write.key, write.expected, len(encoded), write.ttl))
        if encoded:
            values.append(encoded)
    _check_keys([write.key for write in commit.writes])
    return EncodedCommit(writes, commit.guards, _payload(values, commit.events), commit.durable, commit.id)


def _payload(values: Sequence[bytes], events: Sequence[Event]) -> bytes:
    payload = b"[[%b],[%b]]" % (b",".join(values), b",".join(map(_encode_event, events)))
    if len(payload) > MAX_COMMIT_BYTES:
        raise InvalidDocument("the commit", f"it has {len(payload)} bytes (limit: {MAX_COMMIT_BYTES})")
    return payload


def encode_line(line: LogLine) -> bytes:
    """Return the bytes of an undamaged line, including the newline."""
    header = encode_header(line)
    head = b"%08x %08x %b" % (len(header), len(line.payload), header)
    return b"%08x %b %08x %b\n" % (zlib.crc32(head), head, zlib.crc32(line.payload), line.payload)


def encode_header(line: LogLine) -> bytes:
    """Return a line without its payload, as JSON."""
    return orjson.dumps(
        {
            "position": line.position,
            "time": line.time,
            "by": line.writer,
            "durable": line.durable,
            "changes": [_columns(change) for change in line.changes],
        }
    )


def _columns(change: LineChange) -> tuple[Any, ...]:
    columns = (*change.key, change.version, change.length, change.previous)
    return columns if change.expires is None else (*columns, change.expires)


def scan(data: bytes, offset: int) -> ScanResult:
    """Return the item in `data` at `offset`. Never raises an error on damage.

    The offset must be inside. Encoded lines contain no newline except as their last byte. So bytes that begin like a
    line but extend beyond `data` are incomplete if no newline follows, and damaged if one does.
    """
    head = _HEAD.match(data, offset)
    header = None if head is None else _valid_header(data, head)
    if head is None or header is None:
        if data.find(b"\n", offset) < 0:
            return IncompleteLine(len(data))
        return UnreadableBytes(_resync(data, offset))
    header_end = offset + _HEAD_BYTES + len(header)
    payload_start = header_end + _CHECKSUM_BYTES
    end = payload_start + int(head[3], 16)
    payload, terminator = data[payload_start:end], data[end : end + 1]
    if len(data) < end and data.find(b"\n", header_end) < 0:
        return IncompleteLine(len(data))
    if data[header_end:payload_start] == b" %08x " % zlib.crc32(payload):
        return DecodedLine(end + len(terminator), decode_header(header, payload), terminator)
    # The length is trusted only if a newline is at that offset; otherwise bytes were lost, not changed.
    next_line = end + 1 if terminator == b"\n" else _resync(data, header_end)
    return DecodedLine(next_line, decode_header(header, b""), b"\n")


def find_never_durable(data: bytes, offset: int, position: int) -> int | None:
    """Return the offset of unreadable bytes that were never durable, or None.

    `offset` is after the commit at `position`. After a power failure, bytes that were not durable yet may be missing
    although later ones exist; a later line that was written when they were durable shows that they are damaged instead.
    """
    start = None
    while offset < len(data):
        item = scan(data, offset)
        if not isinstance(item, DecodedLine) or item.line.is_damaged:
            start = offset if start is None else start
        elif start is None or item.line.position == position + 1 or item.line.durable > position:
            start, position = None, item.line.position
        offset = item.end
    return start


def iter_values(line: LogLine) -> Iterator[tuple[LineChange, bytes | None]]:
    """Return each change of an undamaged line with its encoded value (None: deleted)."""
    return zip(line.changes, split_values(line.changes, line.payload), strict=True)


def split_values(changes: Sequence[LineChange | EncodedWrite], payload: bytes) -> Iterator[bytes | None]:
    """Yield the encoded value of each change in a payload (None: deleted)."""
    start = len("[[")
    for change in changes:
        if change.length == 0:
            yield None
            continue
        yield payload[start : start + change.length]
        start += change.length + len(",")


def split_events(changes: Sequence[LineChange | EncodedWrite], payload: bytes) -> bytes:
    """Return the encoded events in a payload, separated by commas."""
    lengths = [change.length for change in changes if change.length]
    return payload[len("[[") + sum(lengths) + max(len(lengths) - 1, 0) + len("],[") : -len("]]")]


def prune_line(line: LogLine, keys: Collection[Key]) -> LogLine:
    """Return a valid line with only the changes to some documents, and its events."""
    kept = [(change, value) for change, value in iter_values(line) if change.key in keys]
    events = split_events(line.changes, line.payload)
    payload = b"[[%b],[%b]]" % (b",".join(value for _, value in kept if value is not None), events)
    return line._replace(changes=tuple(change for change, _ in kept), payload=payload)


def without_damaged_payload(line: LogLine) -> LogLine:
    """Return a damaged line as a valid one with only its deletions.

    Deletions are certain even if the payload is damaged. Other lines are returned unchanged.
    """
    if not line.is_damaged:
        return line
    return line._replace(changes=tuple(one for one in line.changes if one.length == 0), payload=_payload((), ()))


def to_dumped(line: LogLine) -> DumpedCommit:
    """Convert an undamaged line to a commit for another store."""
    documents = tuple(
        DumpedDocument(change.key, change.version, value, change.expires, change.previous)
        for change, value in iter_values(line)
    )
    return DumpedCommit(line.position, line.time, line.writer, documents, _decode_events(line))


def _decode_events(line: LogLine) -> tuple[Event, ...]:
    return tuple(Event(*event) for event in json.loads(b"[%b]" % split_events(line.changes, line.payload)))


def from_dumped(commit: DumpedCommit) -> LogLine:
    """Convert a commit of another store to a line.

    Raises InvalidDocument for invalid names and events.
    """
    _check_keys([one.key for one in commit.documents])
    changes = tuple(
        LineChange(one.key, one.version, len(one.encoded or b""), one.previous, one.expires) for one in commit.documents
    )
    payload = _payload([one.encoded for one in commit.documents if one.encoded is not None], commit.events)
    return LogLine(commit.position, commit.time, changes, payload, commit.writer)


def to_record(line: LogLine) -> CommitRecord:
    """Return a line's record for followers of the log."""
    if line.is_damaged:
        deleted = {change.key: (change.version, None) for change in line.changes if change.length == 0}
        lost = [change.key for change in line.changes if change.length]
        return CommitRecord(line.position, line.time, deleted, (), lost, line.writer)
    documents = RecordedDocuments({change.key: (change.version, value) for change, value in iter_values(line)})
    return CommitRecord(line.position, line.time, documents, _decode_events(line), (), line.writer)


def to_version(line: LogLine, key: Key) -> DocumentVersion:
    """Return the version of a document that a line wrote.

    The line must have written one.
    """
    record = to_record(line)
    change = next(change for change in line.changes if change.key == key)
    value = record.documents.get(key, (0, None))[1]
    return DocumentVersion(
        change.version,
        line.position,
        line.time,
        line.writer,
        value,
        record.events,
        line.is_damaged and change.length > 0,
    )


def _valid_header(data: bytes, head: re.Match[bytes]) -> bytes | None:
    crc, length, _ = head.groups()
    checked = data[head.start() + _CHECKED_FROM : head.end() + int(length, 16)]
    return checked[_HEAD_BYTES - _CHECKED_FROM :] if zlib.crc32(checked) == int(crc, 16) else None


def decode_header(header: bytes, payload: bytes) -> LogLine:
    """Return the line of an intact header; the payload is empty if it is damaged."""
    found = orjson.loads(header)
    position = found["position"]
    changes = tuple([LineChange(Key(kind, name), *rest) for kind, name, *rest in found["changes"]])
    return LogLine(position, found["time"], changes, payload, found.get("by", ""), found.get("durable", position - 1))


def _resync(data: bytes, offset: int) -> int:
    """Return the offset of the next line whose header is valid, or incomplete."""
    while (newline := data.find(b"\n", offset)) >= 0:
        offset = newline + 1
        head = _HEAD.match(data, offset)
        if head is None and len(data) - offset < _HEAD_BYTES:
            return offset
        if head and (len(data) < head.end() + int(head[2], 16) or _valid_header(data, head) is not None):
            return offset
    return len(data)


def _encode_event(event: Event) -> bytes:
    data = encode_object(event.type, event.data)
    return b"[%b,%b]" % (_encode_text(event.type, event.type), data)


def _check_keys(keys: Sequence[Key]) -> None:
    seen = set()
    for key in keys:
        for part in key:
            if type(part) is not str or not part.isascii():  # most are ASCII, and are valid without encoding them
                _encode_text(key, part)
        if key in seen:
            raise InvalidDocument(str(key), "the commit writes it twice")
        seen.add(key)


def _encode_text(subject: Key | str, text: str) -> bytes:
    if not isinstance(text, str):
        raise InvalidDocument(_named(subject), f"its name is a {type(text).__name__}, not text")
    try:
        return orjson.dumps(text)
    except TypeError:
        raise InvalidDocument(_named(subject), "its name has an unpaired surrogate, which is not valid text") from None


def _named(subject: Key | str) -> str:
    """Return the name of a document or event for an error message."""
    if isinstance(subject, str):
        return f"event {subject!r}"
    try:
        return str(subject).encode().decode()
    except UnicodeError:
        return repr(subject)


def encode_object(subject: Key | str, value: Any) -> bytes:
    """Return a JSON object on one line.

    Raises InvalidDocument, with the name of the document or event.
    """
    if not isinstance(value, dict):
        raise InvalidDocument(_named(subject), f"it is a {type(value).__name__}, not an object")
    encoded = _encode_fast(value)
    if encoded is None:
        _check_shape(_named(subject), value)
        encoded = _encode(_named(subject), value)
    if len(encoded) > MAX_DOCUMENT_BYTES:
        raise InvalidDocument(_named(subject), f"it has {len(encoded)} bytes (limit: {MAX_DOCUMENT_BYTES})")
    return encoded


def _encode_fast(value: dict[str, Any]) -> bytes | None:
    """Return the value as bytes, or None if the strict encoder must check it."""
    try:
        encoded = orjson.dumps(value, option=_PLAIN)
    except TypeError:  # JSONEncodeError is a TypeError, raised even for integers of more than 64 bits
        return None
    # orjson writes NaN and infinity as null.
    return encoded if b"null" not in encoded or orjson.loads(encoded) == value else None


def _check_shape(subject: str, value: dict[str, Any]) -> None:
    """Reject values that JSON alters or fails on: non-text keys, depth, cycles."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        children: list[Any] = []
        for node in level:
            if isinstance(node, dict) and not all(isinstance(name, str) for name in node):
                raise InvalidDocument(subject, "a field name is not text")
            inner = node.values() if isinstance(node, dict) else node
            children += [child for child in inner if isinstance(child, (dict, list, tuple))]
        if not children:
            return
        if len(children) > MAX_CONTAINERS:
            raise InvalidDocument(subject, f"it has more than {MAX_CONTAINERS} lists and objects")
        level = children
    raise InvalidDocument(subject, f"it nests deeper than {MAX_DEPTH} levels")


def _encode(subject: str, value: Any) -> bytes:
    try:
        return _encoder.encode(value).encode()
    except UnicodeEncodeError:
        raise InvalidDocument(subject, "it has an unpaired surrogate, which is not valid text") from None
    except (TypeError, ValueError) as error:
        raise InvalidDocument(subject, str(error)) from None


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))


def get_writer_name() -> str:
    """Return `user@host:pid` of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # the user id has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}:{os.getpid()}"
