"""Asks before what a repository's file wants of this machine is executed: once, and again for what is new."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio
import anyio.to_thread
import click

from orchestrator.cli.render.text import printable
from orchestrator.config.model import RunConfig
from orchestrator.config.permissions import list_permission_requests
from orchestrator.engine.diagnostics.trust import (
    TRUST_VARIABLE,
    confirm_requests,
    enclosing_checkout,
    find_unconfirmed,
    trusts_all,
)
from orchestrator.errors import RefusedError

_TRUST = "orchestrator.trust"


def _store_trust_option(context: click.Context, _: click.Parameter, trusted: bool) -> None:
    context.meta[_TRUST] = trusted or context.meta.get(_TRUST, False)


trust_option = click.option(
    "--trust",
    is_flag=True,
    expose_value=False,
    callback=_store_trust_option,
    help="Confirm what the file asks for beyond the sandbox, and remember that.",
)


async def require_trust(config: RunConfig, *, is_named: bool) -> None:
    """Have the user confirm what a run's file asks for beyond the default; RefusedError where nobody does.

    A run that comes from no file needs no confirmation, and neither does a file in no checkout that is named on the
    command line: the user has chosen it.
    """
    file = config.path
    if trusts_all(os.environ) or not await anyio.Path(file).is_file():
        return
    top = await anyio.to_thread.run_sync(enclosing_checkout, file)
    if top is None and is_named:
        return
    requests = list_permission_requests(config, top or file.parent)
    new = await find_unconfirmed(file, requests, os.environ)
    if not new:
        return
    if not click.get_current_context().meta.get(_TRUST):
        remedy = f"read the file, then confirm with --trust, or set {TRUST_VARIABLE}=1"
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise RefusedError(f"{file} asks for more than the default, not confirmed yet: {'; '.join(new)}", remedy)
        if not await anyio.to_thread.run_sync(_ask, file, new):
            raise RefusedError(f"{file} is not trusted", remedy)
    await confirm_requests(file, requests, os.environ)


def _ask(file: Path, new: list[str]) -> bool:
    click.echo(printable(f"{file} asks for more than the default:"), err=True)
    for one in new:
        click.echo(printable(f"  {one}"), err=True)
    return click.confirm("Trust this file?", default=False, err=True)
