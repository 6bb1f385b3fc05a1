"""Commands for workflows: what there is already, to look at or to copy and change."""

from __future__ import annotations

from pathlib import Path

import anyio.to_thread
import click

from orchestrator.cli.core.command import CommandContext, json_option, run_command
from orchestrator.cli.core.group import SuggestingGroup
from orchestrator.cli.core.run_source import load_run_config
from orchestrator.cli.render.text import printable
from orchestrator.config.source.problems import KnownWords
from orchestrator.config.workflows.load import Phases, builtin_phases
from orchestrator.config.workflows.text import build_workflow_files, phase_settings, workflows_to_yaml
from orchestrator.engine.diagnostics.initialization import check_can_write
from orchestrator.errors import RefusedError, to_unusable_error

_file_option = click.option(
    "--file", "file", type=click.Path(path_type=Path), help="Those that tasks of this file go through, too."
)


@click.group(cls=SuggestingGroup)
def workflow() -> None:
    """Show the workflows that there are, or copy one to change it.

    A workflow is a list of phases, each a session of its own that hands its result to the next. A task goes through the
    one that it names by `workflow:`.

    \b
    Examples:
      council workflow show adw
      council workflow copy adw workflows
    """


@workflow.command()
@click.argument("name", required=False)
@_file_option
@json_option
def show(name: str | None, file: Path | None, as_json: bool) -> None:
    """Print the workflow NAME, or all that there are, as a file has it.

    What its sessions are told is left out where it is what phases of their kind are told; `council workflow copy`
    writes that, too.

    \b
    Examples:
      council workflow show
      council workflow show mine --file council.yaml --json
    """

    async def command(context: CommandContext) -> int:
        found = await _find(name, file)
        if context.output.as_json:
            told = {one: [{"name": each.name, **phase_settings(each, phases)} for each in phases]
                    for one, phases in found.items()}  # fmt: skip
            context.output.json({"workflows": told, "exit": 0})
        else:
            context.output.text(workflows_to_yaml(found))
        return 0

    run_command(command, as_json=as_json)


@workflow.command()
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@_file_option
@click.option("--force", is_flag=True, help="Replace files that are there already.")
@json_option
def copy(name: str, folder: Path, file: Path | None, force: bool, as_json: bool) -> None:
    """Write the workflow NAME and its templates into FOLDER, for you to change.

    Put what NAME.yaml says into your council.yaml. Its paths are right where FOLDER was named from the folder of that
    file.

    \b
    Examples:
      council workflow copy adw workflows
    """

    async def command(context: CommandContext) -> int:
        phases = (await _find(name, file))[name]
        files = {Path(path): text for path, text in build_workflow_files(name, phases, folder).items()}
        await anyio.to_thread.run_sync(lambda: _write(folder, files, force=force))
        if context.output.as_json:
            context.output.json({"workflow": name, "files": [*map(str, files)], "exit": 0})
        else:
            for path in files:
                context.output.text(printable(f"wrote {path}") + "\n")
        return 0

    run_command(command, as_json=as_json)


async def _find(name: str | None, file: Path | None) -> dict[str, Phases]:
    """Return a workflow, or all, by name; RefusedError without one of that name."""
    found = dict(await anyio.to_thread.run_sync(builtin_phases))
    if file is not None:
        _, config = await load_run_config(file)
        found |= config.workflows
    if name is None:
        return found
    if name not in found:
        remedy = KnownWords(found, "the workflows").suggest(name)
        if file is None:
            remedy += "; --file names a file with others"
        raise RefusedError(f"there is no workflow {name!r}", remedy)
    return {name: found[name]}


def _write(folder: Path, files: dict[Path, str], *, force: bool) -> None:
    """Write files into a folder, or none of them where one can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in files:
            check_can_write(path, force=force)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise to_unusable_error(error, f"{folder} can't be written", "name another folder") from None
