"""The commands that list and break locks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from orchestrator.cli.core.command import CouncilContext, council_command
from orchestrator.cli.core.group import SuggestingGroup
from orchestrator.cli.render.text import align_columns
from orchestrator.domain.settings.quantities import format_duration
from orchestrator.locking.lock_overview import LockParty, LockStatus


@click.group(cls=SuggestingGroup, invoke_without_command=True)
@council_command()
async def locks(context: CouncilContext) -> None:
    """List locks with their holders, times and waiters.

    There are three layers of locks: files that sessions edit, paths that they own, and permits to land on a target.

    \b
    Examples:
      council locks
      council locks --json
      council locks break ownership/20260102-030405-ab12/models.1 --reason "its machine is gone"
    """
    found = await context.council.locks.list()
    context.answer_with_damage(
        lambda: {"locks": [one.to_json() for one in found]}, _lines(found) if found else ["no locks"]
    )


@locks.command("break")
@click.argument("name")
@click.option("--reason", metavar="TEXT", required=True, help="The reason, which is recorded.")
@council_command()
async def break_(context: CouncilContext, name: str, reason: str) -> None:
    """Remove a lock from its holder.

    NAME is a name from `council locks`. To release everything that a session has locked, break its ownership: this
    releases all of its paths and the locked files in them. Breaking the lock of a single file leaves the file owned by
    the session. The locks of a dead process are free and need not be broken. The holder of a broken merge lease can no
    longer land with it.

    \b
    Examples:
      council locks break ownership/20260102-030405-ab12/models.1 --reason "the session hangs"
      council locks break merge/3f9ac0d1e2b45678 --reason "its machine is gone"
    """
    lock = await context.council.locks.revoke(name, reason)
    held = ", ".join(one.owner for one in lock.holders)
    context.output.answer(lambda: {"broken": lock.to_json(), "reason": reason}, [f"broke {lock.name}, held by {held}"])


def _lines(locks: Sequence[LockStatus]) -> Iterator[str]:
    rows: list[Sequence[str]] = []
    for lock in locks:
        mode = "shared by" if lock.mode == "shared" else "held by"
        resources = ", ".join(lock.resources)
        about = () if lock.name.endswith(resources) else (resources,)
        rows += [(lock.name, mode, _user(one), *about) for one in lock.holders]
        rows += [(lock.name, "awaited by", _user(one), ", ".join(one.wants)) for one in lock.waiters]
    yield from align_columns(rows)


def _user(one: LockParty) -> str:
    return one.owner if one.age is None else f"{one.owner} for {format_duration(round(one.age))}"
