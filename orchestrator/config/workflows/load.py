"""The workflows of a file: read, judged, and resolved to phases that say all that there is to know of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from orchestrator.config.entries import Extensions
from orchestrator.config.references import iter_items, iter_task_nodes, reject_secret
from orchestrator.config.schema import MAX_CONTEXT_BYTES, NO_WORKFLOW, ExpansionSettings, PhaseSettings
from orchestrator.config.source.document import UNREADABLE, Node, read_document
from orchestrator.config.source.problems import KnownWords, Problems, quote_text
from orchestrator.config.source.prompts import read_prompt
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
from orchestrator.domain.scheduling.cycles import find_cycles
from orchestrator.domain.workflow.handoff_kinds import HANDOFF_KINDS, check_schema
from orchestrator.domain.workflow.mediation import TRANSFORMATIONS
from orchestrator.domain.workflow.routing import Expansion, Phase
from orchestrator.errors import RefusedError

_ROUNDS: Final = 3
_ENV: Final = "the adapter's `env`"

T = TypeVar("T")
Phases = tuple[Phase, ...]


@functools.cache
def builtin_workflows() -> Mapping[str, Node]:
    """Return the workflows that are there already, as they are written, by name."""
    problems = Problems("workflows.yaml")
    root = read_document(read_builtin_file("workflows.yaml"), problems)
    found = None if root is None else root.get("workflows")
    if found is None or problems:
        raise problems.error()
    return {str(name): node for name, node in found.children.items()}


def builtin_phases() -> Mapping[str, Phases]:
    """Return the same, resolved."""
    problems = Problems("workflows.yaml")
    written = builtin_workflows()
    names = KnownNames(tuple(HANDOFF_KINDS), tuple(TRANSFORMATIONS), written)
    return {name: _read(node, Path(), names, problems) for name, node in written.items()}


def read_workflows(root: Node, folder: Path, extensions: Extensions, problems: Problems) -> dict[str, Phases]:
    """Return the workflows that tasks go through, or tasks of their plans will; the mistakes of all are noted."""
    section = root.get("workflows")
    own = {} if section is None else {str(name): node for name, node in section.children.items()}
    wanted = dict.fromkeys(named.value for named in _named(root))
    if not own and not wanted:
        return {}
    written = {**builtin_workflows(), **own}
    _check_named(root, written, problems)
    names = KnownNames(extensions.kinds, extensions.transformations, written)
    judged = {name: _read(node, folder, names, problems) for name, node in own.items()}
    found: dict[str, Phases] = {}
    waiting = [name for name in wanted if name in written]
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = judged[name] if name in judged else _read(written[name], folder, names, problems)
            waiting += (one for one in _expanded(found[name]) if one in written)
    _check_expansions({**judged, **found}, written, problems)
    return found


def _check_expansions(found: Mapping[str, Phases], written: Mapping[str, Node], problems: Problems) -> None:
    """Note plans that become tasks with plans that become tasks, and so on: no run would come to its end."""
    for circle in find_cycles({name: tuple(_expanded(phases)) for name, phases in found.items()}):
        begin = min(circle, key=list(found).index)
        place = circle.index(begin)
        way = " -> ".join([*circle[place:], *circle[:place], begin])
        what = f"the tasks of its plans have plans that become tasks without an end: {way}"
        problems.add(written[begin].at, what, "name another workflow under `expand:`, or none")


def workflow_of(task: Node, root: Node) -> str | None:
    """Return the name of a task's workflow, be there one of that name or not; None where it has none.

    Of the file itself it is that of tasks which say nothing.
    """
    named = task.get("workflow") or root.get("defaults", "workflow")
    return named.value if named is not None and isinstance(named.value, str) and named.value != NO_WORKFLOW else None


def iter_phase_nodes(workflow: Node) -> Iterator[PhaseNode]:
    """Yield each phase whose name can be told."""
    for item in iter_items(workflow):
        if isinstance(item.value, str):
            yield PhaseNode(item.value, item.at, Node(item.at, {}), PhaseSettings())
        elif isinstance(item.value, dict) and len(item.value) == 1:
            name, node = next(iter(item.children.items()))
            if isinstance(name, str) and isinstance(node.value, dict):
                settings = validate(PhaseSettings, node, Problems(""))  # which is told of with the file's shape
                yield PhaseNode(name, item.keys[name], node, settings)


def check_contexts(root: Node, problems: Problems) -> None:
    """Note values for phases that a task does not have, and keys in values, which are recorded."""
    for _, task in iter_task_nodes(root):
        context = task.get("context")
        if context is not None and workflow_of(task, root) is None:
            what = "the task has values for the phases of a workflow, and no workflow"
            problems.add(task.keys["context"], what, "add `workflow:`, or tell them in the prompt")
        _refuse_keys(context, "context", problems)
    _refuse_keys(root.get("context"), "context", problems)


def _named(root: Node) -> Iterator[Node]:
    """Yield each name of a workflow that tasks go through."""
    for entry in (root.get("defaults"), *(task for _, task in iter_task_nodes(root))):
        named = None if entry is None else entry.get("workflow")
        if named is not None and isinstance(named.value, str) and named.value != NO_WORKFLOW:
            yield named


def _check_named(root: Node, written: Mapping[str, Node], problems: Problems) -> None:
    names = KnownWords([*written, NO_WORKFLOW], "the workflows")
    for named in _named(root):
        if named.value not in written:
            problems.add(named.at, f"there is no workflow {quote_text(named.value)}", names.suggest(named.value))


def _expanded(phases: Phases) -> Iterator[str]:
    yield from (one.expand.workflow for one in phases if one.expand is not None and one.expand.workflow is not None)


def _read(workflow: Node, folder: Path, names: KnownNames, problems: Problems) -> Phases:
    written = list(iter_phase_nodes(workflow))
    check_order(written, problems)
    found = []
    for place, one in enumerate(written):
        reject_empty_keys(one.node, problems)
        check_keys(one, names, problems)
        _refuse_keys(one.node.get("context"), "context", problems)
        _refuse_keys(one.node.get("until"), "command", problems)
        if one.settings is not None:
            earlier = [each.name for each in written[:place]]
            found.append(_resolved(one, one.settings, earlier, folder, problems))
    return tuple(found)


def _resolved(
    phase: PhaseNode, settings: PhaseSettings, earlier: Sequence[str], folder: Path, problems: Problems
) -> Phase:
    produces = settings.produces
    if settings.when is not None:
        _note_fault(lambda: compile_condition(str(settings.when)), phase, "when", problems)
    return Phase(
        name=phase.name,
        adapter=settings.adapter,
        fallback=settings.fallback,
        writes=settings.access == "write",
        produces=None if produces is None else produces.kind,
        schema=None if produces is None else _schema(phase, produces.schema_, folder, problems),
        prompt=_template(phase, settings, folder, problems),
        needs=settings.needs,
        context=settings.context,
        when=settings.when,
        approve=settings.approve,
        continues=find_continued_phase(settings, earlier),
        handoff=settings.handoff,
        transform=settings.transform,
        mediator=settings.mediator,
        key=settings.key,
        until=settings.until,
        on_reject=settings.on_reject,
        max_rounds=settings.max_rounds or _ROUNDS,
        expand=_expansion(settings.expand),
        timeout=settings.timeout,
    )


def _expansion(settings: ExpansionSettings | None) -> Expansion | None:
    if settings is None:
        return None
    workflow = None if settings.workflow == NO_WORKFLOW else settings.workflow
    return Expansion(most=settings.max, workflow=workflow)


def _template(phase: PhaseNode, settings: PhaseSettings, folder: Path, problems: Problems) -> str | None:
    """Return the template of what a phase's session is told; None where its mistake is noted."""
    key, text = "prompt", settings.prompt
    if text is None and settings.prompt_file is not None:
        key = "prompt_file"
        text = _note_fault(lambda: read_prompt(folder / str(settings.prompt_file)), phase, key, problems)
    elif text is None:
        kind = None if settings.produces is None else settings.produces.kind
        return read_builtin_template(template_for(phase.name, kind))
    if text is None:
        return None
    reject_secret(phase.node.get(key) or phase.node, text, "prompt", _ENV, problems)
    _note_fault(lambda: compile_template(text), phase, key, problems)
    return text


def _schema(
    phase: PhaseNode, written: str | Mapping[str, Any] | None, folder: Path, problems: Problems
) -> dict[str, Any] | None:
    """Return the JSON Schema of a phase's handoff; None where it has none, or its mistake is noted."""
    if written is None:
        return None
    if not isinstance(written, str):
        found: Any = dict(written)
    else:
        text = _note_fault(lambda: read_prompt(folder / written), phase, "produces", problems)
        found = None if text is None else _note_fault(lambda: _json(written, text), phase, "produces", problems)
    if found is None:
        return None
    _note_fault(lambda: _check_schema(found), phase, "produces", problems)
    return found if isinstance(found, dict) else None


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        # The position is told behind a colon, which begins the remedy here.
        said = str(error).replace(":", " at", 1)
        raise ValueError(f"{quote_text(name)} is not JSON, {said}: write a JSON Schema there") from error


def _check_schema(schema: Any) -> None:
    """Raise ValueError, with the remedy, for what is no JSON Schema of an object, or is too large to be told."""
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        what = "this is no schema of an object, which every handoff is"
        raise ValueError(f"{what}: write one as in {{type: object, required: [answer]}}")
    size = len(json.dumps(schema, ensure_ascii=False, default=str).encode())
    if size > MAX_CONTEXT_BYTES:
        raise ValueError(
            f"the schema takes {size} bytes: keep it within {MAX_CONTEXT_BYTES}, sessions are told all of it"
        )
    check_schema(schema)


def _note_fault(read: Callable[[], T], phase: PhaseNode, key: str, problems: Problems) -> T | None:
    """Return what is read; None where it can't be, which is noted at a key of a phase."""
    try:
        return read()
    except RefusedError as error:
        problems.add(phase.at(key), error.what, error.remedy)
    except ValueError as error:
        what, _, remedy = str(error).partition(": ")
        problems.add(phase.at(key), what, remedy)
    return None


def _refuse_keys(node: Node | None, what: str, problems: Problems) -> None:
    for part in () if node is None else node.walk():
        if isinstance(part.value, str) and part.value is not UNREADABLE:
            reject_secret(part, part.value, what, _ENV, problems)
