"""Divide queued tasks into batches, which are checked and landed together."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable

from orchestrator.engine.state.ledger import Ledger

#: The maximum number of tasks without checks in one push.
MAX_BATCH_SIZE = 16


class Batches:
    """The batches of one run's merge queue: consecutive tasks with equal checks."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._suspects: set[str] = set()
        """Tasks whose merge failed its checks in a batch; each is checked alone."""

    def record_checked(self, tasks: Iterable[str], culprit: str | None) -> None:
        """Record that tasks were checked, and the one that failed together with others, if any."""
        self._suspects.difference_update(tasks)
        self._suspects.update([] if culprit is None else [culprit])

    async def divide(self, tasks: Iterable[str]) -> AsyncGenerator[list[str], None]:
        """Yield the batches of tasks in landing order; reads only the tasks of requested batches, and the next one."""
        batch: list[str] = []
        common: tuple[object, ...] = ()
        for task in tasks:
            key = await self._key(task)
            if batch and (key != common or len(batch) >= self._max_size(common)):
                yield batch
                batch = []
            batch.append(task)
            common = key
        if batch:
            yield batch

    async def _key(self, task: str) -> tuple[object, ...]:
        """Return the properties that all tasks of a batch share, starting with their checks."""
        spec = await self._ledger.definitions.spec(task)
        return spec.checks, spec.checks_env, spec.checks_timeout, task if task in self._suspects else None

    def _max_size(self, key: tuple[object, ...]) -> int:
        if self._ledger.run.pull_requests is not None:  # each is merged by itself
            return 1
        return self._ledger.run.merge.batch if key[0] else MAX_BATCH_SIZE
