"""Findings and remedies, as printed by `doctor` and `state health`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from orchestrator.cli.render.output import Output
from orchestrator.cli.render.text import one_line, pluralize, printable, wrapped
from orchestrator.engine.diagnostics.findings import Finding, Level


def show_findings(findings: Sequence[Finding], code: int, output: Output, **details: object) -> None:
    """Print findings with their remedies, and the number of problems and warnings.

    `details` are printed as JSON only.
    """
    if output.as_json:
        output.json({"findings": [asdict(finding) for finding in findings], **details, "exit": code})
        return
    for line in finding_lines(findings):
        output.text(f"{line}\n")
    counts = Counter(finding.level for finding in findings)
    output.text(f"{pluralize(counts[Level.PROBLEM], 'problem')}, {pluralize(counts[Level.WARNING], 'warning')}\n")


def finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield each finding and its remedy, uncut because both may contain commands."""
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        indent = " " * (width + 11)
        head = f"{finding.level:<8} {finding.name:<{width}}  "
        yield from wrapped(printable(one_line(finding.message, len(finding.message))), head=head, indent=indent)
        if finding.remedy is not None:
            text = printable(one_line(finding.remedy, len(finding.remedy)))
            yield from wrapped(text, head=f"{indent}→ ", indent=f"{indent}  ")


def findings_exit_code(findings: Iterable[Finding]) -> int:
    """Return the exit code: 1 if there is a problem; warnings do not count."""
    return int(any(finding.level is Level.PROBLEM for finding in findings))
