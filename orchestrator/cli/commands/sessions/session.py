"""The session commands as click commands.

Click provides their help, and parses arguments that the fast parser rejects. Both parsers use the table in
`client.commands`.
"""

from __future__ import annotations

import sys
from math import isnan
from typing import Any

import click

from orchestrator.cli.core.options import json_option, wants_json
from orchestrator.client import main as client
from orchestrator.client import slot as slots
from orchestrator.client.commands import (
    MAX_VERSION,
    MAX_WAIT_SECONDS,
    OBJECT,
    PATHS,
    SECONDS,
    SESSION_COMMANDS,
    STANDARD_INPUT,
    VERSION,
    Argument,
    SessionCommand,
)
from orchestrator.client.quick_parser import ParsedCommand


class _Seconds(click.FloatRange):
    """Seconds within bounds; rejects `nan`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a number of seconds; fail with a usage error if it is out of bounds."""
        seconds = super().convert(value, param, ctx)
        if isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return seconds


def click_parameter(argument: Argument) -> click.Parameter:
    """Return the click parameter of an argument."""
    kind: click.ParamType[Any] = click.STRING
    if argument.kind == SECONDS:
        kind = _Seconds(0, MAX_WAIT_SECONDS)
    elif argument.kind == VERSION:
        kind = click.IntRange(0, MAX_VERSION)
    elif argument.choices:
        kind = click.Choice(argument.choices)
    if argument.is_word:
        many = -1 if argument.kind == PATHS else 1
        default = {"default": STANDARD_INPUT} if argument.kind == OBJECT else {}
        return click.Argument(
            [argument.name], type=kind, nargs=many, required=not default, metavar=_word(argument), **default
        )
    return click.Option(
        [argument.option, argument.name],
        type=kind,
        multiple=argument.kind == PATHS,
        help=f"{argument.help.removesuffix('.')}; repeatable." if argument.kind == PATHS else argument.help,
        metavar=None if argument.choices else argument.metavar,
    )


def _word(argument: Argument) -> str:
    if argument.kind == OBJECT:
        return f"[{argument.metavar}]"
    return f"{argument.metavar}..." if argument.kind == PATHS else argument.metavar


def _command(name: str) -> click.Command:
    asked = SESSION_COMMANDS[name]

    def perform(**given: Any) -> None:
        arguments = {key: [*value] if isinstance(value, tuple) else value for key, value in given.items()}
        said = {key: value for key, value in arguments.items() if value not in (None, [])}
        sys.exit(client.run_session_command(ParsedCommand(asked, said, as_json=wants_json())))

    parameters = [*map(click_parameter, asked.arguments)]
    return json_option(click.Command(asked.typed[-1], params=parameters, callback=perform, help=command_help(asked)))


def command_help(asked: SessionCommand) -> str:
    """Return the help of a command: summary, audience and examples."""
    examples = "\n".join(f"  {line}" for line in asked.examples)
    where = "" if asked.is_for_all else "For programs that `council run` starts, in their worktree."
    return f"{asked.help}\n\n{asked.more} {where}\n\n\b\nExamples:\n{examples}"


lock, unlock, report, peers, note, notes, ask, submit_handoff = (
    _command(name) for name, one in SESSION_COMMANDS.items() if not one.is_for_all
)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def slot(command: tuple[str, ...]) -> None:
    """Run a heavy command of this session in a slot for checks.

    At most `checks_capacity` checks and commands of sessions run at once; others wait for a slot. A session has one
    slot. The exit code is that of the command. For programs that `council run` starts, in their worktree.

    \b
    Examples:
      council slot -- make test
    """
    sys.exit(slots.run(command))
