"""The command that writes a first file."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread
import click

from orchestrator.cli.core.command import Context, json_option, perform
from orchestrator.cli.core.run_source import FILE_NAME
from orchestrator.cli.render.output import Output, plain
from orchestrator.config.json_schema import file_schema
from orchestrator.config.load import load_config
from orchestrator.config.permissions import requests_of
from orchestrator.config.starter import Starter, StarterAdapter, starter_text
from orchestrator.engine.diagnostics.findings import describe
from orchestrator.engine.diagnostics.initialization import (
    FoundTests,
    Ground,
    check_free,
    find_adapters,
    find_ground,
    find_tests,
    write_file,
    write_schema,
)
from orchestrator.engine.diagnostics.programs import AdapterStatus
from orchestrator.engine.diagnostics.test_detection import Environment, OwnTests
from orchestrator.engine.diagnostics.trust import confirm
from orchestrator.plugins import load_plugins
from orchestrator.protocols import AdapterType


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--adapter", metavar="TYPE", help="Use this adapter type, as `council adapters` lists it.")
@click.option("--force", is_flag=True, help="Replace the file if it is there already.")
@json_option
def init(file: Path | None, adapter: str | None, force: bool, as_json: bool) -> None:
    """Write a council.yaml for this repository.

    It has the adapters whose programs are found here, the command that runs the repository's own tests, and a task to
    begin with. It stands at the top of the repository, unless FILE says otherwise.

    \b
    Examples:
      council init
      council init --adapter aider
      council init night.yaml --force
    """

    async def command(context: Context) -> int:
        ground = await find_ground(Path.cwd(), os.environ)
        path = ground.top / FILE_NAME if file is None else Path.cwd() / file
        await anyio.to_thread.run_sync(lambda: check_free(path, force=force))
        plugins = await anyio.to_thread.run_sync(load_plugins, os.environ, [ground.top])
        found = _Found(
            ground,
            path,
            await find_adapters(plugins.adapters, adapter, os.environ),
            await find_tests(ground, os.environ),
        )
        schema = await _schema(ground, plugins.adapters)
        text = starter_text(_starter(found, schema))
        await anyio.to_thread.run_sync(lambda: write_file(path, text, plugins.adapters, force=force))
        config = await anyio.to_thread.run_sync(load_config, path, plugins.adapters)
        await confirm(path, requests_of(config, ground.top), os.environ)  # it was written here, for the user
        _show(found, schema, context.output)
        return 0

    perform(command, as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Found:
    ground: Ground
    path: Path
    adapters: Mapping[str, AdapterStatus]
    tests: FoundTests | None

    @property
    def own_tests(self) -> OwnTests | None:
        """The repository's own tests."""
        return None if self.tests is None else self.tests.tests

    @property
    def environment(self) -> Environment | None:
        """What they need before they can run."""
        return None if self.own_tests is None else self.own_tests.environment

    @property
    def what_is_missing(self) -> str | None:
        """What the sandbox does not show of that, in words."""
        missing = () if self.tests is None else self.tests.missing
        return f"the sandbox lacks {', '.join(missing)}" if missing else None

    @property
    def next_commands(self) -> list[str]:
        """What to type next; the file need not be named where it is looked for."""
        is_usual = self.path == self.ground.top / FILE_NAME
        name = "" if is_usual else f" {shlex.quote(os.path.relpath(self.path))}"
        return [f"council doctor{name}", f"council run --dry-run{name}", f"council run{name}"]


async def _schema(ground: Ground, types: Mapping[str, AdapterType]) -> Path | None:
    return await write_schema(ground, json.dumps(file_schema(types), indent=2) + "\n", os.environ)


def _starter(found: _Found, schema: Path | None) -> Starter:
    """Return what the file is to say; paths in the repository are told from the file's place."""
    folder, top = Path(os.path.realpath(found.path.parent)), Path(os.path.realpath(found.ground.top))
    is_inside = folder.is_relative_to(top)
    tests, environment = found.own_tests, found.environment
    return Starter(
        repo=os.path.relpath(top, folder) if is_inside else str(top),
        base=found.ground.base,
        adapters=[StarterAdapter(name, _words(status)) for name, status in found.adapters.items()],
        check=None if tests is None else tests.command,
        before=None if tests is None else tests.before,
        setup=None if environment is None else environment.setup,
        inputs=() if environment is None else environment.inputs,
        missing=found.what_is_missing,
        schema=None if schema is None or not is_inside else os.path.relpath(os.path.realpath(schema), folder),
    )


def _words(status: AdapterStatus) -> str:
    told = [f"{one.name} {one.version or ''}".strip() + (f": {one.remedy}" if one.remedy else "")
            for one in status.programs]  # fmt: skip
    return ", ".join(told)


def _show(found: _Found, schema: Path | None, output: Output) -> None:
    tests, environment, missing = found.own_tests, found.environment, found.what_is_missing
    if output.as_json:
        output.json(
            {
                "path": str(found.path),
                "repository": str(found.ground.top),
                "base": found.ground.base,
                "adapters": [{"use": name, **status.to_json()} for name, status in found.adapters.items()],
                "checks": [] if tests is None or missing is not None else [tests.command],
                "setup": [] if environment is None or missing is not None else [environment.setup],
                "missing": [] if found.tests is None else list(found.tests.missing),
                "told_by": None if tests is None else tests.told_by,
                "schema": None if schema is None else str(schema),
                "next": found.next_commands,
                "exit": 0,
            }
        )
        return
    lines = [f"wrote {found.path}", f"base      {found.ground.base}"]
    for name, status in found.adapters.items():
        lines.append(f"adapter   {name}: {'; '.join(map(describe, status.programs)) or 'names no program'}")
        lines += [f"          → {one.remedy}" for one in status.programs if one.remedy]
    if not found.adapters:
        lines.append("adapter   none was found: first put a program of yours into the file, where it says my-cli")
    told = "no command that runs the tests was found" if tests is None else f"{tests.command} (by {tests.told_by})"
    lines += [] if environment is None else [f"setup     {environment.setup}"]
    lines += [f"checks    {told}", *([] if missing is None else [f"          → commented out: {missing}"])]
    lines += [*(f"next      {command}" for command in found.next_commands)]
    for line in lines:
        output.text(plain(line) + "\n")
