"""Read and validate the workflows of a file, and resolve them to complete phases."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from orchestrator.config.entries import Extensions
from orchestrator.config.references import iter_items, iter_task_nodes, reject_secret
from orchestrator.config.source.document import UNREADABLE, Node, read_document
from orchestrator.config.source.files import read_prompt
from orchestrator.config.source.problems import Problems
from orchestrator.config.source.validation import reject_empty_keys, validate
from orchestrator.config.workflows.phase_checks import (
    KnownNames,
    PhaseNode,
    check_keys,
    check_order,
    find_continued_phase,
)
from orchestrator.config.workflows.templates import (
    compile_condition,
    compile_template,
    read_builtin_file,
    read_builtin_template,
    template_for,
)
from orchestrator.domain.scheduling.dependencies import find_cycles
from orchestrator.domain.settings.fields import MAX_CONTEXT_BYTES, NO_WORKFLOW
from orchestrator.domain.settings.phase_settings import Phase, PhaseSettings
from orchestrator.domain.wording import quote_text, suggest
from orchestrator.domain.workflow.handoff_kinds import HANDOFF_KINDS, check_schema
from orchestrator.domain.workflow.mediation import TRANSFORMATIONS
from orchestrator.errors import InvalidValue, RefusedError

_ENV: Final = "the adapter's `env`"

T = TypeVar("T")
Phases = tuple[Phase, ...]


@functools.cache
def builtin_workflows() -> Mapping[str, Node]:
    """Return the built-in workflows by name, as written."""
    problems = Problems("workflows.yaml")
    root = read_document(read_builtin_file("workflows.yaml"), problems)
    found = None if root is None else root.get("workflows")
    if found is None or problems:
        raise problems.error()
    return {str(name): node for name, node in found.children.items()}


def builtin_phases() -> Mapping[str, Phases]:
    """Return the phases of the built-in workflows by name."""
    problems = Problems("workflows.yaml")
    written = builtin_workflows()
    names = KnownNames(tuple(HANDOFF_KINDS), tuple(TRANSFORMATIONS), written)
    return {name: _read(node, Path(), names, problems) for name, node in written.items()}


def read_workflows(root: Node, folder: Path, extensions: Extensions, problems: Problems) -> dict[str, Phases]:
    """Return workflows that tasks, or their plans' tasks, use; report all errors."""
    section = root.get("workflows")
    own = {} if section is None else {str(name): node for name, node in section.children.items()}
    named = dict.fromkeys(node.value for node in _named(root))
    if not own and not named:
        return {}
    written = {**builtin_workflows(), **own}
    _check_named(root, written, problems)
    names = KnownNames(extensions.kinds, extensions.transformations, written)
    read = {name: _read(node, folder, names, problems) for name, node in own.items()}
    found: dict[str, Phases] = {}
    waiting = [name for name in named if name in written]
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = read[name] if name in read else _read(written[name], folder, names, problems)
            waiting += (one for one in _expanded(found[name]) if one in written)
    _check_expansions({**read, **found}, written, problems)
    return found


def _check_expansions(found: Mapping[str, Phases], written: Mapping[str, Node], problems: Problems) -> None:
    """Report workflows with plans for the same workflow, which would never end."""
    for cycle in find_cycles({name: tuple(_expanded(phases)) for name, phases in found.items()}):
        begin = min(cycle, key=list(found).index)
        start = cycle.index(begin)
        steps = " -> ".join([*cycle[start:], *cycle[:start], begin])
        message = f"plans of this workflow would expand endlessly: {steps}"
        problems.add(written[begin].at, message, "use another workflow under `expand:`, or none")


def workflow_of(task: Node, root: Node) -> str | None:
    """Return a task's workflow name, even if it does not exist; None if it has none.

    If `task` is the file itself, return the default workflow.
    """
    named = task.get("workflow") or root.get("defaults", "workflow")
    return named.value if named is not None and isinstance(named.value, str) and named.value != NO_WORKFLOW else None


def iter_phase_nodes(workflow: Node) -> Iterator[PhaseNode]:
    """Yield each phase with a readable name."""
    for item in iter_items(workflow):
        if isinstance(item.value, str):
            yield PhaseNode(item.value, item.at, Node(item.at, {}), PhaseSettings())
        elif isinstance(item.value, dict) and len(item.value) == 1:
            name, node = next(iter(item.children.items()))
            if isinstance(name, str) and isinstance(node.value, dict):
                yield PhaseNode(name, item.keys[name], node, _valid_settings(node))


def _valid_settings(node: Node) -> PhaseSettings | None:
    """Return a phase's settings without invalid keys; None if invalid.

    Schema validation reports the invalid keys.
    """
    settings = validate(PhaseSettings, node, Problems(""))
    if settings is not None or not isinstance(node.value, dict):
        return settings
    alone = {key: node._replace(value={key: node.value[key]}, children={key: node.children[key]}) for key in node.value}
    valid = {key for key, one in alone.items() if validate(PhaseSettings, one, Problems("")) is not None}
    rest = {key: node.value[key] for key in node.value if key in valid}
    children = {key: one for key, one in node.children.items() if key in valid}
    return validate(PhaseSettings, node._replace(value=rest, children=children), Problems(""))


def check_contexts(root: Node, problems: Problems) -> None:
    """Report values for tasks without phases, and keys of secrets that are recorded."""
    for _, task in iter_task_nodes(root):
        context = task.get("context")
        if context is not None and workflow_of(task, root) is None:
            message = "the task has values for the phases of a workflow, but no workflow"
            problems.add(task.keys["context"], message, "add `workflow:`, or put the values into the prompt")
        _reject_secrets(context, "context", problems)
    _reject_secrets(root.get("context"), "context", problems)


def _named(root: Node) -> Iterator[Node]:
    """Yield each name of a workflow that tasks use."""
    for entry in (root.get("defaults"), *(task for _, task in iter_task_nodes(root))):
        named = None if entry is None else entry.get("workflow")
        if named is not None and isinstance(named.value, str) and named.value != NO_WORKFLOW:
            yield named


def _check_named(root: Node, written: Mapping[str, Node], problems: Problems) -> None:
    names = [*written, NO_WORKFLOW]
    for named in _named(root):
        if named.value not in written:
            problems.add(
                named.at,
                f"there is no workflow {quote_text(named.value)}",
                suggest(named.value, names, "the workflows"),
            )


def _expanded(phases: Phases) -> Iterator[str]:
    yield from (one.expand.workflow for one in phases if one.expand is not None and one.expand.workflow is not None)


def _read(workflow: Node, folder: Path, names: KnownNames, problems: Problems) -> Phases:
    written = list(iter_phase_nodes(workflow))
    check_order(written, problems)
    found = []
    for index, phase in enumerate(written):
        reject_empty_keys(phase.node, problems)
        check_keys(phase, names, problems)
        _reject_secrets(phase.node.get("context"), "context", problems)
        _reject_secrets(phase.node.get("until"), "command", problems)
        if phase.settings is not None:
            earlier = [each.name for each in written[:index]]
            found.append(_resolved(phase, phase.settings, earlier, folder, problems))
    return tuple(found)


def _resolved(
    phase: PhaseNode, settings: PhaseSettings, earlier: Sequence[str], folder: Path, problems: Problems
) -> Phase:
    produces, session = settings.produces, settings.session
    if settings.when is not None:
        _report_error(lambda: compile_condition(str(settings.when)), phase, "when", problems)
    if produces is not None:
        produces = produces.model_copy(update={"schema_": _schema(phase, produces.schema_, folder, problems)})
    if session is not None:
        session = session.model_copy(update={"continue_": find_continued_phase(settings, earlier)})
    resolved = {"produces": produces, "session": session, "prompt": _template(phase, settings, folder, problems)}
    return Phase.model_construct(**dict(settings) | resolved | {"name": phase.name, "prompt_file": None})


def _template(phase: PhaseNode, settings: PhaseSettings, folder: Path, problems: Problems) -> str | None:
    """Return the prompt template of a phase; None if it is invalid, which is reported."""
    key, text = "prompt", settings.prompt
    if text is None and settings.prompt_file is not None:
        key = "prompt_file"
        text = _report_error(lambda: read_prompt(folder / str(settings.prompt_file)), phase, key, problems)
    elif text is None:
        kind = None if settings.produces is None else settings.produces.kind
        return read_builtin_template(template_for(phase.name, kind))
    if text is None:
        return None
    reject_secret(phase.node.get(key) or phase.node, text, "prompt", _ENV, problems)
    _report_error(lambda: compile_template(text), phase, key, problems)
    return text


def _schema(
    phase: PhaseNode, written: str | Mapping[str, Any] | None, folder: Path, problems: Problems
) -> dict[str, Any] | None:
    """Return a phase's handoff schema; None if it has none or an invalid one.

    An invalid schema is reported.
    """
    if written is None:
        return None
    if not isinstance(written, str):
        found: Any = dict(written)
    else:
        text = _report_error(lambda: read_prompt(folder / written), phase, "produces", problems)
        found = None if text is None else _report_error(lambda: _json(written, text), phase, "produces", problems)
    if found is None:
        return None
    _report_error(lambda: _check_schema(found), phase, "produces", problems)
    return found if isinstance(found, dict) else None


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidValue(f"{quote_text(name)} is not JSON: {error}", "use a file with a JSON Schema") from error


def _check_schema(schema: Any) -> None:
    """Raise InvalidValue or RefusedError for a bad or too large object schema."""
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        message = "the schema does not describe an object, as every handoff is"
        raise InvalidValue(message, "use a schema such as {type: object, required: [answer]}")
    size = len(json.dumps(schema, ensure_ascii=False, default=str).encode())
    if size > MAX_CONTEXT_BYTES:
        raise InvalidValue(
            f"the schema has {size} bytes", f"limit it to {MAX_CONTEXT_BYTES}, because prompts contain it"
        )
    check_schema(schema)


def _report_error(read: Callable[[], T], phase: PhaseNode, key: str, problems: Problems) -> T | None:
    """Return the result of `read`, or None after reporting its error at a phase's key."""
    try:
        return read()
    except (RefusedError, InvalidValue) as error:
        problems.add(phase.at(key), error.message, error.remedy)
    return None


def _reject_secrets(node: Node | None, message: str, problems: Problems) -> None:
    for part in () if node is None else node.walk():
        if isinstance(part.value, str) and part.value is not UNREADABLE:
            reject_secret(part, part.value, message, _ENV, problems)
