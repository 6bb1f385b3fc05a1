"""The base class of the topics of a council."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.api.context import ProjectContext
from orchestrator.api.run_index import RunIndex
from orchestrator.api.run_reader import RunReader


@dataclass(frozen=True, slots=True)
class Topic:
    """The operations of a council on one subject."""

    _context: ProjectContext

    @property
    def _index(self) -> RunIndex:
        return RunIndex(self._context)

    @property
    def _reader(self) -> RunReader:
        return RunReader(self._context)

    async def _find(self, run: str | None) -> str:
        """Return the id of a run by its name, as `council.runs.find` does."""
        return await self._index.find(run)
