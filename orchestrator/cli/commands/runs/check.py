"""The command that verifies a run's workflow records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from orchestrator.cli.core.command import CouncilContext, council_command, run_argument
from orchestrator.cli.render.text import one_line, pluralize

if TYPE_CHECKING:
    from orchestrator.engine.phases.verification import RunVerification


@click.command()
@run_argument
@council_command(is_short_lived=True)
async def check(context: CouncilContext, run: str | None) -> int:
    """Verify a run's workflow records.

    Checks phases, sessions, handoffs and the files that they name. Each violation is reported with its location and a
    fix. The exit code is 1 if a rule is violated. RUN defaults to the newest run; it may be active.

    \b
    Examples:
      council check
      council check 20260102-030405-ab12 --json
    """
    found = await context.council.state.verify_run(run)
    code = 0 if found.is_valid else 1
    context.answer_with_damage(lambda: {**found.to_json(), "exit": code}, _lines(found))
    return code


def _lines(found: RunVerification) -> Iterator[str]:
    for violation in found.violations:
        yield f"{violation.rule}  {one_line(violation.location)}: {one_line(violation.message)}"
        yield f"  → {one_line(violation.remedy)}"
    for task in found.tasks:
        for one in task.skipped_checks:
            yield f"not checked: {one_line(one)}"
    if not found.tasks:
        yield f"run {found.run}: no task has a workflow"
        return
    tasks, handoffs = len(found.tasks), sum(task.handoffs for task in found.tasks)
    checked = f"{pluralize(tasks, 'task')} with a workflow, {pluralize(handoffs, 'handoff')}"
    broken = len(found.violations)
    verdict = f"{pluralize(broken, 'violation')}" if broken else "no violations"
    yield f"run {found.run}: {checked}: {verdict}"
