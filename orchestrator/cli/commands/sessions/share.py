"""`council share`: what the sessions of a run share, from within one of them or by hand."""

from __future__ import annotations

import sys
from typing import Any

import click

from orchestrator.api.council import Council
from orchestrator.cli.commands.sessions.session import help_of, parameter
from orchestrator.cli.core.command import Context, chosen_store, json_option, opened, perform, run_option, store_option
from orchestrator.cli.core.group import Suggesting
from orchestrator.client import main as client
from orchestrator.client.commands import COMMANDS, Asked
from orchestrator.client.messages import clean, tell
from orchestrator.client.quick_parser import Typed
from orchestrator.client.session import AskError
from orchestrator.client.values import given
from orchestrator.engine.session_api.shared_values import PATIENCE, come, had
from orchestrator.errors import RefusedError
from orchestrator.protocols import JsonObject


@click.group(cls=Suggesting)
def share() -> None:
    """Share values between the sessions of a run, or look at them.

    A program in a session asks as that session; anybody else names the run with --run, or means the newest.

    \b
    Examples:
      council share list
      council share get api/port --run 20260102-030405-ab12
      council share put api/port 8080
    """


def _command(asked: Asked) -> click.Command:
    def perform_it(as_json: bool, run: str | None, **given: Any) -> None:
        said = {name: value for name, value in given.items() if value is not None}
        if run is None and chosen_store() is None and client.is_in_session():
            sys.exit(client.perform(Typed(asked, said, as_json=as_json)))
        by_hand(asked, said, run, as_json=as_json)

    command = click.Command(
        asked.typed[-1], params=[*map(parameter, asked.arguments)], callback=perform_it, help=help_of(asked)
    )
    for option in (json_option, store_option, run_option):
        command = option(command)
    return command


def by_hand(asked: Asked, words: JsonObject, run: str | None, *, as_json: bool) -> None:
    """Do what a command asks outside of sessions, print what comes of it, and exit."""

    async def command(context: Context) -> int:
        try:
            arguments = given(asked, words)
        except AskError as error:
            raise RefusedError(error.what, error.remedy) from None
        async with opened(context.log) as council:
            result = await _result(council, asked, arguments, run)
        if as_json:
            context.output.json({**result, "exit": 0})
        else:
            context.output.text(clean(tell(asked.name, result)))
        return 0

    perform(command, as_json=as_json)


async def _result(council: Council, asked: Asked, arguments: JsonObject, run: str | None) -> JsonObject:
    shared = await council.sharing(run)
    key = arguments.get("key", "")
    match asked.name:
        case "share_put":
            put = await shared.put(key, arguments["value"], if_version=arguments.get("if_version"))
            return {"key": put.key, "version": put.version}
        case "share_get":
            return had(key, await shared.get(key)).to_json()
        case "share_wait":
            timeout = arguments.get("timeout", PATIENCE)
            return come(key, await shared.wait(key, after=arguments.get("after"), timeout=timeout), timeout).to_json()
        case _:
            return {"shared": [one.to_json() for one in await shared.list(arguments.get("prefix", ""))]}


for _asked in COMMANDS.values():
    if _asked.is_for_all:
        share.add_command(_command(_asked))
