"""A whole log in one file: JSON lines, packed as one Zstandard frame (RFC 8878), which `zstdcat` reads.

    {"format": "council-state", "version": 1, "position": …, "first": …, "time": …, "by": …}
    {"position": …, "time": …, "by": …, "documents": [{"kind", "id", "version", "value", "expires", "previous"}, …],
     "events": [{"type", "data"}, …]}
    …
    {"commits": …, "sha256": …}

The last line has the number of commits and the SHA-256 of all lines before it, so that what is cut off or changed is
known before anything is done with it. The lines of commits are also what two stores are compared by.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import IO, Annotated, Any, Final, Literal, NoReturn, TypeVar

import orjson
from anyio import to_thread
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from orchestrator.domain.documents.times import Instant
from orchestrator.errors import InvalidDocument, RefusedError
from orchestrator.protocols import Dump, DumpedCommit, DumpedDocument, Event, Key
from orchestrator.state.log.codec import MAX_COMMIT_BYTES, encode_object
from orchestrator.state.log.segments import make_durable, open_private, sync_folder

FORMAT: Final = "council-state"
VERSION: Final = 1

_LEVEL: Final = 9
_BATCH_BYTES: Final = 1 << 20
_READ_BYTES: Final = 256  # packed: at the very worst they unpack to some 8 MB, of as many lines
_LONGEST_LINE: Final = 2 * MAX_COMMIT_BYTES
#: What helps where a file is not whole.
REMEDY: Final = "export the state anew, or take another copy of the file"

#: Where no file can be, whoever asks.
_NO_PLACE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})
#: The highest of what is counted: all readers of JSON tell numbers up to there apart, and there is room behind it.
_HIGHEST: Final = 1 << 53

Model = TypeVar("Model", bound=BaseModel)


def _check_text(text: str) -> str:
    if any("\ud800" <= one <= "\udfff" for one in text):
        raise ValueError("it holds half a surrogate pair, which is not text")
    return text


_Text = Annotated[str, AfterValidator(_check_text)]
_Position = Annotated[int, Field(ge=1, le=_HIGHEST)]
_Before = Annotated[int, Field(ge=0, le=_HIGHEST)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ExportHeader(_Strict):
    """The first line."""

    format: Literal["council-state"] = FORMAT
    version: Literal[1] = VERSION
    position: _Before
    """Of the newest commit."""
    first: _Before
    """Of the oldest state that can be told; of the commits up to there some are missing, in whole or in part."""
    time: Instant
    """When it was exported (wall-clock seconds)."""
    by: _Text
    """The process that did, as `user@host:pid`."""


class _Document(_Strict):
    kind: _Text
    id: _Text
    version: _Position
    value: dict[str, Any] | None
    expires: float | None
    previous: _Before


class _Event(_Strict):
    type: _Text
    data: dict[str, Any]


class _Commit(_Strict):
    position: _Position
    time: Instant
    by: _Text
    documents: list[_Document]
    events: list[_Event]


class _Footer(_Strict):
    commits: int
    sha256: str


def commit_line(commit: DumpedCommit) -> bytes:
    """Return a commit as a line; commits of which the same is told have the same."""
    documents = b",".join(map(_document, commit.documents))
    events = b",".join(
        b'{"type":%b,"data":%b}' % (orjson.dumps(event.type), encode_object(event.type, event.data))
        for event in commit.events
    )
    place = orjson.dumps({"position": commit.position, "time": commit.time, "by": commit.by})
    return b'%b,"documents":[%b],"events":[%b]}\n' % (place[:-1], documents, events)


def _document(one: DumpedDocument) -> bytes:
    name = orjson.dumps({"kind": one.key.kind, "id": one.key.id, "version": one.version})
    rest = orjson.dumps({"expires": one.expires, "previous": one.previous})
    return b'%b,"value":%b,%b' % (name[:-1], one.encoded or b"null", rest[1:])


class ExportWriter:
    """Writes the lines of a dump, packed, to a stream. Its methods block."""

    def __init__(self, stream: IO[bytes], header: ExportHeader) -> None:
        """Begin with the header."""
        import zstandard  # noqa: PLC0415  most processes never pack or unpack

        self._stream = stream
        self._packer = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compressobj()
        self._sum = hashlib.sha256()
        self._commits = 0
        self.bytes = 0
        """How many were written, packed."""
        self._write(header.model_dump_json().encode() + b"\n")

    def add(self, lines: list[bytes]) -> None:
        """Write some commits."""
        self._commits += len(lines)
        self._write(b"".join(lines))

    def finish(self) -> None:
        """Write the last line."""
        footer = _Footer(commits=self._commits, sha256=self._sum.hexdigest())
        self._put(self._packer.compress(footer.model_dump_json().encode() + b"\n") + self._packer.flush())
        self._stream.flush()

    def _write(self, lines: bytes) -> None:
        self._sum.update(lines)
        self._put(self._packer.compress(lines))

    def _put(self, packed: bytes) -> None:
        self._stream.write(packed)
        self.bytes += len(packed)


async def write_export(stream: IO[bytes], header: ExportHeader, lines: AsyncGenerator[bytes]) -> int:
    """Write the lines of commits to a stream as such a file; return how many bytes it has."""
    writer = await to_thread.run_sync(ExportWriter, stream, header)
    batch, size = list[bytes](), 0
    async for line in lines:
        batch.append(line)
        size += len(line)
        if size >= _BATCH_BYTES:
            await to_thread.run_sync(writer.add, batch)
            batch, size = [], 0
    await to_thread.run_sync(writer.add, batch)
    await to_thread.run_sync(writer.finish)
    return writer.bytes


class StagedFile:
    """A file that is written beside its place, and put there when it is whole. Its methods block."""

    def __init__(self, path: Path, *, force: bool) -> None:
        """Begin one for `path`; RefusedError where something is there already, unless `force` says to replace it."""
        self._path, self._force = path, force
        self._check()
        self._aside = path.with_name(f"{path.name}.{token_hex(6)}.new")
        try:
            self.stream = open(self._aside, "xb", opener=open_private)  # noqa: SIM115  it is closed by `put` or `discard`
        except OSError as error:
            if error.errno in _NO_PLACE:
                what = f"{path} can't be made: {(error.strerror or str(error)).lower()}"
                raise RefusedError(what, "name a file in a folder that is there") from None
            raise

    def put(self) -> None:
        """Put it into its place, durably."""
        self.stream.close()
        make_durable(self._aside)
        if self._force:
            self._aside.rename(self._path)
        else:
            self._check()
            try:
                self._path.hardlink_to(self._aside)  # which, unlike a renaming, never replaces anything
            except FileExistsError:
                self._check()
                raise
            except OSError:  # a file system without links
                self._aside.rename(self._path)
        self._aside.unlink(missing_ok=True)
        sync_folder(self._path.parent)

    def discard(self) -> None:
        """Leave nothing of it, unless it was put."""
        with suppress(OSError):  # what is written last at the end of a full disk
            self.stream.close()
        self._aside.unlink(missing_ok=True)

    def _check(self) -> None:
        if os.path.isdir(self._path):  # noqa: PTH112  a name that is too long is told of later
            raise RefusedError(f"{self._path} is a folder", "name a file")
        if not os.path.lexists(self._path):
            return
        if self._path.is_symlink():  # to replace it would leave what it leads to as it is, and as old
            raise RefusedError(f"{self._path} is a link", "name the file that it leads to")
        if not self._path.is_file():  # nobody wants a device or a pipe to become one
            raise RefusedError(f"{self._path} is no file", "name one, or write to it by `- > FILE`")
        if not self._force:
            raise RefusedError(f"{self._path} is there already", "name another file, or replace it with --force")


class ExportReader:
    """Reads such a file from a stream, line by line. Its methods block; RefusedError tells what is not whole."""

    def __init__(self, name: str, stream: IO[bytes]) -> None:
        """Read the header; `name` is what the file is called in errors."""
        import zstandard  # noqa: PLC0415  most processes never pack or unpack

        self._name, self._stream = name, stream
        self._unpacker, self._error = zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
        self._sum = hashlib.sha256()
        self._lines = self._read_lines()
        self._commits = 0
        self._is_over = False
        self.bytes = 0
        """How many were read, packed."""
        self.header = self._read_header()

    def commits(self) -> list[DumpedCommit]:
        """Return the next commits; none behind the last, of which it is known then that all were as they should be."""
        commits, size = list[DumpedCommit](), 0
        while not self._is_over and size < _BATCH_BYTES:
            line = next(self._lines, b"")
            if not line:
                self._refuse("it is cut off")
            value = self._parse(line)
            if "sha256" in value:
                self._check_end(self._model(_Footer, value))
                self._is_over = True
            else:
                self._sum.update(line)
                commits.append(self._commit(value))
                self._commits += 1
                size += len(line)
        return commits

    def _check_end(self, footer: _Footer) -> None:
        if (footer.commits, footer.sha256) != (self._commits, self._sum.hexdigest()):
            self._refuse("its content is not what its checksum says")
        if next(self._lines, None) is not None:
            self._refuse("something stands behind its end")

    def _read_header(self) -> ExportHeader:
        line = next(self._lines, b"")
        value = self._parse(line)
        if value.get("format") != FORMAT:
            self._refuse("it is no export of the state", "name a file that `council state export` wrote")
        if value.get("version") != VERSION:
            what = f"it has version {value.get('version')} of its format, this council reads version {VERSION}"
            self._refuse(what, "use the version of council that wrote it, or a newer one")
        self._sum.update(line)
        header = self._model(ExportHeader, value)
        if header.first > header.position:
            self._refuse(f"its first position, {header.first}, is behind its newest, {header.position}")
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
            self._refuse("it is cut off")

    def _unpacked(self) -> Iterator[bytes]:
        while packed := self._stream.read(_READ_BYTES):
            self.bytes += len(packed)
            if self._unpacker.eof:
                self._refuse("something stands behind its end")
            try:
                data = self._unpacker.decompress(packed)
            except self._error as error:
                self._refuse(f"it is damaged, or no export of the state ({error})")
            if data:
                yield data
            if self._unpacker.unused_data:
                self._refuse("something stands behind its end")
        if not self._unpacker.eof:
            self._refuse("it is cut off" if self.bytes else "it is empty")

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            self._refuse("one of its lines is no JSON object")
        return value

    def _model(self, model: type[Model], value: dict[str, Any]) -> Model:
        try:
            return model.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            self._refuse(f"behind commit {self._commits}, {place}: {first['msg']}")

    def _commit(self, value: dict[str, Any]) -> DumpedCommit:
        found = self._model(_Commit, value)
        documents = list[DumpedDocument]()
        try:
            for one in found.documents:
                key = Key(one.kind, one.id)
                if one.previous >= found.position:
                    self._refuse(f"commit {found.position} says that {key} was written before by {one.previous}")
                encoded = None if one.value is None else encode_object(key, one.value)
                documents.append(DumpedDocument(key, one.version, encoded, one.expires, one.previous))
        except InvalidDocument as error:
            self._refuse(str(error))
        events = tuple(Event(one.type, one.data) for one in found.events)
        return DumpedCommit(found.position, found.time, found.by, tuple(documents), events)

    def _refuse(self, what: str, remedy: str = REMEDY) -> NoReturn:
        raise RefusedError(f"{self._name}: {what}", remedy)


@asynccontextmanager
async def open_export(name: str, opens: Callable[[], IO[bytes]]) -> AsyncIterator[tuple[ExportReader, Dump]]:
    """Open such a file as a dump; what is wrong with it is raised before the last commits are given."""
    with ExitStack() as files:
        stream = files.enter_context(await to_thread.run_sync(opens))
        reader = await to_thread.run_sync(ExportReader, name, stream)
        yield reader, Dump(reader.header.position, reader.header.first, _commits(reader))


async def _commits(reader: ExportReader) -> AsyncGenerator[DumpedCommit]:
    while commits := await to_thread.run_sync(reader.commits):
        for commit in commits:
            yield commit
