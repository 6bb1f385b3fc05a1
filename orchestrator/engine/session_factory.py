"""What the sessions of a run are answered with, put together from the places and tools of the run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.engine.run_context import Workshop
from orchestrator.engine.session_api.contexts import Contexts
from orchestrator.engine.session_api.details import find_workplace
from orchestrator.engine.session_api.notes import Memory
from orchestrator.engine.session_api.service import SessionDesk
from orchestrator.engine.state.ledger import Ledger
from orchestrator.locking.files import FileLocks
from orchestrator.project import Project
from orchestrator.protocols import Guard, Store
from orchestrator.system.clock import Clock


def with_desk(
    shop: Workshop, ledger: Ledger, store: Store, clock: Clock, project: Project, lock_timeout: float
) -> Workshop:
    """Return a run's places and tools with a desk at which its sessions are answered.

    They wait `lock_timeout` seconds for a lock where they don't say how long.
    """
    scope, redactor, me = shop.registry.scope, shop.tools.redactor, ledger.orchestrators.me.id
    claims = ledger.claims

    def claim(session: SessionName) -> Guard | None:
        return None if claims is None else claims.guard(session.task)

    desk = SessionDesk(
        store=store,
        clock=clock,
        git=shop.git,
        contexts=Contexts(store, clock, scope, redactor, orchestrator=me, claim=claim),
        memory=Memory(store, clock, scope, redactor),
        files=FileLocks(project.file_locks, clock),
        registry=shop.registry,
        redactor=redactor,
        orchestrator=me,
        claim=claim,
        elsewhere=partial(find_workplace, store, shop.adapters, project.all_logs, redactor),
        lock_timeout=lock_timeout,
    )
    return replace(shop, desk=desk, tools=replace(shop.tools, desk=desk))
