"""Build a run that merges the target of another run into its base. Pure.

It has one task, which is already built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from orchestrator.domain.runs.model import Attempt, RunDocument, TaskDocument
from orchestrator.domain.runs.statuses import TaskStatus

if TYPE_CHECKING:
    from orchestrator.domain.settings.run_settings import TaskSpec

#: The name of the task of a merge run.
MERGE_TASK: Final = "merge"


def build_merge_run(
    run: RunDocument,
    specs: Sequence[TaskSpec],
    name: str,
    *,
    commit: str,
    branch: str,
    start: str,
    common: str,
    now: float,
) -> tuple[RunDocument, TaskSpec, TaskDocument]:
    """Return a run that lands another run's target on its base, with its task.

    `commit` is the commit to land, preserved by `branch`; `start` is the commit of the base, and `common` the merge
    base. The checks of the run's tasks (`specs`) are applied to the merge. The task has one attempt, so that no session
    follows a failed merge.
    """
    run_changes = {
        "id": name,
        "merges": run.id,
        "target": run.base,
        "workflows": {},
        "trackers": {},
        "tasks": (MERGE_TASK,),
        "overrides": ("tasks", "target", "workflows"),
        "start": start,
        "has_target": True,
        "started": now,
        "ended": None,
        "halted": None,
        "annotations": {},
    }
    first_spec = specs[0]
    task = {
        "id": MERGE_TASK,
        "prompt": f"Merge the branch {run.target} into {run.base}.",
        "needs": (),
        "built_needs": (),
        "owns": (),
        "attempts": 1,
        "on_checks_failed": "fail",
        "checks": tuple(dict.fromkeys(check for spec in specs for check in spec.checks)),
        "checks_timeout": max(spec.checks_timeout for spec in specs),
        "checks_env": tuple(dict.fromkeys(name for spec in specs for name in spec.checks_env)),
        "workflow": None,
        "context": {},
        "tracker": None,
        "plan": None,
    }
    attempt = Attempt(
        number=1, adapter=first_spec.adapter, base=common, started=now, ended=now, outcome="built", branch=branch
    )
    document = TaskDocument(status=TaskStatus.QUEUED, attempts=(attempt,), commit=commit, branch=branch)
    return run.model_copy(update=run_changes), first_spec.model_copy(update=task), document
