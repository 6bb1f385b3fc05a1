"""The running attempts of this process, and their results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import anyio

from orchestrator.domain.runs.model import AdapterDocument
from orchestrator.domain.runs.outcome import Failed, Paused
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.engine.phases.start import NextPhase
from orchestrator.engine.scheduler.budgets import BudgetReached
from orchestrator.protocols import JsonObject
from orchestrator.sessions.session import Session


class AttemptEnd(NamedTuple):
    """The effects of an ended attempt on later ones, apart from the task's status."""

    retry_in: float = 0.0
    """Seconds until the task may start again, if it is pending."""
    adapter: AdapterDocument | None = None
    """The state of its adapter, if it changed during the attempt."""
    shortage: str | None = None
    """The exhausted resource of the machine, if any: no session should start for a while."""
    unrunnable: str | None = None
    """The reason that all attempts would fail, if a check or setup command can't run here."""


@dataclass(slots=True)
class ActiveAttempt:
    """A running attempt; `cancelled` is set when a user cancels the task."""

    task: str
    spec: TaskSpec
    adapter: str
    session: Session
    next_phase: NextPhase
    messages: tuple[str, ...] = ()
    """The ids of the user's messages in its prompt."""
    is_probe: bool = False
    """Whether its session probes its adapter after a cooldown."""
    began: float = field(default=0.0, init=False)
    """The start of its attempt in monotonic seconds."""
    checks: anyio.CancelScope = field(default_factory=anyio.CancelScope, init=False)
    """Stops the `until` checks of its phase."""
    handed_over: JsonObject | None = field(default=None, init=False)
    """The handoff that its session submitted while it ran."""
    cancelled: bool = field(default=False, init=False)
    is_budget_exhausted: bool = field(default=False, init=False)
    """Whether the budget of the task is exhausted, which rules out another attempt."""

    @property
    def name(self) -> SessionName:
        """Return the name of its session."""
        return self.session.name

    def stop_for_budget(self, reached: BudgetReached) -> None:
        """Stop the session because a budget is exhausted."""
        self.is_budget_exhausted = reached.scope == "task"
        self.session.stop(reached.outcome if isinstance(reached.outcome, Failed) else None)

    def stop(self) -> None:
        """Stop the session, and the checks that follow it."""
        self.session.stop()
        self.checks.cancel()

    def pause(self) -> None:
        """Stop the session, so that a user can attach to its conversation."""
        self.session.stop(Paused("a user attaches to its conversation"))

    def cancel(self) -> None:
        """Stop the attempt without another one."""
        self.cancelled = True
        self.stop()
