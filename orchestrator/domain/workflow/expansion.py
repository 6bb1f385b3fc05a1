"""The tasks that a plan becomes. Pure.

The text of a plan is data: it says what its tasks are called and asked, what they wait for and which paths they own,
and nothing else of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from orchestrator.domain.scheduling.path_patterns import check_pattern, is_covered
from orchestrator.domain.workflow.handoff_models import Plan, PlannedTask, check_plan, collect_needs
from orchestrator.domain.workflow.violations import HandoffFacts, Violation

#: Characters of a task's id.
MAX_ID_CHARS: Final = 64

_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9._-]+")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_OUTSIDE: Final = "name paths that the task owns whose plan it is"


@dataclass(frozen=True, slots=True)
class ExpandedTask:
    """One task that a plan becomes."""

    id: str
    prompt: str
    needs: tuple[str, ...]
    """Ids of others."""
    owns: tuple[str, ...]


def expand_plan(
    plan: Mapping[str, Any], prefix: str, *, most: int, owns: Sequence[str], taken: Collection[str]
) -> tuple[ExpandedTask, ...] | Sequence[Violation]:
    """Return the tasks that a plan (as its kind has it) becomes, in its order; or all that keeps it from that.

    Their ids begin with `prefix` and are none that is `taken`. They own paths within `owns` where there are any, and
    those where they name none.
    """
    read = Plan.model_validate(dict(plan))
    names = {one.id: make_task_name(prefix, one.id) for one in read.tasks}
    found = [
        *check_plan(read, HandoffFacts()),
        *_too_many(read, most),
        *_clashes(read, names, taken),
        *_paths(read, owns),
    ]
    if found:
        return found
    needs = collect_needs(read)
    return tuple(
        ExpandedTask(
            names[one.id], one.prompt, tuple(names[need] for need in needs[one.id]), _owned(one) or tuple(owns)
        )
        for one in read.tasks
    )


def make_task_name(prefix: str, id_: str) -> str:
    """Return the name of the task that a plan calls `id_`: `prefix` and what of that can be in a name.

    What is too long is cut, and told from others by a few digits of its SHA-256.
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
    return tuple(dict.fromkeys(one.strip().removeprefix("./") for one in task.owns))


def _too_many(plan: Plan, most: int) -> Iterator[Violation]:
    if len(plan.tasks) > most:
        what = f"there are {len(plan.tasks)} tasks, and {most} at most become tasks of the run"
        yield Violation("expansion.most", "tasks", what, f"plan {most} at most")


def _clashes(plan: Plan, names: Mapping[str, str], taken: Collection[str]) -> Iterator[Violation]:
    """Yield which names are another's; the names of folders may not tell upper from lower case."""
    known = {name.casefold(): "another task of the run" for name in taken}
    for place, one in enumerate(plan.tasks):
        name = names[one.id]
        other = known.setdefault(name.casefold(), f"tasks[{place}]")
        if other != f"tasks[{place}]":
            what = f"its name in the run, {name!r}, is that of {other}"
            yield Violation("expansion.names", f"tasks[{place}].id", what, "choose an id with other letters or digits")


def _paths(plan: Plan, owns: Sequence[str]) -> Iterator[Violation]:
    for place, one in enumerate(plan.tasks):
        for number, pattern in enumerate(_owned(one)):
            at = f"tasks[{place}].owns[{number}]"
            fault = _fault(pattern)
            if fault is not None:
                what, _, remedy = fault.partition(": ")
                yield Violation("expansion.paths", at, f"{pattern[:200]!r} can't be owned, {what}", remedy)
            elif owns and not is_covered(pattern, owns):
                what = f"{pattern[:200]!r} is not within what is its to change ({', '.join(owns)})"
                yield Violation("expansion.paths", at, what, _OUTSIDE)


def _fault(pattern: str) -> str | None:
    """Return what makes a text no pattern of paths, with the remedy behind a colon."""
    if _CONTROL.search(pattern):
        return "it has a control character: name the path without it"
    if any(part.casefold() == ".git" for part in pattern.split("/")):
        return "it is what git itself works with: name another path"
    try:
        check_pattern(pattern)
    except ValueError as error:
        return str(error)
    return None
