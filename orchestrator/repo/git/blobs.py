"""Read blobs with `git cat-file --batch`, in batches of limited size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

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
