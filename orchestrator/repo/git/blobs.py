"""Read blobs with `git cat-file --batch`, in batches of limited size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import anyio.to_thread

from orchestrator.repo.git.command import Git


def batch_by_size(sizes: Iterable[tuple[str, int]], limit: int) -> Iterator[list[str]]:
    """Yield object ids in batches of at most `limit` bytes, or a single larger object."""
    batch: list[str] = []
    total = 0
    for blob, size in sizes:
        if batch and total + size > limit:
            yield batch
            batch, total = [], 0
        batch.append(blob)
        total += size
    if batch:
        yield batch


async def cat_blobs(git: Git, ids: Iterable[str], env: Mapping[str, str] | None = None) -> bytes:
    """Return the output of `git cat-file --batch`, to pass to `parse_blobs`."""
    return (await git("cat-file", "--batch", env=env, input_="".join(f"{blob}\n" for blob in ids).encode())).stdout


def parse_blobs(output: bytes) -> Iterator[tuple[str, memoryview]]:
    """Yield the id and content of each object; a line with its size precedes each."""
    view, at = memoryview(output), 0
    while at < len(output):
        end = output.index(b"\n", at)
        blob, _kind, size = output[at:end].decode().split()
        yield blob, view[end + 1 : end + 1 + int(size)]
        at = end + 1 + int(size) + 1


#: Bytes of file content to read at a time.
_BATCH_BYTES = 64 << 20


async def compute_checksums(git: Git, commit: str, paths: Sequence[str]) -> dict[str, str | None]:
    """Return the SHA-256 (hex) of files in a commit, by path; None if missing."""
    blobs = await _blobs(git, commit, paths)
    sums: dict[str, str] = {}
    for batch in batch_by_size(dict.fromkeys(blobs.values()), _BATCH_BYTES):
        sums |= await anyio.to_thread.run_sync(_hash_blobs, await cat_blobs(git, batch))
    return {path: sums[blobs[path][0]] if path in blobs else None for path in paths}


async def _blobs(git: Git, commit: str, paths: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Return the object id and size of each existing file."""
    wanted = {path.encode(errors="surrogateescape"): path for path in paths}
    listed = (await git("ls-tree", "-r", "-z", "-l", "--full-tree", commit)).stdout
    blobs = {}
    for entry in listed.split(b"\0"):
        fields, _, name = entry.partition(b"\t")
        if name in wanted:
            _mode, kind, blob, size = fields.split()
            if kind == b"blob":
                blobs[wanted[name]] = (blob.decode(), int(size))
    return blobs


def _hash_blobs(output: bytes) -> dict[str, str]:
    return {blob: hashlib.sha256(content).hexdigest() for blob, content in parse_blobs(output)}
