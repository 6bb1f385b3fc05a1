"""The command for values that the sessions of a run share."""

from __future__ import annotations

import sys
from typing import Any

import click

from orchestrator.api.council import Council
from orchestrator.cli.commands.sessions.session import click_parameter, command_help
from orchestrator.cli.core.command import (
    CommandContext,
    open_council,
    run_command,
    run_option,
    store_option,
    store_option_url,
)
from orchestrator.cli.core.group import SuggestingGroup
from orchestrator.cli.core.options import json_option, wants_json
from orchestrator.client import main as client
from orchestrator.client.commands import SESSION_COMMANDS, SessionCommand
from orchestrator.client.messages import format_result, strip_control_characters
from orchestrator.client.quick_parser import ParsedCommand
from orchestrator.client.session import SessionRequestError
from orchestrator.client.values import resolve_arguments
from orchestrator.engine.session_api.shared_values import DEFAULT_WAIT, require_new_value, require_value
from orchestrator.errors import RefusedError
from orchestrator.protocols import JsonObject


@click.group(cls=SuggestingGroup)
def share() -> None:
    """Share values between the sessions of a run.

    A program in a session acts as that session. Outside sessions, --run selects the run; default: the newest.

    \b
    Examples:
      council share list
      council share get api/port --run 20260102-030405-ab12
      council share put api/port 8080
    """


def _command(asked: SessionCommand) -> click.Command:
    def perform(run: str | None, **given: Any) -> None:
        words = {name: value for name, value in given.items() if value is not None}
        if run is None and store_option_url() is None and client.is_in_session():
            sys.exit(client.run_session_command(ParsedCommand(asked, words, as_json=wants_json())))
        run_command(lambda context: _perform_outside_session(context, asked, words, run))

    command = click.Command(
        asked.typed[-1], params=[*map(click_parameter, asked.arguments)], callback=perform, help=command_help(asked)
    )
    for option in (json_option, store_option, run_option):
        command = option(command)
    return command


async def _perform_outside_session(
    context: CommandContext, asked: SessionCommand, words: JsonObject, run: str | None
) -> None:
    try:
        arguments = resolve_arguments(asked, words)
    except SessionRequestError as error:
        raise RefusedError(error.message, error.remedy) from None
    async with open_council(context) as opened:
        result = await _result(opened.council, asked, arguments, run)
    if context.output.as_json:
        context.output.json({**result, "exit": 0})
    else:
        context.output.text(strip_control_characters(format_result(asked.name, result)))


async def _result(council: Council, asked: SessionCommand, arguments: JsonObject, run: str | None) -> JsonObject:
    shared = await council.sessions.shared_values(run)
    key = arguments.get("key", "")
    match asked.name:
        case "share_put":
            put = await shared.put(key, arguments["value"], if_version=arguments.get("if_version"))
            return {"key": put.key, "version": put.version}
        case "share_get":
            return require_value(key, await shared.get(key)).to_json()
        case "share_wait":
            timeout = arguments.get("timeout", DEFAULT_WAIT)
            return require_new_value(
                key, await shared.wait(key, after=arguments.get("after"), timeout=timeout), timeout
            ).to_json()
        case _:
            return {"shared": [one.to_json() for one in await shared.list(arguments.get("prefix", ""))]}


for _asked in SESSION_COMMANDS.values():
    if _asked.is_for_all:
        share.add_command(_command(_asked))
