"""Going back to a checkpoint: what is about to be overwritten is kept by another one, then all changes at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.domain.runs.model import CheckpointOrigin, TaskDocument, TaskStatus
from orchestrator.errors import GitError, to_unusable_error
from orchestrator.protocols import Commit, Event, Guard, Key, Store, Write
from orchestrator.repo.git.command import Git
from orchestrator.repo.worktrees.hub import Hub, work_branch_name
from orchestrator.state.documents.checkpoints import Checkpoint, RestorePlan, create_checkpoint
from orchestrator.system.failpoints import failpoint

_WAITS_TO_LAND = frozenset({TaskStatus.QUEUED, TaskStatus.CHECKING})


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What came of going back to a checkpoint: documents by their names."""

    checkpoint: str
    before: str | None
    """The checkpoint of how things stood until then; None where nothing had to be changed, or nothing was there."""
    runs: Sequence[str]
    """The runs that `council resume` can go on with from there."""
    written: Sequence[str]
    deleted: Sequence[str]
    left: Mapping[str, str]
    """What has changed since and stays all the same, with the reason."""


async def restore_checkpoint(
    store: Store, found: RestorePlan, guards: Sequence[Guard], environ: Mapping[str, str]
) -> RestoreResult:
    """Do what `found` says, by one commit; the caller owns its runs under `guards`.

    RefusedError, with nothing changed, where work that would wait to land again is gone from our repositories.
    """
    before = None
    if found.writes:
        for run in found.runs.values():
            await _restore_branches(run.id, Hub(Path(run.hub)), found.writes, environ)
        before = await _checkpoint_before(store, found)
        await store.commit(Commit(found.writes, _events(found, before), guards))
        failpoint("checkpoint.restored")
    return RestoreResult(
        checkpoint=found.checkpoint.id,
        before=before.id if before else None,
        runs=[name for name, run in found.runs.items() if run.ended is None],
        written=[str(key) for key in found.written],
        deleted=[str(key) for key in found.deleted],
        left={str(key): why for key, why in found.left.items()},
    )


async def _checkpoint_before(store: Store, found: RestorePlan) -> Checkpoint | None:
    run = found.checkpoint.run
    if run is not None and await store.get(Key("run", run)) is None:
        return None
    return await create_checkpoint(store, run, "before restore", maker=CheckpointOrigin.COUNCIL, is_live=False)


def _events(found: RestorePlan, before: Checkpoint | None) -> list[Event]:
    tasks = Counter(write.key.id.partition("/")[0] for write in found.writes if write.key.kind == "task")
    facts = {"checkpoint": found.checkpoint.id, "before": before.id if before else None}
    return [Event("checkpoint.restored", {"run": run, **facts, "tasks": tasks[run]}) for run in found.runs]


async def _restore_branches(run: str, hub: Hub, writes: Sequence[Write], environ: Mapping[str, str]) -> None:
    """See to it that what tasks have built and not landed is on their branches again."""
    lines = []
    for write in writes:
        owner, _, task = write.key.id.partition("/")
        if write.key.kind == "task" and owner == run and write.value is not None:
            document = TaskDocument.model_validate(write.value)
            if document.status in _WAITS_TO_LAND and document.commit is not None:
                branch = work_branch_name(run, task, str(document.building_attempt.number))
                lines.append(f"update refs/heads/{branch} {document.commit}\n")
    if not lines or not await anyio.to_thread.run_sync(hub.trusted.is_dir):
        return
    try:
        await Git(hub.trusted, environ=environ)("update-ref", "--stdin", input_="".join(lines).encode())
    except GitError as error:
        remedy = "restore another checkpoint, or start a new run"
        raise to_unusable_error(error, f"what tasks of run {run} had built is gone", remedy) from None
