"""Rule violations in handoffs and records: rule, location, problem and remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Final

from orchestrator.errors import PluginFailed, plugin_code

#: The maximum number of violations reported by one check.
MAX_VIOLATIONS: Final = 20


@dataclass(frozen=True, slots=True)
class HandoffContext:
    """External facts that a handoff check needs."""

    checksums: Mapping[str, str | None] = field(default_factory=dict)
    """SHA-256 (hexadecimal) by path of files in the built tree; None if the file does not exist.

    A path that is missing here was not read, and is not checked.
    """


@dataclass(frozen=True, slots=True)
class Violation:
    """A violation of one rule."""

    rule: str
    """The name of the rule, such as `plan.dependencies`."""
    location: str
    """For example `tasks[2].id` in a handoff, or `phase 'plan'`."""
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.location}: {self.message}: {self.remedy}"

    def to_json(self) -> dict[str, str]:
        """Return the violation as a JSON object."""
        return asdict(self)


def run_check(rule: str, subject: str, check: Callable[[], Iterable[Violation]]) -> list[Violation]:
    """Return the violations that a plugin's check reports, or one if it fails."""
    try:
        with plugin_code():
            violations: list[Any] = list(islice(check(), MAX_VIOLATIONS))
    except PluginFailed as failed:
        return [Violation(rule, subject, f"its check failed: {failed}", "fix the plugin that provides it")]
    invalid = next((item for item in violations if not isinstance(item, Violation)), None)
    if invalid is not None:
        message = f"expected its check to return Violations, got {type(invalid).__name__}"
        return [Violation(rule, subject, message, "fix the plugin that provides it")]
    return violations
