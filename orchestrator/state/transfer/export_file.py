"""A whole log in one file: JSON lines in one Zstandard frame (RFC 8878).

    {"format": "council-state", "version": 1, "position": …, "first": …, "time": …, "writer": …}
    {"position": …, "time": …, "writer": …, "documents": [{"kind", "id", "version", "value", "expires", "previous"}, …],
     "events": [{"type", "data"}, …]}
    …
    {"commits": …, "sha256": …}

The file is readable with `zstdcat`. The last line has the number of commits and the SHA-256 of all lines before it, so
that a truncated or changed file is detected before its content is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import IO, TYPE_CHECKING, Annotated, Any, Final, Literal, NoReturn, TypeVar

import orjson
from anyio import to_thread
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from orchestrator import lazy
from orchestrator.domain.documents.times import Instant
from orchestrator.errors import InvalidDocument, RefusedError
from orchestrator.protocols import Dump, DumpedCommit, DumpedDocument, Event, Key
from orchestrator.state.log.codec import MAX_COMMIT_BYTES, encode_object, get_writer_name

if TYPE_CHECKING:
    from zstandard import ZstdCompressionObj

FORMAT: Final = "council-state"
VERSION: Final = 1
#: The remedy for an incomplete file.
REMEDY: Final = "export the state again, or use another copy of the file"

_LEVEL: Final = 9
_BATCH_BYTES: Final = 1 << 20
_READ_BYTES: Final = 256  # compressed bytes: in the worst case 8 MB of lines
_LONGEST_LINE: Final = 2 * MAX_COMMIT_BYTES
#: The maximum position and version. All JSON readers distinguish integers up to this one.
_HIGHEST: Final = 1 << 53

Model = TypeVar("Model", bound=BaseModel)


def _check_text(text: str) -> str:
    if any("\ud800" <= one <= "\udfff" for one in text):
        raise ValueError("it has an unpaired surrogate, which is not valid text")
    return text


_Text = Annotated[str, AfterValidator(_check_text)]
_Position = Annotated[int, Field(ge=1, le=_HIGHEST)]
_PositionOrNone = Annotated[int, Field(ge=0, le=_HIGHEST)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Header(_Strict):
    format: Literal["council-state"] = FORMAT
    version: Literal[1] = VERSION
    position: _PositionOrNone
    first: _PositionOrNone
    time: Instant
    writer: _Text


class _Document(_Strict):
    kind: _Text
    id: _Text
    version: _Position
    value: dict[str, Any] | None
    expires: float | None
    previous: _PositionOrNone


class _Event(_Strict):
    type: _Text
    data: dict[str, Any]


class _Commit(_Strict):
    position: _Position
    time: Instant
    writer: _Text
    documents: list[_Document]
    events: list[_Event]


class _Footer(_Strict):
    commits: int
    sha256: str


def commit_line(commit: DumpedCommit) -> bytes:
    """Return a commit as a line. Equal commits have equal lines."""
    documents = b",".join(map(_document, commit.documents))
    events = b",".join(
        b'{"type":%b,"data":%b}' % (orjson.dumps(event.type), encode_object(event.type, event.data))
        for event in commit.events
    )
    head = orjson.dumps({"position": commit.position, "time": commit.time, "writer": commit.writer})
    return b'%b,"documents":[%b],"events":[%b]}\n' % (head[:-1], documents, events)


def _document(one: DumpedDocument) -> bytes:
    name = orjson.dumps({"kind": one.key.kind, "id": one.key.id, "version": one.version})
    rest = orjson.dumps({"expires": one.expires, "previous": one.previous})
    return b'%b,"value":%b,%b' % (name[:-1], one.encoded or b"null", rest[1:])


class CommitDigest:
    """The number, size and checksum of commits, for comparing stores."""

    def __init__(self) -> None:
        self.commits = self.bytes = 0
        self._sum = hashlib.sha256()

    def add(self, commit: DumpedCommit) -> bytes:
        """Add a commit; return its line."""
        line = commit_line(commit)
        self.commits, self.bytes = self.commits + 1, self.bytes + len(line)
        self._sum.update(line)
        return line

    async def through(self, commits: AsyncGenerator[DumpedCommit]) -> AsyncGenerator[DumpedCommit]:
        """Add commits, and yield them."""
        async with aclosing(commits) as found:
            async for commit in found:
                self.add(commit)
                yield commit

    def result(self) -> tuple[int, bytes]:
        """Return the number and checksum of the commits.

        Two results are equal if all commits are equal.
        """
        return self.commits, self._sum.digest()


class _Writer:
    """Compresses lines to a stream. Blocks."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.sum, self.bytes = stream, hashlib.sha256(), 0
        self._packer: ZstdCompressionObj = lazy.zstandard.ZstdCompressor(
            level=_LEVEL, write_checksum=True
        ).compressobj()

    def write(self, lines: bytes) -> None:
        self.sum.update(lines)
        self._put(self._packer.compress(lines))

    def finish(self, commits: int) -> None:
        self.write(_Footer(commits=commits, sha256=self.sum.hexdigest()).model_dump_json().encode() + b"\n")
        self._put(self._packer.flush())
        self._stream.flush()

    def _put(self, packed: bytes) -> None:
        self._stream.write(packed)
        self.bytes += len(packed)


async def write_export(stream: IO[bytes], dump: Dump, time: float) -> tuple[CommitDigest, int]:
    """Write a dump to a stream; return the commits' digest and the compressed size.

    `time` is the current wall-clock time in seconds.
    """
    header = _Header(position=dump.position, first=dump.first, time=time, writer=get_writer_name())
    writer, digest = await to_thread.run_sync(_Writer, stream), CommitDigest()
    batch, size = [header.model_dump_json().encode() + b"\n"], 0
    async with aclosing(dump.commits) as commits:
        async for commit in commits:
            batch.append(digest.add(commit))
            size += len(batch[-1])
            if size >= _BATCH_BYTES:
                await to_thread.run_sync(writer.write, b"".join(batch))
                batch, size = [], 0
    await to_thread.run_sync(writer.write, b"".join(batch))
    await to_thread.run_sync(writer.finish, digest.commits)
    return digest, writer.bytes


class ExportReader:
    """Reads an export from a stream, line by line. Blocks.

    Raises RefusedError for an incomplete or invalid file.
    """

    def __init__(self, name: str, stream: IO[bytes]) -> None:
        """Read the header; `name` is the file's name in errors."""
        self._name, self._stream = name, stream
        self._unpacker, self._error = lazy.zstandard.ZstdDecompressor().decompressobj(), lazy.zstandard.ZstdError
        self._sum = hashlib.sha256()
        self._lines = self._read_lines()
        self._commits = 0
        self._has_ended = False
        self.bytes = 0
        """The number of compressed bytes read."""
        self.header = self._read_header()

    def commits(self) -> list[DumpedCommit]:
        """Return the next commits; empty after the last one, once all have been verified."""
        commits, size = list[DumpedCommit](), 0
        while not self._has_ended and size < _BATCH_BYTES:
            line = next(self._lines, b"")
            if not line:
                self._refuse("it is truncated")
            value = self._parse(line)
            if "sha256" in value:
                self._check_end(self._model(_Footer, value))
                self._has_ended = True
            else:
                self._sum.update(line)
                commits.append(self._commit(value))
                self._commits += 1
                size += len(line)
        return commits

    def _check_end(self, footer: _Footer) -> None:
        if (footer.commits, footer.sha256) != (self._commits, self._sum.hexdigest()):
            self._refuse("its content does not match its checksum")
        if next(self._lines, None) is not None:
            self._refuse("it has data after its end")

    def _read_header(self) -> _Header:
        line = next(self._lines, b"")
        value = self._parse(line)
        if value.get("format") != FORMAT:
            self._refuse("it is not a state export", "use a file written by `council state export`")
        if value.get("version") != VERSION:
            what = f"its format version is {value.get('version')}; this council reads version {VERSION}"
            self._refuse(what, "use the council version that wrote it, or a newer one")
        self._sum.update(line)
        header = self._model(_Header, value)
        if header.first > header.position:
            self._refuse(f"its first position ({header.first}) is after its newest ({header.position})")
        return header

    def _read_lines(self) -> Iterator[bytes]:
        rest = b""
        for data in self._unpacked():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line + b"\n"
            if len(rest) > _LONGEST_LINE:
                self._refuse(f"one of its lines is longer than {_LONGEST_LINE} bytes")
        if rest:
            self._refuse("it is truncated")

    def _unpacked(self) -> Iterator[bytes]:
        while packed := self._stream.read(_READ_BYTES):
            self.bytes += len(packed)
            if self._unpacker.eof:
                self._refuse("it has data after its end")
            try:
                data = self._unpacker.decompress(packed)
            except self._error as error:
                self._refuse(f"it is damaged or not a state export ({error})")
            if data:
                yield data
            if self._unpacker.unused_data:
                self._refuse("it has data after its end")
        if not self._unpacker.eof:
            self._refuse("it is truncated" if self.bytes else "it is empty")

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            self._refuse("one of its lines is not a JSON object")
        return value

    def _model(self, model: type[Model], value: dict[str, Any]) -> Model:
        try:
            return model.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            field = ".".join(map(str, first["loc"]))
            self._refuse(f"after commit {self._commits}, {field}: {first['msg']}")

    def _commit(self, value: dict[str, Any]) -> DumpedCommit:
        found = self._model(_Commit, value)
        documents = list[DumpedDocument]()
        try:
            for one in found.documents:
                key = Key(one.kind, one.id)
                if one.previous >= found.position:
                    self._refuse(f"commit {found.position} names commit {one.previous} as the previous one of {key}")
                encoded = None if one.value is None else encode_object(key, one.value)
                documents.append(DumpedDocument(key, one.version, encoded, one.expires, one.previous))
        except InvalidDocument as error:
            self._refuse(str(error))
        events = tuple(Event(one.type, one.data) for one in found.events)
        return DumpedCommit(found.position, found.time, found.writer, tuple(documents), events)

    def _refuse(self, what: str, remedy: str = REMEDY) -> NoReturn:
        raise RefusedError(f"{self._name}: {what}", remedy)


@asynccontextmanager
async def open_export(name: str, opens: Callable[[], IO[bytes]]) -> AsyncIterator[tuple[ExportReader, Dump]]:
    """Open an export as a dump. Errors are raised before the last commits are yielded."""
    with await to_thread.run_sync(opens) as stream:
        reader = await to_thread.run_sync(ExportReader, name, stream)
        yield reader, Dump(reader.header.position, reader.header.first, _commits(reader))


async def _commits(reader: ExportReader) -> AsyncGenerator[DumpedCommit]:
    while commits := await to_thread.run_sync(reader.commits):
        for commit in commits:
            yield commit
