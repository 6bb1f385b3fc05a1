"""The figures of a run as people read them."""

from __future__ import annotations

from orchestrator.cli.render.result import landed_summary, state_counts
from orchestrator.cli.render.table_model import format_count
from orchestrator.domain.runs.metrics import Metrics
from orchestrator.engine.reports.report import RunReport


def format_minutes(minutes: float) -> str:
    """Return a time in minutes; what would be shown as none of them in seconds."""
    return f"{minutes:.1f} min" if minutes >= 0.1 else f"{minutes * 60:.1f} s"


def metrics_line(report: RunReport, metrics: Metrics) -> str:
    """Return the figures of a run in a line, first how much has landed; what is zero or not known is left out."""
    parts = [landed_summary(report), *state_counts(report)]
    if metrics.average_time_minutes is not None:
        parts.append(f"{format_minutes(metrics.average_time_minutes)} on average")
    if tokens := metrics.input_tokens + metrics.output_tokens:
        parts.append(f"{format_count(tokens)} tokens")
    if metrics.cost is not None:
        parts.append(f"${metrics.cost:.2f}")
    return ", ".join(parts)
