"""Copy whole stores to stores and files, and verify each copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import IO

from orchestrator.errors import InvalidDocument, RefusedError, StoreUnavailable
from orchestrator.protocols import Dump, Key, Store
from orchestrator.state.documents.validation import find_unreadable
from orchestrator.state.log.loading import not_empty_error
from orchestrator.state.transfer.export_file import REMEDY, CommitDigest, open_export, write_export


@dataclass(frozen=True, slots=True)
class CopyResult:
    """The outcome of a copy; `position` and `first` are those of the `Dump`."""

    position: int
    first: int
    commits: int
    documents: int
    """The number of documents in the copied store."""
    bytes: int
    """The size in bytes of all commits as JSON lines."""
    already_present: bool = False
    """Whether the target already had the same content, so that nothing was copied."""
    file_bytes: int | None = None
    """The size of the file in bytes, or None if there is no file."""
    unreadable: Mapping[Key, str] = field(default_factory=dict)
    """Unreadable council documents, copied unchanged, with the reason. `verify --repair` fixes them."""

    @property
    def compression_ratio(self) -> float | None:
        """The compression ratio of the file."""
        return self.bytes / self.file_bytes if self.file_bytes else None


async def copy_store(source: Store, target: Store) -> CopyResult:
    """Copy a whole store into an empty one, and compare them.

    If the target already has the same content, for example after a copy was interrupted at its very end, nothing is
    copied. Raises the errors of `Store.dump` and `Store.load`, and StoreUnavailable if the stores differ.
    """
    async with source.dump() as dump:
        digest, already_present = await _load(target, dump)
    return await _compare(target, dump, digest, already_present=already_present)


async def export_to_stream(store: Store, stream: IO[bytes], time: float) -> CopyResult:
    """Write a whole store to a stream in `export_file` format.

    `time` is the current wall-clock time.
    """
    async with store.dump() as dump:
        digest, file_bytes = await write_export(stream, dump, time)
    return replace(await _result(store, dump, digest), file_bytes=file_bytes)


async def import_from_stream(name: str, opens: Callable[[], IO[bytes]], target: Store) -> CopyResult:
    """Load an export into an empty store, and compare them.

    `name` is the file name for errors. Raises RefusedError and leaves the target empty if any byte of the file was
    changed. Otherwise like `copy_store`.
    """
    async with open_export(name, opens) as (reader, dump):
        try:
            digest, already_present = await _load(target, dump)
        except InvalidDocument as error:
            raise RefusedError(f"{name}: {error}", REMEDY) from None
    return replace(await _compare(target, dump, digest, already_present=already_present), file_bytes=reader.bytes)


async def _load(target: Store, dump: Dump) -> tuple[CommitDigest, bool]:
    """Load a dump, or only read it if the target may already have it.

    Returns its digest, and True if the target already had it.
    """
    digest, position = CommitDigest(), await target.position()
    if position not in {0, dump.position}:
        raise not_empty_error("the target", position)
    commits = digest.through(dump.commits)
    if position:
        async for _ in commits:
            pass
    else:
        await target.load(replace(dump, commits=commits))
    return digest, position > 0


async def _compare(target: Store, dump: Dump, digest: CommitDigest, *, already_present: bool) -> CopyResult:
    """Reread the target, and return the result if it has exactly the copied content."""
    copied = CommitDigest()
    async with target.dump() as found, aclosing(found.commits) as commits:
        async for commit in commits:
            if commit.position > dump.position:
                break
            copied.add(commit)
    if found.first == dump.first and copied.result() == digest.result():
        return replace(await _result(target, dump, digest), already_present=already_present)
    if already_present:
        raise not_empty_error("the target", dump.position)
    raise StoreUnavailable("the target", "its content differs from the original", "remove it, and copy again")


async def _result(store: Store, dump: Dump, digest: CommitDigest) -> CopyResult:
    documents, unreadable = (await store.statistics()).documents, dict(await find_unreadable(store))
    return CopyResult(dump.position, dump.first, digest.commits, documents, digest.bytes, unreadable=unreadable)
