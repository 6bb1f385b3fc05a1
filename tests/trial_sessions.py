"""Sessions whose files are followed and merged as by the conflict prediction."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.domain.sessions.predicted_conflicts import ChangedPaths
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.intake.live_files import LiveFiles
from orchestrator.repo.landing.trial_merges import TrialMerges
from tests.hub_fixture import HubFixture

Edit = Callable[[Path], None]


@dataclass
class TrialSession:
    """A session's checkout, and the commit of its changes so far."""

    tree: Path
    files: LiveFiles
    commit: str

    @property
    def changed(self) -> ChangedPaths:
        """Return its changed paths."""
        return ChangedPaths(frozenset(self.files.present), frozenset(self.files.removed))


@dataclass
class TrialSessions:
    """Two sessions on the same commit."""

    trials: TrialMerges
    one: TrialSession
    other: TrialSession

    async def predict(self) -> tuple[str, ...] | None:
        """Return the conflicting paths of the current files; None if they merge cleanly."""
        for session in (self.one, self.other):
            if changes := await session.files.read_changes():
                [session.commit] = await self.trials.commit([(session.commit, changes)])
        [found] = await self.trials.merge([(self.one.commit, self.other.commit)])
        assert found is None or self.one.changed.may_conflict(self.other.changed), "this pair would not be merged"
        return found


@asynccontextmanager
async def open_trial_sessions(fixture: HubFixture, *, is_watched: bool = True) -> AsyncIterator[TrialSessions]:
    """Provide two sessions on the newest commit of main for the body."""
    commit = await fixture.fetch()
    async with fixture.open(warm=2) as pool, TrialMerges.open(fixture.git, fixture.hub, "run1") as trials:
        opened = []
        for name in ("one", "other"):
            worktree, held = await fixture.begin(pool, name, commit)
            rules, excludes = IntakeRules.of(fixture.git.environ), trials.folder / f"ignored-{name}"
            files = LiveFiles(trials.git, held, rules, excludes, is_watched=is_watched)
            opened.append((TrialSession(held.slot.tree, files, commit), worktree, held))
        (one, *_), (other, *_) = opened
        try:
            yield TrialSessions(trials, one, other)
        finally:
            for session, worktree, held in opened:
                session.files.close()
                await fixture.end(pool, worktree, held)
