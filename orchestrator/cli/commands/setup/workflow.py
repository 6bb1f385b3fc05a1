"""Commands that show workflows and copy them to edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Final

import anyio.to_thread
import click
import yaml

from orchestrator.cli.core.command import CommandContext, async_command
from orchestrator.cli.core.group import SuggestingGroup
from orchestrator.cli.core.run_source import load_run_config
from orchestrator.config.workflows.load import Phases, builtin_phases
from orchestrator.config.workflows.templates import SUFFIX, read_builtin_template, template_for
from orchestrator.domain.settings.fields import TO_FILE
from orchestrator.domain.settings.phase_settings import Phase, PhaseSettings
from orchestrator.domain.wording import suggest
from orchestrator.engine.diagnostics.initialization import check_can_write
from orchestrator.errors import RefusedError, to_unusable_error

_file_option = click.option(
    "--file", "file", type=click.Path(path_type=Path), help="Also show the workflows of this file."
)
_WIDTH: Final = 110


@click.group(cls=SuggestingGroup)
def workflow() -> None:
    """Show workflows, or copy one to edit it.

    A workflow is a list of phases. Each phase runs in its own session and passes its result to the next one. A task
    names its workflow with `workflow:`.

    \b
    Examples:
      council workflow show adw
      council workflow copy adw workflows
    """


@workflow.command()
@click.argument("name", required=False)
@_file_option
@async_command()
async def show(context: CommandContext, name: str | None, file: Path | None) -> None:
    """Print the workflow NAME, or all, as in the file.

    Omits the default prompts of phases, which `council workflow copy` includes.

    \b
    Examples:
      council workflow show
      council workflow show mine --file council.yaml --json
    """
    found = await _find(name, file)
    if context.output.as_json:
        listed = {one: [{"name": each.name, **phase_settings(each, phases)} for each in phases]
                  for one, phases in found.items()}  # fmt: skip
        context.output.json({"workflows": listed, "exit": 0})
    else:
        context.output.text(workflows_to_yaml(found))


@workflow.command()
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@_file_option
@click.option("--force", is_flag=True, help="Replace existing files.")
@async_command()
async def copy(context: CommandContext, name: str, folder: Path, file: Path | None, force: bool) -> None:
    """Copy the workflow NAME and its templates into FOLDER.

    Copy the contents of NAME.yaml into your council.yaml. Its paths are relative to the current folder: run the command
    in the folder of council.yaml.

    \b
    Examples:
      council workflow copy adw workflows
    """
    phases = (await _find(name, file))[name]
    files = {Path(path): text for path, text in build_workflow_files(name, phases, folder).items()}
    await anyio.to_thread.run_sync(lambda: _write(folder, files, force=force))
    facts = {"workflow": name, "files": [*map(str, files)], "exit": 0}
    context.output.answer(lambda: facts, (f"wrote {path}" for path in files))


async def _find(name: str | None, file: Path | None) -> dict[str, Phases]:
    """Return the phases of one workflow or of all, by name.

    Raises RefusedError if the name is unknown.
    """
    found = dict(await anyio.to_thread.run_sync(builtin_phases))
    if file is not None:
        _, config = await load_run_config(file)
        found |= config.workflows
    if name is None:
        return found
    if name not in found:
        remedy = suggest(name, found, "the workflows")
        if file is None:
            remedy += "; --file adds the workflows of a file"
        raise RefusedError(f"there is no workflow {name!r}", remedy)
    return {name: found[name]}


def _write(folder: Path, files: dict[Path, str], *, force: bool) -> None:
    """Write files into a folder: all of them, or none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in files:
            check_can_write(path, force=force)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise to_unusable_error(error, f"{folder} can't be written", "use another folder") from None


def workflows_to_yaml(workflows: Mapping[str, Sequence[Phase]], prompts: Mapping[str, str] | None = None) -> str:
    """Return the section `workflows:` for these workflows, without default values.

    `prompts` has the path of the template by phase name, for phases with a template file.
    """
    section = {
        name: [{phase.name: phase_settings(phase, phases, (prompts or {}).get(phase.name))} for phase in phases]
        for name, phases in workflows.items()
    }
    text: str = yaml.dump(
        {"workflows": section},
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=_WIDTH,
        default_flow_style=False,
    )
    return text


def phase_settings(phase: Phase, phases: Sequence[Phase], prompt_file: str | None = None) -> dict[str, Any]:
    """Return the keys of a phase for a config file, without default values."""
    keys = phase.model_dump(mode="json", exclude_defaults=True, exclude={"name"}, context=TO_FILE)
    if phase.produces is not None and phase.produces.schema_ is None:
        keys["produces"] = phase.produces.kind
    if phase.continues is not None and phase.continues == phases[phases.index(phase) - 1].name:
        keys["session"] = "continue"
    if phase.expand is not None:
        keys["expand"] = keys["expand"] or True
    if prompt_file is not None:
        keys |= {"prompt": None, "prompt_file": prompt_file}
    elif phase.prompt == read_builtin_template(template_for(phase.name, phase.kind)):
        del keys["prompt"]
    return {key: keys[key] for key in PhaseSettings.model_fields if keys.get(key) is not None}


def build_workflow_files(name: str, phases: Sequence[Phase], folder: PurePath) -> dict[PurePath, str]:
    """Return the files for a workflow and its templates, by their paths in `folder`."""
    templates = {phase.name: folder / f"{phase.name}{SUFFIX}" for phase in phases}
    head = f"# Copy this into the council.yaml to which the paths are relative. Use it with `workflow: {name}`.\n"
    text = head + workflows_to_yaml({name: phases}, {phase: path.as_posix() for phase, path in templates.items()})
    files = {templates[phase.name]: phase.prompt or "{{ task.prompt }}\n" for phase in phases}
    return {folder / f"{name}.yaml": text, **files}


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002, FBT  as in PyYAML
        """Indent the items of a list."""
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  as in PyYAML
        """Return True, to write repeated values in full: config files have no aliases."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
