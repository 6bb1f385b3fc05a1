"""Restore a checkpoint.

The current state is saved as another checkpoint first; then one commit applies all changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import anyio.to_thread

from orchestrator.domain.documents.stored import CheckpointOrigin
from orchestrator.domain.events.state import CheckpointRestored
from orchestrator.domain.runs.model import RunDocument, TaskDocument
from orchestrator.domain.runs.statuses import FINAL_STATUSES, TaskStatus
from orchestrator.engine.state.records import read_tasks, task_documents
from orchestrator.errors import GitError, to_unusable_error
from orchestrator.protocols import Commit, Event, Guard, Key, Store, Write
from orchestrator.repo.git.command import Git
from orchestrator.repo.worktrees.hub import Hub, find_hub, work_branch_name
from orchestrator.state.documents.checkpoints import Checkpoint, RestorePlan, create_checkpoint
from orchestrator.system.failpoints import failpoint

_QUEUED_STATUSES = frozenset({TaskStatus.QUEUED, TaskStatus.CHECKING})


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """The result of a restore; documents are listed by name."""

    checkpoint: str
    before: str | None
    """The checkpoint of the previous state; None if nothing changed or nothing existed."""
    runs: Sequence[str]
    """The runs that `council resume` can continue."""
    written: Sequence[str]
    deleted: Sequence[str]
    skipped: Mapping[str, str]
    """Documents that changed since the checkpoint and were not restored, with the reason."""


async def restore_checkpoint(
    store: Store, plan: RestorePlan, guards: Sequence[Guard], environ: Mapping[str, str]
) -> RestoreResult:
    """Apply a restore plan in one commit; the caller owns its runs under `guards`.

    Raises RefusedError, without any change, if work to be queued again is missing from council's repositories.
    """
    before = None
    if plan.writes:
        for run in plan.runs.values():
            await _restore_branches(run.id, find_hub(run, environ), plan.writes, environ)
        before = await _checkpoint_before(store, plan)
        await store.commit(Commit(plan.writes, _events(plan, before), guards))
        failpoint("checkpoint.restored")
    return RestoreResult(
        checkpoint=plan.checkpoint.id,
        before=before.id if before else None,
        runs=[name for name, run in plan.runs.items() if await _can_resume(store, run)],
        written=[str(key) for key in plan.written],
        deleted=[str(key) for key in plan.deleted],
        skipped={str(key): reason for key, reason in plan.skipped.items()},
    )


async def _can_resume(store: Store, run: RunDocument) -> bool:
    """Return True if a run has not ended, or has tasks that wait, for example after a retry."""
    tasks = task_documents(await read_tasks(store, run.id), run.tasks) if run.ended is not None else {}
    return run.ended is None or any(one.status not in FINAL_STATUSES for one in tasks.values())


async def _checkpoint_before(store: Store, plan: RestorePlan) -> Checkpoint | None:
    run = plan.checkpoint.run
    if run is not None and await store.get(Key("run", run)) is None:
        return None
    return await create_checkpoint(store, run, "before restore", created_by=CheckpointOrigin.COMMAND, is_live=False)


def _events(plan: RestorePlan, before: Checkpoint | None) -> list[Event]:
    tasks = Counter(write.key.id.partition("/")[0] for write in plan.writes if write.key.kind == "task")
    restored, known = plan.checkpoint.id, before.id if before else None
    events = [CheckpointRestored(run=run, checkpoint=restored, before=known, tasks=tasks[run]) for run in plan.runs]
    return list(map(Event.of, events))


async def _restore_branches(run: str, hub: Hub, writes: Sequence[Write], environ: Mapping[str, str]) -> None:
    """Restore the branches of tasks that are built and have not landed."""
    lines = []
    for write in writes:
        owner, _, task = write.key.id.partition("/")
        if write.key.kind == "task" and owner == run and write.value is not None:
            document = TaskDocument.model_validate(write.value)
            if document.status in _QUEUED_STATUSES and document.commit is not None:
                branch = work_branch_name(run, task, document.building_attempt.number)
                lines.append(f"update refs/heads/{branch} {document.commit}\n")
    if not lines or not await anyio.to_thread.run_sync(hub.trusted.is_dir):
        return
    try:
        await Git(hub.trusted, environ=environ)("update-ref", "--stdin", input_="".join(lines).encode())
    except GitError as error:
        remedy = "restore another checkpoint, or start a new run"
        raise to_unusable_error(error, f"the unmerged work of run {run} no longer exists", remedy) from None
