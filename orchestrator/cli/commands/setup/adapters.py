"""The command that lists adapters and their programs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import anyio.to_thread
import click

from orchestrator.cli.commands.setup.adapter_test import test
from orchestrator.cli.core.adapter_state import AdapterState, read_adapter_state
from orchestrator.cli.core.command import (
    CommandContext,
    CouncilContext,
    async_command,
    council_command,
    run_option,
    store_option,
)
from orchestrator.cli.core.confirm import trust_option
from orchestrator.cli.core.group import SuggestingGroup
from orchestrator.cli.core.run_source import CommandEnvironment, discover_environment
from orchestrator.cli.render.text import one_line
from orchestrator.config.model import RunConfig, make_adapters
from orchestrator.engine.diagnostics.findings import describe
from orchestrator.engine.diagnostics.programs import AdapterStatus, make_default_adapters, probe_adapters
from orchestrator.engine.reports.report import AdapterReport
from orchestrator.errors import ConfigError, PluginFailed, plugin_code
from orchestrator.protocols import Adapter, JsonObject


@click.group(cls=SuggestingGroup, invoke_without_command=True)
@store_option
@trust_option
@async_command()
async def adapters(context: CommandContext) -> None:
    """List installed adapters with their programs, versions and logins.

    Also lists the adapters of council.yaml, in the current folder or at the root of the repository: their optional
    features and, from the newest run, whether they are available and their last failure.

    \b
    Examples:
      council adapters
      council adapters --json
      council adapters test claude
      council adapters enable claude
    """
    scene = await discover_environment()
    types, named = await _list(scene)
    known = await read_adapter_state(context) if scene.top is not None or named else AdapterState()
    context.output.answer(lambda: _json(scene, types, named, known), _lines(scene, types, named, known))


adapters.add_command(test)


@dataclass(frozen=True, slots=True)
class _AdapterEntry:
    """An adapter type, or an adapter of the file.

    `missing_options` describes the missing options, which prevent an inspection.
    """

    name: str
    use: str
    missing_options: str | None
    status: AdapterStatus
    can: Sequence[str] = ()


async def _list(scene: CommandEnvironment) -> tuple[list[_AdapterEntry], list[_AdapterEntry]]:
    """Return all installed types, and the adapters of the file."""
    installed = scene.plugins.adapters
    made, missing = await anyio.to_thread.run_sync(make_default_adapters, installed)
    run = scene.config if isinstance(scene.config, RunConfig) else None
    of_file = {} if run is None else make_adapters(run.adapters, installed)
    # A type and an adapter of the file may have the same name.
    both = {(True, name): one for name, one in made.items()} | {(False, name): one for name, one in of_file.items()}
    statuses = await probe_adapters(both, os.environ)
    nothing = AdapterStatus([])
    types = [
        _AdapterEntry(name, name, missing.get(name), statuses.get((True, name), nothing)) for name in sorted(installed)
    ]
    named = run.adapters.items() if run is not None else ()
    listed = [
        _AdapterEntry(name, one.use, None, statuses[False, name], _capabilities(of_file[name])) for name, one in named
    ]
    return types, listed


def _capabilities(adapter: Adapter) -> list[str]:
    try:
        with plugin_code():
            return sorted(adapter.capabilities())
    except PluginFailed as failed:
        return [f"can't be inspected: {failed}"]


def _json(
    scene: CommandEnvironment, types: Sequence[_AdapterEntry], named: Sequence[_AdapterEntry], known: AdapterState
) -> JsonObject:
    nothing = AdapterReport("", None, None)
    state = {one.name: known.unusable.get(one.name, nothing) for one in named}
    return {
        "types": [
            {
                "name": one.name,
                "plugin": asdict(scene.plugins.providers["adapters", one.name]),
                "missing_options": one.missing_options,
                **one.status.to_json(),
            }
            for one in types
        ],
        "skipped": [str(one) for one in scene.plugins.left_out],
        "file": None if scene.file is None else str(scene.file),
        "error_count": len(scene.config.problems) if isinstance(scene.config, ConfigError) else 0,
        "adapters": [
            {
                "name": one.name,
                "use": one.use,
                **one.status.to_json(),
                "cooldown_until": state[one.name].cooldown_until,
                "disabled_reason": state[one.name].disabled_reason,
                "capabilities": list(one.can),
                "last_failure": asdict(known.failed[one.name]) if one.name in known.failed else None,
            }
            for one in named
        ],
        "exit": 0,
    }


def _lines(
    scene: CommandEnvironment, types: Sequence[_AdapterEntry], named: Sequence[_AdapterEntry], known: AdapterState
) -> Iterator[str]:
    for one in types:
        plugin = scene.plugins.providers["adapters", one.name]
        yield f"{one.name} ({plugin.origin}{_doubt(one)}){_missing_options(one)}"
        yield from _programs(one.status)
    for left_out in scene.plugins.left_out:
        yield f"skipped: {one_line(str(left_out))}"
    if isinstance(scene.config, ConfigError):
        yield f"{scene.file} has errors: `council validate` lists them"
    for one in named:
        yield f"{one.name} (use: {one.use}, of {scene.file})"
        yield from _programs(one.status)
        yield f"  features: {one_line(', '.join(one.can)) or 'none'}"
        yield from (f"  {line}" for line in known.lines(one.name))


def _doubt(one: _AdapterEntry) -> str:
    """Return the mark of a type that was written from documentation only."""
    return ", unverified" if any(program.verified == () for program in one.status.programs) else ""


def _missing_options(one: _AdapterEntry) -> str:
    return "" if one.missing_options is None else f": {one_line(one.missing_options)}"


def _programs(status: AdapterStatus) -> Iterator[str]:
    if status.error is not None:
        yield f"  {one_line(status.error)}"
    for program in status.programs:
        yield f"  {one_line(describe(program))}"
        if program.is_supported is False:
            yield f"    supported versions: {program.supported}"
        if program.remedy is not None:
            yield f"    → {one_line(program.remedy)}"


@adapters.command()
@click.argument("names", metavar="[ADAPTER]...", nargs=-1)
@run_option
@council_command()
async def enable(context: CouncilContext, names: tuple[str, ...], run: str | None) -> int:
    """Enable adapters that a run has disabled or paused.

    Run it, for example, after you have logged in or bought credit. Without ADAPTER, enables all of them. An active run
    starts their tasks immediately; otherwise run `council resume`. A key in an environment variable of an active
    process can't be changed: stop that process and resume the run.

    \b
    Examples:
      council adapters enable claude
      council adapters enable --run 20260102-030405-ab12
    """
    report = await context.council.runs.enable_adapters(*names, run=run)
    return await context.show_result(report, code=0)
