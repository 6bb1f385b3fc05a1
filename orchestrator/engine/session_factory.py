"""Create the session API of a run."""

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
    context: RunContext, ledger: Ledger, store: Store, clock: Clock, project: Project, lock_timeout: float
) -> RunContext:
    """Return a run context that serves the session API.

    `lock_timeout` is the default in seconds for which a session waits for a lock.
    """
    scope, redactor, me = context.registry.scope, context.tools.redactor, ledger.orchestrators.me.id
    claims = ledger.claims

    def claim(session: SessionName) -> Guard | None:
        return None if claims is None else claims.guard(session.task)

    service = SessionService(
        store=store,
        clock=clock,
        git=context.git,
        contexts=SessionContexts(store, clock, scope, redactor, orchestrator=me, claim=claim),
        memory=NoteStore(store, clock, scope, redactor),
        files=FileLocks(project.file_locks, clock),
        registry=context.registry,
        redactor=redactor,
        orchestrator=me,
        claim=claim,
        elsewhere=partial(find_workspace, store, context.adapters, project.logs_folder, redactor),
        lock_timeout=lock_timeout,
    )
    return replace(context, session_service=service, tools=replace(context.tools, session_service=service))
