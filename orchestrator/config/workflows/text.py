"""Phases written down again as a file has them, and the files of a workflow that is copied to be changed. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final

import yaml

from orchestrator.config.schema import PhaseSettings
from orchestrator.config.source.quantities import format_duration
from orchestrator.config.workflows.templates import SUFFIX, read_builtin_template, template_for
from orchestrator.domain.workflow.routing import Phase

_WIDTH: Final = 110
_AS_IT_IS: Final = Phase(name="")
_SAME: Final = ("adapter", "context", "when", "approve", "transform", "mediator", "key", "on_reject", "max_rounds")
_LISTS: Final = ("fallback", "needs", "until")


def workflows_to_yaml(workflows: Mapping[str, Sequence[Phase]], prompts: Mapping[str, str] | None = None) -> str:
    """Return the section `workflows:` of a file that says the same.

    `prompts` has the path of a phase's template by its name, for those that have theirs in a file; what a phase is told
    unless something else is written is left out.
    """
    told = {
        name: [{phase.name: phase_settings(phase, phases, (prompts or {}).get(phase.name))} for phase in phases]
        for name, phases in workflows.items()
    }
    text: str = yaml.dump(
        {"workflows": told}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH, default_flow_style=False
    )
    return text


def phase_settings(phase: Phase, phases: Sequence[Phase], prompt_file: str | None = None) -> dict[str, Any]:
    """Return what a file says of a phase of a workflow, without what holds unless it says otherwise."""
    told = {key: getattr(phase, key) for key in _SAME if getattr(phase, key) != getattr(_AS_IT_IS, key)}
    told |= {key: [*getattr(phase, key)] for key in _LISTS if getattr(phase, key) != getattr(_AS_IT_IS, key)}
    if not phase.writes:
        told["access"] = "read"
    if phase.produces is not None:
        has_schema = phase.schema_ is not None
        told["produces"] = {"kind": phase.produces, "schema": phase.schema_} if has_schema else phase.produces
    if prompt_file is not None:
        told["prompt_file"] = prompt_file
    elif phase.prompt not in {None, read_builtin_template(template_for(phase.name, phase.produces))}:
        told["prompt"] = phase.prompt
    if phase.continues is not None:
        earlier = phases[phases.index(phase) - 1].name
        told["session"] = "continue" if phase.continues == earlier else {"continue": phase.continues}
    if phase.handoff != "direct":
        told["handoff"] = phase.handoff
    if phase.expand is not None:
        workflow = {} if phase.expand.workflow is None else {"workflow": phase.expand.workflow}
        told["expand"] = {"max": phase.expand.most, **workflow}
    if phase.timeout is not None:
        told["timeout"] = format_duration(phase.timeout)
    return {key: told[key] for key in PhaseSettings.model_fields if key in told}


def build_workflow_files(name: str, phases: Sequence[Phase], folder: PurePath) -> dict[PurePath, str]:
    """Return the files that hold a workflow and its templates, by their paths in `folder`."""
    templates = {phase.name: folder / f"{phase.name}{SUFFIX}" for phase in phases}
    head = f"# Put this into the council.yaml that the paths start from. A task names it: `workflow: {name}`.\n"
    text = head + workflows_to_yaml({name: phases}, {phase: path.as_posix() for phase, path in templates.items()})
    files = {templates[phase.name]: phase.prompt or "{{ task.prompt }}\n" for phase in phases}
    return {folder / f"{name}.yaml": text, **files}


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002, FBT  the same
        """Put the items of a list behind its key."""
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  the library's signature
        """Write everything in full: a file has no aliases."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
