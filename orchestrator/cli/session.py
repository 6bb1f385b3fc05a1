"""The commands that programs in a session type: their help, and what the quick way leaves to click.

Made of the table that the quick way reads too, so that both know the same words.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from orchestrator.client import main as client
from orchestrator.client.commands import COMMANDS, LONGEST_WAIT, PATHS, SECONDS, Argument, Asked
from orchestrator.client.words import Typed


def _parameter(argument: Argument) -> click.Parameter:
    kind: click.ParamType[Any] = click.STRING
    if argument.kind == SECONDS:
        kind = click.FloatRange(0, LONGEST_WAIT)
    elif argument.choices:
        kind = click.Choice(argument.choices)
    if argument.is_word:
        many = -1 if argument.kind == PATHS else 1
        return click.Argument([argument.name], type=kind, nargs=many, required=True, metavar=_word(argument))
    return click.Option(
        [argument.option, argument.name],
        type=kind,
        multiple=argument.kind == PATHS,
        help=f"{argument.help.removesuffix('.')}; may be repeated." if argument.kind == PATHS else argument.help,
        metavar=None if argument.choices else argument.metavar,
    )


def _word(argument: Argument) -> str:
    return f"{argument.metavar}..." if argument.kind == PATHS else argument.metavar


def _command(name: str) -> click.Command:
    asked = COMMANDS[name]

    def perform(as_json: bool, **given: Any) -> None:
        arguments = {key: [*value] if isinstance(value, tuple) else value for key, value in given.items()}
        said = {key: value for key, value in arguments.items() if value not in (None, [])}
        sys.exit(client.perform(Typed(asked, said, as_json=as_json)))

    as_json = click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object.")
    parameters = [*map(_parameter, asked.arguments), as_json]
    return click.Command(name, params=parameters, callback=perform, help=_help(asked))


def _help(asked: Asked) -> str:
    examples = "\n".join(f"  {line}" for line in asked.examples)
    where = "For programs that `council run` has started, in their worktree."
    return f"{asked.help}\n\n{asked.more} {where}\n\n\b\nExamples:\n{examples}"


lock, unlock, report, peers, note, notes, ask = map(_command, COMMANDS)
