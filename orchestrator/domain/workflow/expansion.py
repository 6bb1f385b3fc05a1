"""Expand a plan into tasks of the run.

A plan is untrusted data: it determines only the ids, prompts, needs and owned paths of its tasks.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from orchestrator.domain.settings.path_patterns import check_pattern, is_covered
from orchestrator.domain.workflow.handoff_models import Plan, PlannedTask, check_plan, collect_needs
from orchestrator.domain.workflow.violations import HandoffContext, Violation
from orchestrator.errors import InvalidValue

#: The maximum length of a task id, in characters.
MAX_ID_CHARS: Final = 64

_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9._-]+")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_OUTSIDE: Final = "use paths that the planning task owns"


@dataclass(frozen=True, slots=True)
class ExpandedTask:
    """A task created from a plan."""

    id: str
    prompt: str
    needs: tuple[str, ...]
    """Ids of other tasks."""
    owns: tuple[str, ...]


def expand_plan(
    plan: Mapping[str, Any], prefix: str, *, limit: int, owns: Sequence[str], taken: Collection[str]
) -> tuple[ExpandedTask, ...] | Sequence[Violation]:
    """Return the tasks of a plan (normalized by its kind) in order, or all violations.

    Their ids start with `prefix` and must not be `taken`. If `owns` is not empty, they own paths within it, and by
    default all of it.
    """
    parsed = Plan.model_validate(dict(plan))
    names = {task.id: make_task_name(prefix, task.id) for task in parsed.tasks}
    violations = [
        *check_plan(parsed, HandoffContext()),
        *_check_count(parsed, limit),
        *_check_names(parsed, names, taken),
        *_check_paths(parsed, owns),
    ]
    if violations:
        return violations
    needs = collect_needs(parsed)
    return tuple(
        ExpandedTask(
            names[task.id], task.prompt, tuple(names[need] for need in needs[task.id]), _owned(task) or tuple(owns)
        )
        for task in parsed.tasks
    )


def make_task_name(prefix: str, id_: str) -> str:
    """Return the task id for a plan id: `prefix` and the valid characters of `id_`.

    Long names are truncated, and get a few digits of their SHA-256 to remain unique.
    """
    plain = _NOT_IN_NAMES.sub("-", id_)
    while ".." in plain:
        plain = plain.replace("..", ".")
    plain = plain.strip("-._") or "task"
    name = f"{prefix}{plain}"
    if len(name) > MAX_ID_CHARS or name.endswith(".lock"):
        digits = sha256(f"{prefix}{id_}".encode()).hexdigest()[:8]
        name = f"{name[: MAX_ID_CHARS - 9].rstrip('.')}-{digits}"
    return name


def _owned(task: PlannedTask) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path.strip().removeprefix("./") for path in task.owns))


def _check_count(plan: Plan, limit: int) -> Iterator[Violation]:
    if len(plan.tasks) > limit:
        message = f"the plan has {len(plan.tasks)} tasks (limit: {limit})"
        yield Violation("expansion.limit", "tasks", message, f"plan at most {limit} tasks")


def _check_names(plan: Plan, names: Mapping[str, str], taken: Collection[str]) -> Iterator[Violation]:
    """Yield duplicate names, ignoring case: folder names may be case-insensitive."""
    known = {name.casefold(): "another task of the run" for name in taken}
    for index, task in enumerate(plan.tasks):
        name, at = names[task.id], f"tasks[{index}]"
        other = known.setdefault(name.casefold(), at)
        if other != at:
            message = f"its task id {name!r} is already used by {other}"
            yield Violation("expansion.names", f"{at}.id", message, "use an id with other letters or digits")


def _check_paths(plan: Plan, owns: Sequence[str]) -> Iterator[Violation]:
    for index, task in enumerate(plan.tasks):
        for number, pattern in enumerate(_owned(task)):
            at = f"tasks[{index}].owns[{number}]"
            fault = _fault(pattern)
            if fault is not None:
                yield Violation(
                    "expansion.paths", at, f"{pattern[:200]!r} can't be owned: {fault.message}", fault.remedy
                )
            elif owns and not is_covered(pattern, owns):
                message = f"{pattern[:200]!r} is outside of the paths that the planning task owns ({', '.join(owns)})"
                yield Violation("expansion.paths", at, message, _OUTSIDE)


def _fault(pattern: str) -> InvalidValue | None:
    """Return the error in a path pattern; None if it is valid."""
    if _CONTROL.search(pattern):
        return InvalidValue("it contains a control character", "remove it")
    if any(part.casefold() == ".git" for part in pattern.split("/")):
        return InvalidValue("it is inside git's own folder", "use another path")
    try:
        check_pattern(pattern)
    except InvalidValue as error:
        return error
    return None
