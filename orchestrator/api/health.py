"""A look at the health of a project's state: what is recorded, how it grows, and who is at work on it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio.to_thread

from orchestrator.api.runs import Runs
from orchestrator.domain.runs.model import RunDocument, TaskStatus
from orchestrator.engine.diagnostics import state_findings as findings
from orchestrator.engine.diagnostics.findings import Finding, Level
from orchestrator.engine.diagnostics.state_findings import Growth, Silent
from orchestrator.engine.state.records import read_run, read_spec, read_tasks, task_documents
from orchestrator.errors import HistoryGone, RefusedError, StoreUnavailable, UnreadableDocument
from orchestrator.protocols import Commit, Event, Record, Statistics, Store
from orchestrator.sessions.output.files import log_file
from orchestrator.state.documents.conflicts import pending
from orchestrator.state.documents.reading import between
from orchestrator.state.documents.shapes import verified

#: How many of the newest commits tell how fast the log grows.
_OF_LATE: Final = 1000


@dataclass(frozen=True, slots=True)
class Health:
    """Looks at the store of a project's runs."""

    runs: Runs

    async def examine(self) -> list[Finding]:
        """Return all that was found; one durable commit is made, to see how long that takes."""
        store = self.runs.store
        runs = [run for name in await self.runs.ids() if (run := await self._run(name)) is not None]
        open_runs = {run.id: await self.runs.seems_live(run.id) for run in runs if run.ended is None}
        sessions = [one for run, is_live in open_runs.items() if is_live for one in await self._readable_sessions(run)]
        statistics = await store.statistics()
        return [
            *findings.judge_integrity(await verified(store)),
            findings.judge_log(
                statistics, await _growth(store, statistics, self.runs.clock.now()), await self.runs.retention()
            ),
            *findings.judge_documents(statistics),
            findings.judge_expired(statistics),
            await self._latency(),
            findings.judge_cut_off([run for run, is_live in open_runs.items() if not is_live]),
            *findings.judge_silence(sessions),
            findings.judge_conflicts(len(await pending(store))),
        ]

    async def _run(self, run: str) -> RunDocument | None:
        with suppress(RefusedError):  # what can't be read is a finding of its own
            return await read_run(self.runs.store, run)
        return None

    async def _latency(self) -> Finding:
        store, clock = self.runs.store, self.runs.clock
        began = clock.monotonic()
        try:
            await store.commit(Commit([], [Event("state.probed")]))
        except StoreUnavailable as error:
            return Finding("latency", Level.PROBLEM, error.what, error.remedy)
        return findings.judge_latency(clock.monotonic() - began)

    async def _readable_sessions(self, run: str) -> list[Silent]:
        with suppress(UnreadableDocument):
            return await self._sessions(run)
        return []

    async def _sessions(self, run: str) -> list[Silent]:
        """Return the sessions of a run at work."""
        document = await read_run(self.runs.store, run)
        tasks = task_documents(await read_tasks(self.runs.store, run), document.tasks)
        found = []
        for task, one in tasks.items():
            if one.status is TaskStatus.RUNNING:
                logs = self.runs.project.logs(run)
                files = [log_file(logs, task, one.attempt.number, stream) for stream in ("stdout", "stderr")]
                heard = max(await anyio.to_thread.run_sync(_changed, files), one.attempt.started)
                limit = (await read_spec(self.runs.store, run, task)).silence
                found.append(Silent(run, task, max(self.runs.clock.now() - heard, 0.0), limit))
        return found


def _changed(files: Sequence[Path]) -> float:
    """Return when one of some files was last written, 0 where none is there. Blocks."""
    times = [0.0]
    for file in files:
        with suppress(FileNotFoundError):
            times.append(file.stat().st_mtime)
    return max(times)


async def _growth(store: Store, found: Statistics, now: float) -> Growth:
    """Return how the log has grown by its newest commits, and how far back it goes."""
    begin = max(found.position - _OF_LATE, found.first)
    oldest, early = await _first_behind(store, found.first), await _first_behind(store, begin)
    seconds = 0.0 if early is None else max(now - early.time, 0.0)
    return Growth(found.position - begin, seconds, 0.0 if oldest is None else max(now - oldest.time, 0.0))


async def _first_behind(store: Store, position: int) -> Record | None:
    """Return the first commit behind a position, None where there is none or it is gone by now."""
    with suppress(HistoryGone):
        async with aclosing(between(store, position, position + 1)) as records:
            return await anext(records, None)
    return None
