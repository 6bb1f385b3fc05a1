"""The topic `notes`: the notes that sessions leave for later sessions."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.api.topic import Topic
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.domain.sessions.notes import Note
from orchestrator.engine.session_api.notes import NoteStore
from orchestrator.engine.state.records import read_run
from orchestrator.locking.ownership import ownership_scope


class Notes(Topic):
    """The notes of sessions. Available as `council.notes`.

    `run` is a name that `council.runs.find` accepts; all runs with the same target share their notes.
    """

    async def list(
        self,
        run: str | None = None,
        *,
        task: str | None = None,
        topic: str | None = None,
        paths: Sequence[str] = (),
    ) -> Sequence[Note]:
        """Return notes, oldest first, filtered by task, topic and overlapping paths."""
        return await (await self._store(run)).find(task=task, topic=topic, paths=paths)

    async def drop(self, note: str, run: str | None = None) -> None:
        """Delete a note by its id. Raises RefusedError if there is none."""
        await (await self._store(run)).drop(note)

    async def _store(self, run: str | None) -> NoteStore:
        context = self._context
        document = await read_run(context.store, await self._find(run))
        redactor = Redactor(secret_values(context.environ))
        return NoteStore(context.store, context.clock, ownership_scope(document.repo, document.target), redactor)
