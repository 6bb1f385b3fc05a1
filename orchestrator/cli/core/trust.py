"""Confirmation of the requests of a repository's file before it is executed: once for each request."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio
import anyio.to_thread
import click

from orchestrator.cli.core.confirm import ask_yes_no
from orchestrator.cli.render.output import Output
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
    help="Confirm the file's requests beyond the sandbox, and remember that.",
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
            raise RefusedError(f"{file} has unconfirmed requests: {'; '.join(new)}", remedy)
        if not await _ask(file, new):
            raise RefusedError(f"{file} is not trusted", remedy)
    await confirm_requests(file, requests, os.environ)


async def _ask(file: Path, new: list[str]) -> bool:
    output = Output(as_json=False)
    output.text(printable(f"{file} requests more than the default:\n", keep="\n"), err=True)
    for one in new:
        output.text(printable(f"  {one}") + "\n", err=True)
    return await ask_yes_no(output, "Trust this file?")
