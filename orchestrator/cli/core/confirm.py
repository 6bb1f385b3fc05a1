"""Confirmation of commands that can't be undone."""

from __future__ import annotations

import sys

import anyio
import click

from orchestrator.cli.render.output import Output
from orchestrator.cli.render.text import printable
from orchestrator.errors import RefusedError

#: The answers that agree.
_YES = frozenset({"y", "yes"})

yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


def can_prompt(output: Output) -> bool:
    """Whether there is a terminal for a question."""
    return not output.as_json and sys.stdin.isatty() and sys.stderr.isatty()


async def ask_yes_no(output: Output, question: str) -> bool:
    """Ask a question once, and return whether the answer is yes."""
    output.text(printable(f"{question} [y/N] "), err=True)
    sys.stderr.flush()
    # A terminal hands over whole lines; waited for this way, a signal ends it.
    await anyio.wait_readable(sys.stdin)
    return sys.stdin.readline().strip().lower() in _YES


async def confirm_action(output: Output, question: str, *, yes: bool) -> bool:
    """Return whether an action is confirmed, by `yes` or by an answer. RefusedError without a terminal."""
    if yes:
        return True
    if not can_prompt(output):
        what = f"{question[:1].lower()}{question[1:].rstrip('?')}"
        raise RefusedError(printable(f"not confirmed: {what}"), "add --yes")
    return await ask_yes_no(output, question)
