"""Two sessions whose files are followed and merged by the conflict prediction."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.landing.live_conflicts import LiveConflicts
from orchestrator.repo.landing.trial_merges import TrialMerges
from tests.hub_fixture import HubFixture

Edit = Callable[[Path], None]
PAIR = (SessionName("run1", "one", 1), SessionName("run1", "other", 1))


@dataclass
class TrialSessions:
    """The conflicts of two sessions, and their checkouts."""

    trials: TrialMerges
    live: LiveConflicts
    one: Path
    other: Path

    async def predict(self) -> tuple[str, ...] | None:
        """Return the conflicting paths of the current files, sorted; None if they merge cleanly."""
        await self.live.look()
        paths = self.live.conflicts.get(PAIR)
        return None if paths is None else tuple(sorted(paths))


@asynccontextmanager
async def open_trial_sessions(fixture: HubFixture, *, is_watched: bool = True) -> AsyncIterator[TrialSessions]:
    """Provide two sessions on the newest commit of main for the body."""
    commit = await fixture.fetch()
    async with fixture.open(warm=2) as pool, TrialMerges.open(fixture.git, fixture.hub, "run1") as trials:
        live = LiveConflicts(fixture.git, trials, {}, watch_share=0.75 if is_watched else 0)
        rules = IntakeRules.of(fixture.git.environ)
        opened = [await fixture.begin(pool, name.task, commit) for name in PAIR]
        try:
            for name, (_, held) in zip(PAIR, opened, strict=True):
                await live.follow(name, held, rules, commit)
            one, other = (held.slot.tree for _, held in opened)
            yield TrialSessions(trials, live, one, other)
        finally:
            live.close()
            for worktree, held in opened:
                await fixture.end(pool, worktree, held)
