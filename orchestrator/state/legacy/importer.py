"""Import state in earlier formats once: convert their sessions to runs.

The files stay unchanged. `import/worktrees` records the import, with digests and counts. If it is incomplete, for
example because the process was killed, the next import writes the missing documents. A run becomes visible with its
last document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import anyio.to_thread
import orjson

from orchestrator.domain.events.runs import RunImported
from orchestrator.domain.events.state import LegacyFileSkipped, LegacyImported
from orchestrator.domain.runs.legacy import ConvertedSession, convert_session
from orchestrator.errors import CouncilError
from orchestrator.project import LEGACY_FILE, LEGACY_RECORD, LEGACY_TREE, Project, is_import_complete
from orchestrator.protocols import Commit, Event, Key, Store, Write
from orchestrator.state.documents.update import retry_on_conflict
from orchestrator.state.legacy.files import LegacyFiles, LegacyProblem, LegacySource, read_legacy_files
from orchestrator.system.failpoints import failpoint

#: The kind of the documents with the originals of imported runs and tasks.
IMPORTED_KIND: Final = "imported"

_WRITES: Final = 1000  # of one commit
_BYTES: Final = 8 << 20  # of one commit, approximately
#: The maximum number of recorded problems, and of reported problems.
_MOST_RECORDED: Final = 1000
_MOST_REPORTED: Final = 20


@dataclass(frozen=True, slots=True)
class ImportResult:
    """The outcome of an import, with its problems."""

    sources: Sequence[LegacySource]
    runs: Sequence[str]
    tasks: int
    problems: Sequence[LegacyProblem]

    def notices(self) -> Iterator[str]:
        """Yield the messages for the user."""
        if self.sources:
            names = " and ".join(one.path for one in self.sources)
            runs = f"{len(self.runs)} {'run' if len(self.runs) == 1 else 'runs'}"
            tasks = f"{self.tasks} {'task' if self.tasks == 1 else 'tasks'}"
            yield f"Imported {runs} with {tasks} from {names}, which are unchanged: `council runs` lists the runs."
        for one in self.problems[:_MOST_REPORTED]:
            kept = "the file is unchanged" if one.copy is None else f"a copy is in {one.copy}"
            yield f"Not imported completely: {one.path}: {one.reason}; {kept}."
        if len(self.problems) > _MOST_REPORTED:
            more = len(self.problems) - _MOST_REPORTED
            yield f"{more} more files were not imported completely: see `council state log`."


async def import_legacy_state(store: Store, project: Project, now: float) -> list[str]:
    """Import state in earlier formats, and return messages.

    `now` is in wall-clock seconds. Raises nothing: an error is returned as a message, and the next command tries again.
    """
    try:
        found = await anyio.to_thread.run_sync(read_legacy_files, project)
        runs = await anyio.to_thread.run_sync(_convert, found, project, now)
        done = await retry_on_conflict(partial(_commit, store, runs, found))
    except Exception as error:  # noqa: BLE001  (unknown files must never fail a command)
        with suppress(CouncilError):
            await _record_pending_import(store)
        why = str(error) if isinstance(error, CouncilError | OSError) else f"{type(error).__name__}: {error}"
        return [f"Nothing was imported from {LEGACY_FILE} and {LEGACY_TREE}: {why}. The next command will try again."]
    return [] if done is None else list(done.notices())


async def _record_pending_import(store: Store) -> None:
    """Record that an import is due, because other commits may be made before it."""
    if await store.get(LEGACY_RECORD) is None:
        await store.commit(Commit([Write(LEGACY_RECORD, 0, {"is_complete": False})]))


def _convert(found: LegacyFiles, project: Project, now: float) -> list[ConvertedSession]:
    place = {"top": str(project.top), "hub": str(project.legacy)}
    return [
        convert_session(one, **place, written=found.written.get(one.source, now), now=now) for one in found.sessions
    ]


async def _commit(store: Store, runs: Sequence[ConvertedSession], found: LegacyFiles) -> ImportResult | None:
    """Write the missing documents; return None if the import is already complete."""
    record = await store.get(LEGACY_RECORD)
    if record is not None and is_import_complete(record):
        return None
    version = record.version if record is not None else 0
    problems = found.problems[:_MOST_RECORDED]
    done = ImportResult(found.sources, [one.run.id for one in runs], sum(len(one.tasks) for one in runs), problems)
    parts = list(_parts(runs)) or [[]]
    for number, part in enumerate(parts, 1):
        is_complete = number == len(parts)
        writes = [write for one in part if (write := await _needed(store, *one)) is not None]
        events = [
            _imported(value) for key, value in part if key.kind == "run" and any(key == one.key for one in writes)
        ]
        if is_complete:
            events += [_damaged(one) for one in done.problems]
            sources = [one.path for one in done.sources]
            events.append(Event.of(LegacyImported(sources=sources, runs=done.runs, tasks=done.tasks)))
        if is_complete or version == 0:
            writes.append(Write(LEGACY_RECORD, version, {"is_complete": is_complete, **asdict(done)}))
            version += 1
        await store.commit(Commit(writes, events))
        failpoint("legacy.imported" if is_complete else "legacy.begun")
    return done


def _imported(run: dict[str, Any]) -> Event:
    return Event.of(RunImported(run=run["id"], tasks=len(run["tasks"]), source=run["imported"]["source"]))


def _damaged(one: LegacyProblem) -> Event:
    return Event.of(LegacyFileSkipped(path=one.path, reason=one.reason, copy=one.copy))


async def _needed(store: Store, key: Key, value: dict[str, Any]) -> Write | None:
    found = await store.get(key)
    if found is not None and not found.damaged and found.value == value:
        return None
    return Write(key, found.version if found else 0, value)


def _parts(runs: Iterable[ConvertedSession]) -> Iterator[list[tuple[Key, dict[str, Any]]]]:
    """Yield all documents in commit-sized parts, each run after its other documents."""
    part: list[tuple[Key, dict[str, Any]]] = []
    size = 0
    for one in runs:
        for key, value in _documents(one):
            part.append((key, value))
            size += len(orjson.dumps(value))
            if len(part) >= _WRITES or size >= _BYTES:
                yield part
                part, size = [], 0
    if part:
        yield part


def _documents(one: ConvertedSession) -> Iterator[tuple[Key, dict[str, Any]]]:
    run = one.run.id
    for task, document in one.tasks.items():
        yield Key("task", f"{run}/{task}"), document.model_dump(mode="json")
        yield Key(IMPORTED_KIND, f"{run}/{task}"), dict(one.originals[task])
    yield Key(IMPORTED_KIND, run), dict(one.original)
    yield Key("run", run), one.run.model_dump(mode="json")
