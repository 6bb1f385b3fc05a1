"""The `council` commands in printed text, as a user copies them."""

from __future__ import annotations

import re
import shlex

import click

from orchestrator.cli.main import main

_COMMANDS = re.compile(r"`council ([^`]*)`|^ *(?:Next|next|then|or): council (.*)$", re.MULTILINE)


def printed_commands(text: str) -> list[list[str]]:
    """Return the arguments of the commands in backticks and of next steps."""
    return [shlex.split(quoted or step) for quoted, step in _COMMANDS.findall(text)]


def check_syntax(arguments: list[str]) -> None:
    """Parse a command without executing it. Raises UsageError."""
    context = click.Context(main, info_name="council")
    command: click.Command = main
    while isinstance(command, click.Group):
        name, found, arguments = command.resolve_command(context, arguments)
        assert found is not None
        command = found
        context = click.Context(command, info_name=name, parent=context)
    command.parse_args(context, list(arguments))
