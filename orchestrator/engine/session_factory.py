"""What the sessions of a run are answered with, put together from the places and tools of the run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.session_api.contexts import SessionContexts
from orchestrator.engine.session_api.details import find_workspace
from orchestrator.engine.session_api.notes import NoteStore
from orchestrator.engine.session_api.service import SessionService
from orchestrator.engine.state.ledger import Ledger
from orchestrator.locking.file_locks import FileLocks
from orchestrator.project import Project
from orchestrator.protocols import Guard, Store
from orchestrator.system.clock import Clock


def with_session_service(
    shop: RunContext, ledger: Ledger, store: Store, clock: Clock, project: Project, lock_timeout: float
) -> RunContext:
    """Return a run's places and tools with a desk at which its sessions are answered.

    They wait `lock_timeout` seconds for a lock where they don't say how long.
    """
    scope, redactor, me = shop.registry.scope, shop.tools.redactor, ledger.orchestrators.me.id
    claims = ledger.claims

    def claim(session: SessionName) -> Guard | None:
        return None if claims is None else claims.guard(session.task)

    desk = SessionService(
        store=store,
        clock=clock,
        git=shop.git,
        contexts=SessionContexts(store, clock, scope, redactor, orchestrator=me, claim=claim),
        memory=NoteStore(store, clock, scope, redactor),
        files=FileLocks(project.file_locks, clock),
        registry=shop.registry,
        redactor=redactor,
        orchestrator=me,
        claim=claim,
        elsewhere=partial(find_workspace, store, shop.adapters, project.logs_folder, redactor),
        lock_timeout=lock_timeout,
    )
    return replace(shop, session_service=desk, tools=replace(shop.tools, session_service=desk))
