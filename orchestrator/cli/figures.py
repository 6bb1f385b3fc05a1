"""The figures of a run as people read them."""

from __future__ import annotations

from orchestrator.cli.table import amount
from orchestrator.domain.metrics import Metrics
from orchestrator.domain.model import REVIVABLE, TaskStatus


def minutes_text(minutes: float) -> str:
    """Return a time in minutes; what would be shown as none of them in seconds."""
    return f"{minutes:.1f} min" if minutes >= 0.1 else f"{minutes * 60:.1f} s"


def figures(metrics: Metrics) -> str:
    """Return the figures beside what has landed in a line; what is zero or not known is left out."""
    ended = {status.replace("_", " "): metrics.by_status.get(status, 0) for status in TaskStatus if status in REVIVABLE}
    counts = {"in progress": metrics.in_progress, **ended, "pending": metrics.pending}
    parts = [f"{count} {name}" for name, count in counts.items() if count]
    if metrics.average_time_minutes is not None:
        parts.append(f"{minutes_text(metrics.average_time_minutes)} on average")
    if tokens := metrics.input_tokens + metrics.output_tokens:
        parts.append(f"{amount(tokens)} tokens")
    if metrics.cost is not None:
        parts.append(f"${metrics.cost:.2f}")
    return ", ".join(parts)
