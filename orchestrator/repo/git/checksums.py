"""Compute checksums of files in a commit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import anyio.to_thread

from orchestrator.repo.git.command import Git

#: Bytes of file content to read at a time.
_BATCH_BYTES = 64 << 20


async def compute_checksums(git: Git, commit: str, paths: Sequence[str]) -> dict[str, str | None]:
    """Return the SHA-256 (hex) of a commit's files by path; None for missing files."""
    blobs = await _blobs(git, commit, paths)
    sums: dict[str, str] = {}
    batch, size = list[str](), 0
    for blob, length in dict.fromkeys(blobs.values()):
        if batch and size + length > _BATCH_BYTES:
            sums |= await _read(git, batch)
            batch, size = [], 0
        batch.append(blob)
        size += length
    if batch:
        sums |= await _read(git, batch)
    return {path: sums[blobs[path][0]] if path in blobs else None for path in paths}


async def _blobs(git: Git, commit: str, paths: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Return the object id and size of each existing file."""
    wanted = {path.encode(errors="surrogateescape"): path for path in paths}
    listed = (await git("ls-tree", "-r", "-z", "-l", "--full-tree", commit)).stdout
    blobs = {}
    for entry in listed.split(b"\0"):
        facts, _, name = entry.partition(b"\t")
        if name in wanted:
            _mode, kind, blob, size = facts.split()
            if kind == b"blob":
                blobs[wanted[name]] = (blob.decode(), int(size))
    return blobs


async def _read(git: Git, blobs: Sequence[str]) -> dict[str, str]:
    out = (await git("cat-file", "--batch", input_="".join(f"{blob}\n" for blob in blobs).encode())).stdout
    return await anyio.to_thread.run_sync(_hash_blobs, out)


def _hash_blobs(out: bytes) -> dict[str, str]:
    sums, at = {}, 0
    while at < len(out):
        end = out.index(b"\n", at)
        blob, _kind, size = out[at:end].decode().split()
        sums[blob] = hashlib.sha256(memoryview(out)[end + 1 : end + 1 + int(size)]).hexdigest()
        at = end + 1 + int(size) + 1
    return sums
