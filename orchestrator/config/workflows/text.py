"""Write phases as YAML, and a workflow as files for a user to edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final

import yaml

from orchestrator.config.workflows.templates import SUFFIX, read_builtin_template, template_for
from orchestrator.domain.settings.fields import TO_FILE
from orchestrator.domain.settings.phase_settings import Phase, PhaseSettings

_WIDTH: Final = 110


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
