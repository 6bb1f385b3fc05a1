"""What is wrong with what was handed over or recorded: the rule, the place, what would be right. Values, not errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass


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


def told(violations: Sequence[Violation], most: int = 20) -> str:
    """Return violations as lines, at most so many of them."""
    lines = [f"- {one}" for one in violations[:most]]
    left = len(violations) - len(lines)
    return "\n".join([*lines, *([f"- and {left} more"] if left > 0 else [])])
