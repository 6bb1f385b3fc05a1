"""Positions of tasks: file order, priority and bucket, which determine their starts."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import NamedTuple

from orchestrator.domain.scheduling.ready import ReadyBucket, ReadyQueue


class Placement(NamedTuple):
    """The properties that determine when a ready task starts."""

    order: float
    priority: int
    bucket: ReadyBucket


class Placements:
    """The placement of each task of a run."""

    def __init__(self, queue: ReadyQueue) -> None:
        self._queue = queue
        self._placements: dict[str, Placement] = {}

    def __getitem__(self, task: str) -> Placement:
        return self._placements[task]

    def add(self, task: str, order: float, priority: int, adapters: tuple[str, ...], owns: tuple[str, ...]) -> None:
        """Add a task."""
        self._placements[task] = Placement(order, priority, self._queue.bucket(adapters, owns))

    def positions(self, new: Container[str], file_order: Iterable[str]) -> dict[str, float]:
        """Return fractional positions of new tasks within the gaps of existing ones."""
        positions: dict[str, float] = {}
        group: list[str] = []
        before = -1.0
        for task in (*file_order, None):
            if task is not None and task in new:
                group.append(task)
                continue
            here = before + 1.0 if task is None else self._placements[task].order
            share = (here - before) / (len(group) + 1)
            positions |= {member: before + share * number for number, member in enumerate(group, 1)}
            group, before = [], here
        return positions

    def change(self, task: str, owns: tuple[str, ...], adapters: tuple[str, ...] | None, *, keeps_paths: bool) -> None:
        """Move a task to the bucket of its new adapters.

        A task that keeps its paths does not wait for them.
        """
        placement = self._placements[task]
        names = adapters or tuple(adapter.name for adapter in placement.bucket.adapter_group.adapters)
        if keeps_paths:
            self._queue.keep_paths(task, owns)
        bucket = self._queue.bucket(names, () if keeps_paths else owns)
        if bucket is not placement.bucket:
            self._placements[task] = placement._replace(bucket=bucket)
