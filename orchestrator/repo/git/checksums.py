"""Compute checksums of files in a commit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import anyio.to_thread

from orchestrator.repo.git.blobs import batch_by_size, cat_blobs, parse_blobs
from orchestrator.repo.git.command import Git

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
