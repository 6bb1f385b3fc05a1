"""Recover from a killed orchestrator.

End its sessions, salvage their work, and requeue their tasks. Runs under the lock of the run. Every git command of the
killed owner holds that lock until it exits, so its git lock files do not belong to a live process.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import anyio.to_thread

from orchestrator.domain.events.tasks import (
    TaskFailed,
    TaskInterrupted,
    TaskLanded,
    TaskRequeued,
    TaskSalvaged,
    TaskStarted,
    TaskWorktreePreserved,
)
from orchestrator.domain.runs.leftovers import WorktreeContents, classify_worktree
from orchestrator.domain.runs.model import INTERRUPTED, PAUSED, Attempt
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.runs.statuses import CLAIMED_STATUSES, FINAL_STATUSES, TaskStatus, Trigger
from orchestrator.domain.scheduling.active_time import find_last_heartbeat
from orchestrator.domain.scheduling.claims import OwnerStatus
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.domain.workflow.routing import pause_task
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import (
    GitError,
    HubDamaged,
    LockHeld,
    PluginFailed,
    RefusedError,
    TargetMissing,
    plugin_code,
    to_unusable_error,
)
from orchestrator.protocols import JsonObject
from orchestrator.repo.intake.collect import CollectionResult
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.preserved import try_to_preserve
from orchestrator.repo.worktrees.slots import read_setup_files
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.collection import salvage_session
from orchestrator.sessions.output.log_files import last_activity, log_path
from orchestrator.sessions.output.transcript import EMPTY_TRANSCRIPT, Transcript, read_transcript
from orchestrator.sessions.socket.listener import remove_session_socket
from orchestrator.sessions.supervision.supervisor_client import stop_supervised
from orchestrator.system.failpoints import failpoint

#: The maximum time for a session to end after its orchestrator has exited, in seconds; far above the usual time.
REAP_TIMEOUT = 30.0

_ORCHESTRATOR_ENDED = "the orchestrator exited before the session ended"
_ROLLED_BACK = "restored a checkpoint from before the end of its session"
_LOST = "the record of the attempt was lost with part of the state log"
_UNCHECKED = "the orchestrator exited before the checks ended"


async def recover(ledger: Ledger, context: RunContext) -> None:
    """Requeue interrupted tasks, salvage their work, and adopt landed merges.

    Interrupted landings are not resolved here: their tasks stay `landing`, and the merge queue resolves them first.
    Safe to be killed at any point and repeated.
    """
    alone = not await has_active_peers(ledger)
    await worktrees.remove_stale_files(context.hub, ledger.run.id, is_alone=alone)
    await context.target.clean_up(ledger.run.started)
    context.target.must_exist |= ledger.tasks.has_moved_target(ledger.run.start)
    try:
        await context.target.refresh()
    except (TargetMissing, HubDamaged) as error:
        raise RefusedError(error.message, error.remedy) from None
    except GitError as error:
        raise to_unusable_error(error, "can't read the target", "retry when it is reachable") from None
    taken = await _take_over(ledger, context, counts=False)
    tasks = ledger.run.tasks if alone else taken
    await _recover_sessions(ledger, context, tasks, at_start=True)
    for task in ledger.tasks.damaged:
        if ledger.task(task).status not in FINAL_STATUSES:
            reason = "its record in the state log is damaged, and its work is unknown: repeat the task in a new run"
            await ledger.change(task, Trigger.FAIL_DAMAGED, TaskFailed(reason=reason), reason=reason)


async def take_over_tasks(ledger: Ledger, context: RunContext) -> list[str]:
    """Take over tasks of dead orchestrators, and return them.

    Works like `recover` at the start. Each takeover counts as a retry of the task. Safe to be killed at any point:
    claimed tasks are then taken over again.
    """
    taken = await _take_over(ledger, context, counts=True)
    if taken:
        await worktrees.remove_stale_files(context.hub, ledger.run.id, is_alone=False)
        with suppress(GitError):  # the target is fetched again when they land
            await context.target.refresh()
        await _recover_sessions(ledger, context, taken, at_start=False)
    return taken


async def _recover_sessions(ledger: Ledger, context: RunContext, tasks: Sequence[str], *, at_start: bool) -> None:
    """End the remaining sessions of tasks, salvage their work, and requeue each task.

    The caller has fetched the target. Except `at_start`, seemingly dead orchestrators may be suspended processes, and
    only sessions of claimed tasks may be ended.
    """
    for task in tasks:
        await _inherit_session(ledger, context, task)
    for worktree in worktrees.list_worktrees(context.hub, ledger.run.id, tasks):
        # Base checks may belong to another live process; `remove_abandoned` removes their leftovers.
        if not at_start and (worktree.checker or ledger.task(worktree.task).status not in CLAIMED_STATUSES):
            continue
        await _reap(ledger, context, worktree)
    for task in tasks:
        await _requeue_task(ledger, task, context.target.find_landing(ledger.task(task).intended_merges))


async def _inherit_session(ledger: Ledger, context: RunContext, task: str) -> None:
    """Inherit the path ownership of an interrupted task.

    A running session becomes inactive; built work owns its paths until it lands.
    """
    document = ledger.task(task)
    if document.status not in CLAIMED_STATUSES or not document.attempts or ledger.is_claimed_elsewhere(task):
        return
    session = SessionName(ledger.run.id, task, document.attempt.number)
    if document.status is TaskStatus.RUNNING:
        if context.session_service is not None:
            await context.session_service.leave(session)
    elif ledger.claims is not None and (claim := ledger.claims.guard(task)) is not None:
        await context.registry.inherit(session, orchestrator=ledger.orchestrators.me.id, claim=claim)


async def remove_abandoned(ledger: Ledger, context: RunContext) -> None:
    """Remove session folders of ended attempts that a dead process left behind, and files of killed git commands.

    A free slot lock proves that its process is dead: a process holds the lock until it has removed the session folder.
    """
    for worktree in await anyio.to_thread.run_sync(
        worktrees.list_worktrees, context.hub, ledger.run.id, ledger.run.tasks
    ):
        contents = classify_worktree(ledger.task(worktree.task), worktree.attempt, is_check=worktree.is_check)
        slot = await anyio.to_thread.run_sync(lambda each: each.slot, worktree)
        if contents is WorktreeContents.NOTHING and slot is not None:
            with suppress(LockHeld):
                async with slot.lock.hold(0):
                    await end_orphaned_session(worktree)
                    await worktrees.remove_session_folder(worktree)
    await worktrees.remove_stale_files(context.hub, ledger.run.id, is_alone=False)


async def _take_over(ledger: Ledger, context: RunContext, *, counts: bool) -> list[str]:
    """Claim unclaimed and abandoned tasks, and reload them; return them in file order."""
    if ledger.takeovers is None:
        return []
    claimed = set(await ledger.takeovers.sweep(counts=counts, also=context.registry.plan_transfer))
    if any(task not in ledger.tasks for task in claimed):
        await ledger.tasks.load_new()
    for task in claimed:
        await ledger.tasks.refresh(task)
        await ledger.release(task)
    # Restored or imported tasks were never claimed.
    claimed.update(
        [task for task in ledger.run.tasks if ledger.is_claimed_elsewhere(task) and await ledger.claim(task)]
    )
    return [task for task in ledger.run.tasks if task in claimed]


async def has_active_peers(ledger: Ledger) -> bool:
    """Return True if another orchestrator is active in the run."""
    orchestrators = ledger.orchestrators
    peers = [peer for peer in (await orchestrators.peers.all()).values() if peer.owner.id != orchestrators.me.id]
    return any([await orchestrators.peers.assess(peer) in {OwnerStatus.ALIVE, OwnerStatus.STALE} for peer in peers])


async def _requeue_task(ledger: Ledger, task: str, landed: str | None) -> None:
    """Return a task to a status from which it can continue.

    `landed` is its merge on the target, if any.
    """
    document = ledger.task(task)
    if document.status in FINAL_STATUSES or document.status is TaskStatus.LANDING or ledger.is_claimed_elsewhere(task):
        return
    if landed is not None:
        await ledger.change(task, Trigger.ADOPT, TaskLanded(landed=landed), landed=landed, reason=None)
    elif document.status is TaskStatus.RUNNING and document.attempt.ended is not None:
        branch = document.attempt.branch
        event = TaskInterrupted(reason=_ROLLED_BACK, branch=branch)
        await ledger.change(task, Trigger.INTERRUPT, event, reason=_ROLLED_BACK, branch=branch)
    elif document.status is TaskStatus.RUNNING:  # recorded, but never started
        await _record_interruption(ledger, task, None)
    elif document.status is TaskStatus.CHECKING:
        await ledger.change(task, Trigger.REQUEUE, TaskRequeued(reason=_UNCHECKED), reason=_UNCHECKED)


async def _reap(ledger: Ledger, context: RunContext, worktree: Worktree) -> None:
    await end_orphaned_session(worktree)
    failpoint("recovery.session_reaped")
    document = ledger.task(worktree.task)
    contents = classify_worktree(document, worktree.attempt, is_check=worktree.is_check)
    if contents is WorktreeContents.UNKNOWN and await _recreate_lost_record(ledger, context, worktree):
        return
    if contents is WorktreeContents.UNSAVED and await _salvage_attempt(ledger, context, worktree):
        contents = WorktreeContents.NOTHING
    if contents is WorktreeContents.NOTHING:
        await worktrees.remove_session_folder(worktree)  # the pool discards its slot at the next scan


async def _recreate_lost_record(ledger: Ledger, context: RunContext, worktree: Worktree) -> bool:
    """Recreate the lost record of the attempt that a worktree belongs to.

    The number counts as used. The worktree is preserved, because its secrets and its start commit are unknown; an
    unused worktree is removed. Return False if the task can't be retried from its status.
    """
    task, number = worktree.task, worktree.attempt
    if ledger.task(task).status is TaskStatus.RUNNING and ledger.task(task).attempt.ended is None:
        await _record_interruption(ledger, task, None)
    attempts = ledger.task(task).attempts
    if ledger.task(task).status is not TaskStatus.PENDING or task in ledger.tasks.damaged or number <= len(attempts):
        return False
    if not await anyio.to_thread.run_sync(worktrees.unlock_index, worktree):
        await worktrees.remove_session_folder(worktree)
        return True
    spec, base, now = await ledger.definitions.spec(task), await context.target.tip(), ledger.writer.clock.now()
    lost = [
        Attempt(
            number=index,
            adapter=spec.adapter,
            base=base,
            started=now,
            ended=now,
            outcome=INTERRUPTED,
            reason=_LOST,
            is_kept=index == number,
        )
        for index in range(len(attempts) + 1, number + 1)
    ]
    started, interrupted = TaskStarted(base=base, adapter=spec.adapter), TaskInterrupted(reason=_LOST, branch=None)
    await ledger.change(task, Trigger.START, started, attempts=(*attempts, *lost))
    await ledger.change(task, Trigger.INTERRUPT, interrupted, branch=None, reason=_LOST)
    reason = "; ".join((_LOST, *await try_to_preserve(context.git, worktree, base)))
    await ledger.note(TaskWorktreePreserved(task=task, worktree=str(worktree.tree), reason=reason))
    return True


async def end_orphaned_session(worktree: Worktree) -> None:
    """End the remaining processes of a session.

    Its orchestrator is dead or has lost the task. Raises LockHeld if a process can't be killed.
    """
    await stop_supervised(worktree.lock, worktree.marker, REAP_TIMEOUT)
    await anyio.to_thread.run_sync(remove_session_socket, worktree)


async def _salvage_attempt(ledger: Ledger, context: RunContext, worktree: Worktree) -> bool:
    """Save the work of an interrupted attempt and requeue its task.

    Return False if the worktree must be preserved.
    """
    document = ledger.task(worktree.task)
    attempt = next(candidate for candidate in document.attempts if candidate.number == worktree.attempt)
    is_saved = await _save(ledger, context, worktree, attempt)
    if document.status is TaskStatus.RUNNING and document.attempt == attempt:
        branch = worktree.branch if await context.git.has_branch(worktree.branch) else None
        transcript = await _read_transcript(context, attempt, worktree.task)
        ended_peers = [one for one in (await ledger.orchestrators.peers.all()).values() if one.ended is not None]
        alive, now = find_last_heartbeat(ended_peers, attempt.started), ledger.writer.clock.now()
        log_args = (context.tools.logs, worktree.task, attempt.number, alive, now)
        ended = await anyio.to_thread.run_sync(last_activity, *log_args)
        slot = worktree.slot
        usage = {
            **context.accounting.recorded(transcript, document.attempts),
            "ended": ended,
            "folder": None if slot is None else str(slot.tree),
        }
        commit = None if branch is None else await context.git.line("rev-parse", f"refs/heads/{branch}")
        await _record_interruption(ledger, worktree.task, branch, commit, is_kept=not is_saved, usage=usage)
    return is_saved


async def _save(ledger: Ledger, context: RunContext, worktree: Worktree, attempt: Attempt) -> bool:
    """Commit the leftovers of an interrupted session to a branch.

    Return False if the worktree must be preserved.
    """
    spec = await ledger.definitions.spec(worktree.task)
    if attempt.phase is not None and not ledger.definitions.workflow(spec.workflow).phase(attempt.phase).writes:
        await context.git(
            "update-ref", "-d", f"refs/heads/{worktree.branch}"
        )  # changes of a read-only phase are discarded
        return True
    missing = [name for name in attempt.secrets if not context.tools.environ.get(name)]
    if missing:
        # Without its value, a secret can't be detected in a commit.
        collected = CollectionResult(
            None, f"it may contain the value of {', '.join(missing)}, which is not set here", complete=False
        )
    else:
        collected = await _collect(context, worktree, attempt.base, spec)
    for branch in (*([worktree.branch] if collected.commit else []), *collected.salvaged):
        await ledger.note(TaskSalvaged(task=worktree.task, branch=branch))
    if not collected.complete:
        notes = await try_to_preserve(context.git, worktree, attempt.base)
        reason = "; ".join((collected.refused or "it has changes that are not on any branch", *collected.notes, *notes))
        await ledger.note(TaskWorktreePreserved(task=worktree.task, worktree=str(worktree.tree), reason=reason))
    return collected.complete


async def _collect(context: RunContext, worktree: Worktree, base: str, spec: TaskSpec) -> CollectionResult:
    slot = worktree.slot
    setup_files = () if slot is None else await anyio.to_thread.run_sync(read_setup_files, slot)
    try:
        return await salvage_session(
            context.git, worktree, base, spec.prompt, context.tools.intake_rules(spec.max_file, setup_files)
        )
    except (GitError, OSError) as error:
        return CollectionResult(None, str(error), complete=False)


async def _read_transcript(context: RunContext, attempt: Attempt, task: str) -> Transcript:
    """Return the transcript of an interrupted session, as far as it was written."""
    log = log_path(context.tools.logs, task, attempt.number, "stdout")
    try:
        with plugin_code(OSError):
            return (await anyio.to_thread.run_sync(read_transcript, context.adapters[attempt.adapter], log))[0]
    except (PluginFailed, OSError):
        return EMPTY_TRANSCRIPT


async def _record_interruption(
    ledger: Ledger,
    task: str,
    branch: str | None,
    commit: str | None = None,
    *,
    is_kept: bool = False,
    usage: JsonObject | None = None,
) -> None:
    document, changes = ledger.task(task), dict[str, Any]()
    facts = {"outcome": INTERRUPTED, "reason": _ORCHESTRATOR_ENDED, "branch": branch, "is_kept": is_kept}
    if document.attempt.attached:
        facts |= {"outcome": PAUSED, "session": document.attempt.session}
        kept = (document.start, document.base) if commit is None else (commit, document.attempt.base)
        changes = pause_task(document, *kept)
    attempts = document.with_attempt(**{"ended": ledger.writer.clock.now(), **(usage or {}), **facts})
    event = TaskInterrupted(reason=_ORCHESTRATOR_ENDED, branch=branch)
    kept_branch = branch or (document.branch if document.phases else None)  # built by earlier phases
    await ledger.change(
        task, Trigger.INTERRUPT, event, attempts=attempts, branch=kept_branch, reason=_ORCHESTRATOR_ENDED, **changes
    )
    failpoint("recovery.attempt_returned")
