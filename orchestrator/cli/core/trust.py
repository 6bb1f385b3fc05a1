"""Asks before what a repository's file wants of this machine is executed: once, and again for what is new."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio
import anyio.to_thread
import click

from orchestrator.cli.render.output import plain
from orchestrator.config.model import RunConfig
from orchestrator.config.permissions import requests_of
from orchestrator.engine.diagnostics.trust import VARIABLE, checkout_around, confirm, trusts_all, unconfirmed
from orchestrator.errors import RefusedError

_TRUST = "orchestrator.trust"


def _choose(context: click.Context, _: click.Parameter, trusted: bool) -> None:
    context.meta[_TRUST] = trusted or context.meta.get(_TRUST, False)


trust_option = click.option(
    "--trust",
    is_flag=True,
    expose_value=False,
    callback=_choose,
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
    top = await anyio.to_thread.run_sync(checkout_around, file)
    if top is None and is_named:
        return
    requests = requests_of(config, top or file.parent)
    new = await unconfirmed(file, requests, os.environ)
    if not new:
        return
    if not click.get_current_context().meta.get(_TRUST):
        remedy = f"read the file, then confirm with --trust, or set {VARIABLE}=1"
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise RefusedError(f"{file} asks for more than the default, not confirmed yet: {'; '.join(new)}", remedy)
        if not await anyio.to_thread.run_sync(_ask, file, new):
            raise RefusedError(f"{file} is not trusted", remedy)
    await confirm(file, requests, os.environ)


def _ask(file: Path, new: list[str]) -> bool:
    click.echo(plain(f"{file} asks for more than the default:"), err=True)
    for one in new:
        click.echo(plain(f"  {one}"), err=True)
    return click.confirm("Trust this file?", default=False, err=True)
