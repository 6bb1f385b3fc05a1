"""Check that a phase's keys fit each other and the other phases of its workflow."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Final, NamedTuple

from orchestrator.config.source.document import Node
from orchestrator.config.source.problems import Position, Problems
from orchestrator.domain.settings.phase_settings import PhaseSettings
from orchestrator.domain.wording import quote_text, suggest
from orchestrator.domain.workflow.routing import REVIEW_KIND

PLAN: Final = "plan"


class PhaseNode(NamedTuple):
    """A phase as written: its name and position, its node, and its valid settings."""

    name: str
    name_at: Position
    node: Node
    settings: PhaseSettings | None

    def at(self, key: str) -> Position:
        """Return the position of a key's value, or the phase's name if it is absent."""
        found = self.node.get(key)
        return self.name_at if found is None else found.at

    def key_at(self, key: str) -> Position:
        """Return the position of a key, or of the phase's name if it has no such key."""
        return self.node.keys.get(key, self.name_at)


class KnownNames(NamedTuple):
    """The names that a phase can use."""

    kinds: Collection[str]
    transformations: Collection[str]
    workflows: Collection[str]


def check_keys(phase: PhaseNode, names: KnownNames, problems: Problems) -> None:
    """Report conflicting keys of a phase, and unknown names."""
    if phase.settings is None:
        return
    has_all = len(phase.settings.model_fields_set) == len(
        phase.node.value
    )  # otherwise a conflict may involve a default
    for is_conflict, key, message, remedy in _key_conflicts(phase.settings):
        if is_conflict and has_all:
            problems.add(phase.key_at(key), message, remedy)
    _check_kind(phase, phase.settings, names.kinds, problems)
    transform = phase.settings.transform
    if transform is not None and transform not in names.transformations:
        remedy = suggest(transform, names.transformations, "the transformations")
        problems.add(phase.at("transform"), f"there is no transformation {quote_text(transform)}", remedy)
    workflow = None if phase.settings.expand is None else phase.settings.expand.workflow
    if workflow is not None and workflow not in names.workflows:
        found = phase.node.get("expand", "workflow")
        remedy = suggest(workflow, names.workflows, "the workflows")
        problems.add(found.at if found else phase.name_at, f"there is no workflow {quote_text(workflow)}", remedy)


def _key_conflicts(settings: PhaseSettings) -> Iterator[tuple[bool, str, str, str]]:
    """Yield for each rule whether it is violated, the key, the problem and the remedy."""
    kind = settings.kind
    is_mediated, can_reject = settings.handoff == "mediated", kind == REVIEW_KIND
    is_repeated = settings.until or settings.approve or can_reject
    both, one = "the phase has both {} and {}", "keep one of the two"
    yield (
        settings.prompt is not None and settings.prompt_file is not None,
        "prompt_file", both.format("prompt", "prompt_file"), one,
    )  # fmt: skip
    yield (
        bool(settings.fallback) and settings.adapter is None,
        "fallback", "the phase has fallback adapters, but no adapter",
        "add `adapter:`, or remove `fallback` to use those of the task",
    )  # fmt: skip
    yield (
        bool(settings.until) and not settings.writes,
        "until", "a phase with `access: read` has no work for commands to check",
        "remove `until`, or use `access: write`",
    )  # fmt: skip
    yield (
        settings.on_reject is not None and not can_reject,
        "on_reject", "only a review rejects", f"use `produces: {REVIEW_KIND}`, or remove `on_reject`",
    )  # fmt: skip
    yield (
        "max_rounds" in settings.model_fields_set and not is_repeated,
        "max_rounds", "the work of this phase is never sent back",
        f"add `until:` or `produces: {REVIEW_KIND}`, or remove `max_rounds`",
    )  # fmt: skip
    yield (
        settings.expand is not None and kind != PLAN,
        "expand", "only a plan has tasks", f"use `produces: {PLAN}`, or remove `expand`",
    )  # fmt: skip
    yield (
        settings.handoff != "direct" and kind is None,
        "handoff", "the phase produces no handoff", "add `produces:` with a kind, or remove `handoff`",
    )  # fmt: skip
    for key in ("transform", "mediator"):
        yield (
            getattr(settings, key) is not None and not is_mediated,
            key, f"`{key}` is only for mediated handoffs", f"use `handoff: mediated`, or remove `{key}`",
        )  # fmt: skip
    yield (
        settings.transform is not None and settings.mediator is not None,
        "mediator", both.format("transform", "mediator"), one,
    )  # fmt: skip
    yield (
        settings.key is not None and settings.handoff != "shared",
        "key", "`key` is only for shared handoffs", "use `handoff: shared`, or remove `key`",
    )  # fmt: skip


def _check_kind(phase: PhaseNode, settings: PhaseSettings, kinds: Collection[str], problems: Problems) -> None:
    if settings.produces is None:
        return
    kind, found = settings.produces.kind, phase.node.get("produces", "kind") or phase.node.get("produces")
    at = phase.name_at if found is None else found.at
    if settings.produces.schema_ is None and kind not in kinds:
        known = suggest(kind, kinds, "the kinds of handoffs")
        remedy = f"{known.rstrip('?')}, or add a schema for a custom kind: `produces: {{kind: {kind}, schema: FILE}}`"
        problems.add(at, f"there is no kind of handoff {quote_text(kind)}", remedy)
    elif settings.produces.schema_ is not None and kind in kinds:
        problems.add(at, f"the kind {quote_text(kind)} is already defined", "remove `schema`, or choose another name")


def check_order(phases: Sequence[PhaseNode], problems: Problems) -> None:
    """Report duplicate phase names, and references in the wrong direction."""
    first: dict[str, Position] = {}
    for place, one in enumerate(phases):
        before = [each.name for each in phases[:place]]
        if first.setdefault(one.name, one.name_at) != one.name_at:
            message = f"the phase {quote_text(one.name)} is already defined {first[one.name]}"
            problems.add(one.name_at, message, "give each phase a unique name")
        if one.settings is None:
            continue
        _check_earlier(one, one.settings.on_reject, one.at("on_reject"), before, problems)
        _check_session(one, one.settings, phases[:place], problems)
        _check_mediator(one, one.settings, phases[place + 1 :], problems)


def _check_earlier(
    phase: PhaseNode, named: str | None, at: Position, before: Sequence[str], problems: Problems
) -> None:
    if named is None or named in before:
        return
    if not before:
        problems.add(
            at, f"there is no phase before {quote_text(phase.name)}", "remove this, or move the phase after others"
        )
    else:
        remedy = suggest(named, before, "the phases before this one")
        problems.add(at, f"{quote_text(named)} is not a phase before {quote_text(phase.name)}", remedy)


def _check_session(phase: PhaseNode, settings: PhaseSettings, before: Sequence[PhaseNode], problems: Problems) -> None:
    if settings.session is None:
        return
    named = find_continued_phase(settings, [one.name for one in before])
    found = phase.node.get("session", "continue")
    at = phase.at("session") if found is None else found.at
    _check_earlier(phase, named or phase.name, at, [one.name for one in before], problems)
    other = next((one.settings for one in before if one.name == named), None)
    if other is not None and None not in (other.adapter, settings.adapter) and other.adapter != settings.adapter:
        message = (
            f"the conversation of {quote_text(str(named))} belongs to {other.adapter!r}, not to {settings.adapter!r}"
        )
        problems.add(at, message, "use the same adapter for both phases")


def _check_mediator(phase: PhaseNode, settings: PhaseSettings, after: Sequence[PhaseNode], problems: Problems) -> None:
    if settings.handoff != "mediated":
        return
    if not after:
        message = f"no phase follows {quote_text(phase.name)} to receive its result"
        problems.add(phase.at("handoff"), message, "remove `handoff`, or add a phase")
    elif settings.mediator is not None and settings.mediator != after[0].name:
        message = f"only the phase after {quote_text(phase.name)} can mediate, not {quote_text(settings.mediator)}"
        problems.add(phase.at("mediator"), message, f"use {after[0].name}")
    elif settings.mediator is not None and len(after) == 1:
        message = f"no phase follows {quote_text(settings.mediator)} to receive the result"
        problems.add(phase.at("mediator"), message, "remove `mediator`, or add a phase")


def find_continued_phase(settings: PhaseSettings, before: Sequence[str]) -> str | None:
    """Return the phase that a phase continues: the named or the previous one."""
    if settings.session is None:
        return None
    return settings.session.continue_ or (before[-1] if before else None)
