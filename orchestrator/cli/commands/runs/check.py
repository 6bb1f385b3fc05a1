"""The command that holds what is recorded of a run's workflows against the rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from orchestrator.cli.core.command import (
    CommandContext,
    json_option,
    open_council,
    print_damage,
    run_argument,
    run_command,
    store_option,
)
from orchestrator.cli.render.text import one_line, printable

if TYPE_CHECKING:
    from orchestrator.engine.phases.verification import RunVerification


@click.command()
@run_argument
@store_option
@json_option
def check(run: str | None, as_json: bool) -> None:
    """Hold what is recorded of a run's workflows against the rules.

    That is phases, sessions, handoffs and the files that they name; each rule that is broken is told with its place and
    what to do. Without RUN it is the newest; it may be at work. The exit code is 1 where a rule is broken.

    \b
    Examples:
      council check
      council check 20260102-030405-ab12 --json
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            found = await council.state.verify_run(run)
            code = 0 if found.is_valid else 1
            if as_json:
                context.output.json({**found.to_json(), "damage": list(council.damage), "exit": code})
                return code
            for line in _lines(found):
                context.output.text(f"{printable(line)}\n")
            print_damage(context, council.damage)
            return code

    run_command(command, as_json=as_json, brief=True)


def _lines(found: RunVerification) -> Iterator[str]:
    for violation in found.violations:
        yield f"{violation.rule}  {one_line(violation.place)}: {one_line(violation.what)}"
        yield f"  → {one_line(violation.remedy)}"
    for task in found.tasks:
        for one in task.unseen:
            yield f"not looked at: {one_line(one)}"
    if not found.tasks:
        yield f"run {found.run}: no task has a workflow"
        return
    tasks, handoffs = len(found.tasks), sum(task.handoffs for task in found.tasks)
    looked = f"{_counted(tasks, 'task')} with a workflow, {_counted(handoffs, 'handoff')}"
    broken = len(found.violations)
    verdict = f"{_counted(broken, 'violation')}" if broken else "all rules hold"
    yield f"run {found.run}: {looked}: {verdict}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
