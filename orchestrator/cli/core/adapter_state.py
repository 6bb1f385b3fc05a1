"""The adapter state that the newest run recorded, for other commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.cli.core.command import CommandContext, open_council
from orchestrator.cli.core.error_boundary import name_failed_file
from orchestrator.cli.render.result import enable_adapter_command
from orchestrator.cli.render.text import one_line, printable
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.engine.diagnostics.findings import Finding, Level
from orchestrator.engine.reports.report import AdapterFailure, AdapterReport
from orchestrator.errors import CouncilError, RefusedError
from orchestrator.system.clock import format_local_time

#: Failures that would also affect the next session of the adapter.
_LASTING_FAILURES = frozenset({FailureClass.AUTH, FailureClass.INVALID, FailureClass.MISSING})


@dataclass(frozen=True, slots=True)
class AdapterState:
    """The unavailable adapters and the last failed sessions, by adapter name."""

    unusable: Mapping[str, AdapterReport] = field(default_factory=dict)
    failed: Mapping[str, AdapterFailure] = field(default_factory=dict)
    remedies: Mapping[str, str] = field(default_factory=dict)
    """The command that enables each unavailable adapter."""

    def lines(self, name: str) -> list[str]:
        """Return the availability and the last failure of an adapter as lines."""
        lines = []
        if (one := self.unusable.get(name)) is not None:
            lines.append(_availability(one))
        if (last := self.failed.get(name)) is not None:
            lines.append(
                f"last failure {format_local_time(last.time)}, {last.task}: {last.failure}: {one_line(last.reason)}"
            )
        return lines

    def findings(self) -> list[Finding]:
        """Return the state as findings.

        An unavailable adapter is only a warning, because a new run tries it again.
        """
        found = []
        for name in sorted({*self.unusable, *self.failed}):
            state = "; ".join(self.lines(name))
            again = f"fix it, then `{self.remedies[name]}`" if name in self.unusable else None
            level = Level.WARNING if name in self.unusable else Level.OK
            if level is Level.OK and self.failed[name].failure in _LASTING_FAILURES:
                level, again = (
                    Level.WARNING,
                    f"fix it: `council logs {shlex.quote(self.failed[name].task)}` shows details",
                )
            found.append(Finding(f"adapter {name}", level, f"in the newest run: {state}", again))
        return found


async def read_adapter_state(context: CommandContext) -> AdapterState:
    """Return the adapter state of the project's newest run; empty without a run."""
    try:
        async with open_council(context) as opened:
            council = opened.council
            report = await council.runs.status()
            failed = await council.reports.last_failures(report.run)
            remedies = {one.name: enable_adapter_command(one.name, report) for one in report.adapters}
            return AdapterState({one.name: one for one in report.adapters}, failed, remedies)
    except RefusedError:
        return AdapterState()
    except (CouncilError, OSError) as error:
        name_failed_file(error)
        context.output.notice(printable(f"council: can't read the newest run: {one_line(str(error))}"))
        return AdapterState()


def _availability(one: AdapterReport) -> str:
    if one.disabled_reason is not None:
        return f"disabled: {one_line(one.disabled_reason)}"
    return f"paused until {format_local_time(one.cooldown_until or 0.0)}"
