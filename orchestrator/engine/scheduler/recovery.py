"""What a killed orchestrator left: sessions that must end, work to save, landings whose end is not known.

Runs under the run's lock, which every git command of the killed owner holds until it has ended, so that no
lock file of theirs can belong to anything alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import anyio.to_thread

from orchestrator.config.model import TaskSpec
from orchestrator.domain.runs.leftovers import WorktreeContents, classify_worktree
from orchestrator.domain.runs.lifecycle import Trigger
from orchestrator.domain.runs.model import CLAIMED_STATUSES, FINAL_STATUSES, INTERRUPTED, Attempt, TaskStatus
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.scheduling.claims import OwnerStatus
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import GitError, LockHeld, RefusedError, TargetMissing, to_unusable_error
from orchestrator.protocols import JsonObject
from orchestrator.repo.intake.collect import CollectedWork
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.preserved import try_to_preserve
from orchestrator.repo.worktrees.slots import read_setup_files
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.log_files import last_activity, log_path
from orchestrator.sessions.output.transcript import EMPTY_TRANSCRIPT, Transcript, read_transcript
from orchestrator.sessions.session import salvage_session
from orchestrator.sessions.socket.listener import remove_session_socket
from orchestrator.sessions.supervision.supervisor_client import stop_supervised
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: Seconds within which a session has ended once its orchestrator is gone; far above what it takes.
REAP_TIMEOUT = 30.0

_ORCHESTRATOR_ENDED = "the orchestrator ended before the session did"
_ROLLED_BACK = "a checkpoint was restored that is older than the end of its session"
_LOST = "the record of the attempt was lost with a part of the state log"
_UNCHECKED = "the orchestrator ended before the checks did"


async def recover(ledger: Ledger, shop: RunContext, clock: Clock) -> None:
    """Return every cut-off attempt's task to the queue, its work kept on a branch; adopt what has landed.

    Landings that were cut off are not decided here: the tasks stay `landing`, and the merge queue settles them
    first. May itself be killed anywhere and run again.
    """
    alone = not await has_active_peers(ledger)
    await worktrees.remove_stale_files(shop.hub, ledger.run.id, is_alone=alone)
    await shop.target.clean_up(ledger.run.started)
    shop.target.must_exist |= ledger.has_moved_target()
    try:
        await shop.target.refresh()
    except TargetMissing as gone:
        raise RefusedError(gone.what, gone.remedy) from None
    except GitError as error:
        raise to_unusable_error(error, "the target can't be looked at", "try again when it can be reached") from None
    taken = await _take_over(ledger, shop, counts=False)
    tasks = ledger.run.tasks if alone else taken
    await _recover_sessions(ledger, shop, clock, tasks, at_start=True)
    for task in ledger.damaged:
        if ledger.task(task).status not in FINAL_STATUSES:
            reason = "its record in the state log is damaged, what it did is not known: run it again in a new run"
            await ledger.change(task, Trigger.DISTRUST, {"reason": reason}, reason=reason)


async def take_over_tasks(ledger: Ledger, shop: RunContext, clock: Clock) -> list[str]:
    """Take over what orchestrators had that are gone, as `recover` does at a start; return the tasks.

    Each takeover is a retry of its task. May itself be killed anywhere: what is ours then is taken over the same way.
    """
    taken = await _take_over(ledger, shop, counts=True)
    if taken:
        await worktrees.remove_stale_files(shop.hub, ledger.run.id, is_alone=False)
        with suppress(GitError):  # it is looked at again when they land
            await shop.target.refresh()
        await _recover_sessions(ledger, shop, clock, taken, at_start=False)
    return taken


async def _recover_sessions(
    ledger: Ledger, shop: RunContext, clock: Clock, tasks: Sequence[str], *, at_start: bool
) -> None:
    """End what goes on of the sessions of tasks, keep their work, and return each task to where it can go on from.

    The target was looked at before. Later than `at_start`, orchestrators may be gone that
    were stopped and have not ended, and only what is claimed is ours to end.
    """
    for task in tasks:
        await _inherit_session(ledger, shop, task)
    for worktree in worktrees.list_worktrees(shop.hub, ledger.run.id, tasks):
        # Checks of the base may be those of another process that is alive: `remove_abandoned` removes leftovers.
        if not at_start and (worktree.by or ledger.task(worktree.task).status not in CLAIMED_STATUSES):
            continue
        await _reap(ledger, shop, clock, worktree)
    for task in tasks:
        await _requeue_task(ledger, clock, task, shop.target.find_landing(ledger.task(task).intended))


async def _inherit_session(ledger: Ledger, shop: RunContext, task: str) -> None:
    """Have nobody take a session that was cut off for one at work, and what is built own its paths until it lands."""
    document = ledger.task(task)
    if document.status not in CLAIMED_STATUSES or not document.attempts or ledger.is_claimed_elsewhere(task):
        return
    session = SessionName(ledger.run.id, task, document.attempt.number)
    if document.status is TaskStatus.RUNNING:
        if shop.session_service is not None:
            await shop.session_service.leave(session, keep_ownership=True)
    elif ledger.claims is not None and (claim := ledger.claims.guard(task)) is not None:
        await shop.registry.inherit(session, orchestrator=ledger.orchestrators.me.id, claim=claim)


async def remove_abandoned(ledger: Ledger, shop: RunContext) -> None:
    """Remove what is left of sessions whose attempts are over, and whose process ended before it had done so.

    That nobody holds the lock of its place is proof of that: a process keeps it until the session's folder is gone.
    """
    for worktree in await anyio.to_thread.run_sync(worktrees.list_worktrees, shop.hub, ledger.run.id, ledger.run.tasks):
        held = classify_worktree(ledger.task(worktree.task), worktree.attempt, is_check=worktree.is_check)
        place = await anyio.to_thread.run_sync(lambda one: one.place, worktree)
        if held is WorktreeContents.NOTHING and place is not None:
            with suppress(LockHeld):
                async with place.lock.hold(0):
                    await end_orphaned_session(worktree)
                    await worktrees.remove_session_folder(worktree)


async def _take_over(ledger: Ledger, shop: RunContext, *, counts: bool) -> list[str]:
    """Claim what is nobody's who lives, and return it; its documents are where they were left."""
    if ledger.claims is None:
        return []
    taken = set(await ledger.claims.sweep(counts=counts, also=shop.registry.plan_transfer))
    if any(task not in ledger for task in taken):
        await ledger.learn_tasks()
    for task in taken:
        await ledger.refresh(task)
        await ledger.release(task)
    # What a checkpoint brought back, or was imported, was never claimed.
    taken.update([task for task in ledger.run.tasks if ledger.is_claimed_elsewhere(task) and await ledger.claim(task)])
    return [task for task in ledger.run.tasks if task in taken]


async def has_active_peers(ledger: Ledger) -> bool:
    """Whether another orchestrator is at work in the run."""
    others = ledger.orchestrators
    found = [one for one in (await others.all()).values() if one.owner.id != others.me.id]
    return any([await others.assess(one) in {OwnerStatus.ALIVE, OwnerStatus.STALE} for one in found])


async def _requeue_task(ledger: Ledger, clock: Clock, task: str, landed: str | None) -> None:
    """Return a task to where it can go on from; `landed` is the commit that it is on the target by, if it is."""
    document = ledger.task(task)
    if document.status in FINAL_STATUSES or document.status is TaskStatus.LANDING or ledger.is_claimed_elsewhere(task):
        return
    if landed is not None:
        await ledger.change(task, Trigger.ADOPT, {"landed": landed}, landed=landed, reason=None)
    elif document.status is TaskStatus.RUNNING and document.attempt.ended is not None:
        details = {"reason": _ROLLED_BACK, "branch": document.attempt.branch}
        await ledger.change(task, Trigger.INTERRUPT, details, **details)
    elif document.status is TaskStatus.RUNNING:  # recorded, but nothing of it was made
        await _record_interruption(ledger, clock, task, None)
    elif document.status is TaskStatus.CHECKING:
        await ledger.change(task, Trigger.REQUEUE, {"reason": _UNCHECKED}, reason=_UNCHECKED)


async def _reap(ledger: Ledger, shop: RunContext, clock: Clock, worktree: Worktree) -> None:
    await end_orphaned_session(worktree)
    failpoint("recovery.session_reaped")
    document = ledger.task(worktree.task)
    held = classify_worktree(document, worktree.attempt, is_check=worktree.is_check)
    if held is WorktreeContents.UNKNOWN and await _recreate_lost_record(ledger, shop, clock, worktree):
        return
    if held is WorktreeContents.UNSAVED and await _salvage_attempt(ledger, shop, clock, worktree):
        held = WorktreeContents.NOTHING
    if held is WorktreeContents.NOTHING:
        await worktrees.remove_session_folder(worktree)  # its place is thrown away where places are next looked at


async def _recreate_lost_record(ledger: Ledger, shop: RunContext, clock: Clock, worktree: Worktree) -> bool:
    """Put the attempt on record once more whose worktree this is, if its record was lost: its number is taken.

    The worktree stays: which secrets it was given, and what it began at, is not known any more. One in which nothing
    can have run goes. False where the task is not one that is tried again from where it stands.
    """
    task, number = worktree.task, worktree.attempt
    if ledger.task(task).status is TaskStatus.RUNNING and ledger.task(task).attempt.ended is None:
        await _record_interruption(ledger, clock, task, None)
    known = ledger.task(task).attempts
    if ledger.task(task).status is not TaskStatus.PENDING or task in ledger.damaged or number <= len(known):
        return False
    if not await anyio.to_thread.run_sync(worktrees.unlock_index, worktree):
        await worktrees.remove_session_folder(worktree)
        return True
    spec, base, now = await ledger.spec(task), await shop.target.tip(), clock.now()
    lost = [
        Attempt(
            number=one,
            adapter=spec.adapter,
            base=base,
            started=now,
            ended=now,
            outcome=INTERRUPTED,
            reason=_LOST,
            is_kept=one == number,
        )
        for one in range(len(known) + 1, number + 1)
    ]
    facts = {"base": base, "adapter": spec.adapter}
    await ledger.change(task, Trigger.START, facts, attempts=(*known, *lost))
    await ledger.change(task, Trigger.INTERRUPT, {"reason": _LOST, "branch": None}, branch=None, reason=_LOST)
    reason = "; ".join((_LOST, *await try_to_preserve(shop.git, worktree, base)))
    await ledger.note("task.worktree_preserved", {"task": task, "worktree": str(worktree.tree), "reason": reason})
    return True


async def end_orphaned_session(worktree: Worktree) -> None:
    """End what lives of a session; the caller knows that its orchestrator is gone, or has it no more.

    LockHeld if something of it can't be ended.
    """
    await stop_supervised(worktree.lock, worktree.marker, REAP_TIMEOUT)
    await anyio.to_thread.run_sync(remove_session_socket, worktree)


async def _salvage_attempt(ledger: Ledger, shop: RunContext, clock: Clock, worktree: Worktree) -> bool:
    """Save what a cut-off attempt left, and return its task to the queue; False if the worktree must stay."""
    document = ledger.task(worktree.task)
    attempt = next(one for one in document.attempts if one.number == worktree.attempt)
    is_saved = await _save(ledger, shop, worktree, attempt)
    if document.status is TaskStatus.RUNNING and document.attempt == attempt:
        branch = worktree.branch if await shop.git.has_branch(worktree.branch) else None
        said = await _read_transcript(shop, attempt, worktree.task)
        of = (shop.tools.logs, worktree.task, attempt.number, attempt.started, clock.now())
        ended = await anyio.to_thread.run_sync(last_activity, *of)
        told = {**shop.accounting.recorded(said, document.attempts), "ended": ended}
        await _record_interruption(ledger, clock, worktree.task, branch, is_kept=not is_saved, told=told)
    return is_saved


async def _save(ledger: Ledger, shop: RunContext, worktree: Worktree, attempt: Attempt) -> bool:
    """Bring what a cut-off session left onto a branch; False if the worktree must stay because of what it holds."""
    spec = await ledger.spec(worktree.task)
    if attempt.phase is not None and not ledger.workflow(spec.workflow).phase(attempt.phase).writes:
        await shop.git("update-ref", "-d", f"refs/heads/{worktree.branch}")  # what it changes is discarded
        return True
    unknown = [name for name in attempt.secrets if not shop.tools.environ.get(name)]
    if unknown:
        # Without its value a secret can't be kept out of a commit.
        left = CollectedWork(
            None, f"it may hold the value of {', '.join(unknown)}, which is not set here", complete=False
        )
    else:
        left = await _collect(shop, worktree, attempt.base, spec)
    for branch in (*([worktree.branch] if left.commit else []), *left.salvaged):
        await ledger.note("task.salvaged", {"task": worktree.task, "branch": branch})
    if not left.complete:
        told = await try_to_preserve(shop.git, worktree, attempt.base)
        reason = "; ".join((left.refused or "it holds what is on no branch", *left.notes, *told))
        details = {"task": worktree.task, "worktree": str(worktree.tree), "reason": reason}
        await ledger.note("task.worktree_preserved", details)
    return left.complete


async def _collect(shop: RunContext, worktree: Worktree, base: str, spec: TaskSpec) -> CollectedWork:
    place = worktree.place
    made = () if place is None else await anyio.to_thread.run_sync(read_setup_files, place)
    try:
        return await salvage_session(shop.git, worktree, base, spec.prompt, shop.tools.admission(spec.max_file, made))
    except (GitError, OSError) as error:
        return CollectedWork(None, str(error), complete=False)


async def _read_transcript(shop: RunContext, attempt: Attempt, task: str) -> Transcript:
    """Return what a cut-off session said and used up, as far as that was written."""
    log = log_path(shop.tools.logs, task, attempt.number, "stdout")
    try:
        said, _ = await anyio.to_thread.run_sync(read_transcript, shop.adapters[attempt.adapter], log)
    except Exception:
        return EMPTY_TRANSCRIPT
    return said


async def _record_interruption(
    ledger: Ledger,
    clock: Clock,
    task: str,
    branch: str | None,
    *,
    is_kept: bool = False,
    told: JsonObject | None = None,
) -> None:
    facts = {"outcome": INTERRUPTED, "reason": _ORCHESTRATOR_ENDED, "branch": branch, "is_kept": is_kept}
    document = ledger.task(task)
    attempts = document.with_attempt(**{"ended": clock.now(), **facts, **(told or {})})
    details = {"reason": _ORCHESTRATOR_ENDED, "branch": branch}
    kept = branch or (document.branch if document.phases else None)  # what earlier phases built
    await ledger.change(task, Trigger.INTERRUPT, details, attempts=attempts, branch=kept, reason=_ORCHESTRATOR_ENDED)
    failpoint("recovery.attempt_returned")
