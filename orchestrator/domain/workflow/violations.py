"""What is wrong with what was handed over or recorded: the rule, the place, what would be right. Values, not errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Final

#: Violations that are told of one check.
MAX_VIOLATIONS: Final = 20
_LONGEST_FAULT: Final = 500  # characters


@dataclass(frozen=True, slots=True)
class HandoffFacts:
    """External facts that a handoff check needs."""

    checksums: Mapping[str, str | None] = field(default_factory=dict)
    """SHA-256 (hexadecimal) by path of files in the built tree; None if the file does not exist.

    A path that is missing here was not read, and is not checked.
    """


@dataclass(frozen=True, slots=True)
class Violation:
    """One rule that something breaks."""

    rule: str
    """Its name, as `plan.dependencies`."""
    place: str
    """Where, as `tasks[2].id` in what was handed over, or as `phase 'plan'`."""
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}: {self.remedy}"

    def to_json(self) -> dict[str, str]:
        """Return the object that programs get."""
        return asdict(self)


def describe_exception(error: Exception) -> str:
    """Return what a plugin's own code raised, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_FAULT]


def run_check(rule: str, subject: str, check: Callable[[], Iterable[Violation]]) -> list[Violation]:
    """Return what a plugin's check finds; what is wrong with the check is found, too, and raises nothing."""
    try:
        found: list[Any] = list(islice(check(), MAX_VIOLATIONS))
    except Exception as error:
        return [
            Violation(rule, subject, f"its check failed: {describe_exception(error)}", "mend the plugin that brings it")
        ]
    strange = next((one for one in found if not isinstance(one, Violation)), None)
    if strange is not None:
        what = f"its check found {type(strange).__name__}, no Violation"
        return [Violation(rule, subject, what, "mend the plugin that brings it")]
    return found
