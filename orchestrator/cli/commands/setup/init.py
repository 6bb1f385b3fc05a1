"""The command that writes a first `council.yaml`."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread
import click

from orchestrator.cli.core.command import CommandContext, async_command
from orchestrator.cli.core.run_source import CONFIG_FILE_NAME
from orchestrator.cli.render.text import printable
from orchestrator.config.json_schema import file_schema
from orchestrator.config.load import load_config
from orchestrator.config.permissions import list_permission_requests
from orchestrator.config.starter import Starter, StarterAdapter, starter_text
from orchestrator.engine.diagnostics.findings import describe
from orchestrator.engine.diagnostics.initialization import (
    InitRepository,
    check_can_write,
    find_adapters,
    find_init_repository,
    find_usable_tests,
    write_file,
    write_schema,
)
from orchestrator.engine.diagnostics.programs import AdapterStatus, ProgramStatus
from orchestrator.engine.diagnostics.test_detection import ProjectEnvironment, RepositoryTests
from orchestrator.engine.diagnostics.trust import confirm_requests
from orchestrator.errors import RefusedError
from orchestrator.plugins import load_plugins
from orchestrator.protocols import AdapterType, JsonObject


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--adapter", metavar="TYPE", help="Use this adapter type, as `council adapters` lists it.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@async_command()
async def init(context: CommandContext, file: Path | None, adapter: str | None, force: bool) -> None:
    """Write a council.yaml for this repository.

    The file has the adapters whose programs are found, the command that runs the tests of the repository, and a first
    task. Without FILE, writes council.yaml at the root of the repository.

    \b
    Examples:
      council init
      council init --adapter aider
      council init night.yaml --force
    """
    ground = await find_init_repository(Path.cwd(), os.environ)
    path = ground.top / CONFIG_FILE_NAME if file is None else Path.cwd() / file
    await anyio.to_thread.run_sync(lambda: check_can_write(path, force=force))
    plugins = await anyio.to_thread.run_sync(load_plugins, os.environ, [ground.top])
    found = _Discovery(
        ground,
        path,
        await find_adapters(plugins.adapters, adapter, os.environ),
        await find_usable_tests(ground, os.environ),
    )
    schema = await write_schema(ground, json.dumps(file_schema(plugins.adapters), indent=2) + "\n", os.environ)
    text = starter_text(_starter(found, schema, plugins.adapters))
    await anyio.to_thread.run_sync(lambda: write_file(path, text, plugins.adapters, force=force))
    config = await anyio.to_thread.run_sync(load_config, path, plugins.adapters)
    # The file was generated for the user, who need not confirm its permissions.
    try:
        await confirm_requests(path, list_permission_requests(config, ground.top), os.environ)
    except (RefusedError, OSError) as error:  # the file is written: a failed `init` would refuse to write it again
        context.output.notice(printable(f"the file is not confirmed, `council run` asks about it: {error}"))
    context.output.answer(lambda: _json(found, schema), _lines(found))


@dataclass(frozen=True, slots=True)
class _Discovery:
    ground: InitRepository
    path: Path
    adapters: Mapping[str, AdapterStatus]
    tests: RepositoryTests | None

    @property
    def environment(self) -> ProjectEnvironment | None:
        """The setup that the tests need."""
        return None if self.tests is None else self.tests.environment

    @property
    def missing_text(self) -> str | None:
        """The test programs that the sandbox hides, as text; None if it hides none."""
        missing = () if self.tests is None else self.tests.missing
        return f"the sandbox lacks {', '.join(missing)}" if missing else None

    @property
    def next_commands(self) -> list[str]:
        """The next commands; they omit the default file."""
        is_usual = self.path == self.ground.top / CONFIG_FILE_NAME
        name = "" if is_usual else f" {shlex.quote(os.path.relpath(self.path))}"
        return [f"council doctor{name}", f"council run --dry-run{name}", f"council run{name}"]


def _starter(found: _Discovery, schema: Path | None, types: Mapping[str, AdapterType]) -> Starter:
    """Return the contents of the file; its paths are relative to the file."""
    folder, top = Path(os.path.realpath(found.path.parent)), Path(os.path.realpath(found.ground.top))
    is_inside = folder.is_relative_to(top)
    tests, environment = found.tests, found.environment
    return Starter(
        repo=os.path.relpath(top, folder) if is_inside else str(top),
        base=found.ground.base,
        adapters=[StarterAdapter.of(name, _words(status), types[name]) for name, status in found.adapters.items()],
        check=None if tests is None else tests.command,
        before=None if tests is None else tests.before,
        setup=None if environment is None else environment.setup,
        inputs=() if environment is None else environment.inputs,
        missing=found.missing_text,
        schema=None if schema is None or not is_inside else os.path.relpath(os.path.realpath(schema), folder),
    )


def _words(status: AdapterStatus) -> str:
    return ", ".join(map(_describe, status.programs))


def _describe(program: ProgramStatus) -> str:
    facts = [program.remedy, "unverified" if program.verified == () else None]
    return ": ".join(filter(None, (f"{program.name} {program.version or ''}".strip(), *facts)))


def _json(found: _Discovery, schema: Path | None) -> JsonObject:
    tests, environment, missing = found.tests, found.environment, found.missing_text
    return {
        "path": str(found.path),
        "repository": str(found.ground.top),
        "base": found.ground.base,
        "adapters": [{"use": name, **status.to_json()} for name, status in found.adapters.items()],
        "checks": [] if tests is None or missing is not None else [tests.command],
        "setup": [] if environment is None or missing is not None else [environment.setup],
        "missing": [] if found.tests is None else list(found.tests.missing),
        "declared_in": None if tests is None else tests.declared_in,
        "schema": None if schema is None else str(schema),
        "next": found.next_commands,
        "exit": 0,
    }


def _lines(found: _Discovery) -> Iterator[str]:
    tests = found.tests
    yield f"wrote {found.path}"
    yield f"base      {found.ground.base}"
    for name, status in found.adapters.items():
        yield f"adapter   {name}: {'; '.join(map(describe, status.programs)) or 'no program'}"
        yield from (f"          → {one.remedy}" for one in status.programs if one.remedy)
    if not found.adapters:
        yield "adapter   my-cli, a placeholder: replace it in the file with your program"
    if found.environment is not None:
        yield f"setup     {found.environment.setup}"
    found_by = "none: no test command was found" if tests is None else f"{tests.command} (from {tests.declared_in})"
    yield f"checks    {found_by}"
    if found.missing_text is not None:
        yield f"          → commented out: {found.missing_text}"
    yield from (f"next      {command}" for command in found.next_commands)
