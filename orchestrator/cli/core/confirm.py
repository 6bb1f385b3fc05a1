"""Confirmation of irreversible actions and of requested permissions."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio
import anyio.to_thread
import click

from orchestrator.cli.core.options import remember_option
from orchestrator.cli.render.output import Output
from orchestrator.cli.render.text import printable
from orchestrator.config.model import RunConfig
from orchestrator.engine.diagnostics.trust import (
    TRUST_VARIABLE,
    confirm_requests,
    find_unconfirmed,
    list_requests,
    unconfirmed_error,
)
from orchestrator.errors import RefusedError

#: The answers that mean yes.
_YES = frozenset({"y", "yes"})

yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation.")


def can_prompt(output: Output) -> bool:
    """Return True if there is a terminal to ask a question on."""
    return not output.as_json and sys.stdin.isatty() and sys.stderr.isatty()


async def ask_yes_no(output: Output, question: str) -> bool:
    """Ask a question once, and return whether the answer is yes."""
    output.text(printable(f"{question} [y/N] "), err=True)
    sys.stderr.flush()
    # A terminal provides complete lines, and unlike `readline` a signal interrupts this wait.
    await anyio.wait_readable(sys.stdin)
    return sys.stdin.readline().strip().lower() in _YES


async def confirm_action(output: Output, question: str, *, yes: bool) -> bool:
    """Return True if the user confirms an action, by `yes` or by an answer.

    Raises RefusedError without a terminal.
    """
    if yes:
        return True
    if not can_prompt(output):
        message = f"{question[:1].lower()}{question[1:].rstrip('?')}"
        raise RefusedError(printable(f"not confirmed: {message}"), "add --yes")
    return await ask_yes_no(output, question)


_TRUST = "orchestrator.trust"
trust_option = click.option(
    "--trust",
    is_flag=True,
    expose_value=False,
    callback=remember_option(_TRUST),
    help="Grant the permissions that the file requests beyond the sandbox, and remember this.",
)


async def require_trust(config: RunConfig, *, is_named: bool) -> None:
    """Have the user confirm the permissions that a run's file requests.

    A file that is named on the command line is chosen by the user. Raises RefusedError if the user does not confirm, or
    if there is no terminal.
    """
    is_granted = bool(click.get_current_context().meta.get(_TRUST))
    requests = await list_requests(config, os.environ, is_chosen=is_named and not is_granted)
    file = config.path
    new = await find_unconfirmed(file, requests, os.environ)
    if not new:
        return
    if not is_granted:
        remedy = f"read the file, then confirm with --trust, or set {TRUST_VARIABLE}=1"
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise unconfirmed_error(file, new, remedy)
        if not await _ask(file, new):
            raise RefusedError(f"{file} is not trusted", remedy)
    await confirm_requests(file, requests, os.environ)


async def _ask(file: Path, new: list[str]) -> bool:
    output = Output(as_json=False)
    output.text(printable(f"{file} requests more than the default:\n", keep="\n"), err=True)
    for one in new:
        output.text(printable(f"  {one}") + "\n", err=True)
    return await ask_yes_no(output, "Trust this file?")
