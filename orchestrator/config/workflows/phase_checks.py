"""Whether the keys of a phase fit each other, and the other phases of its workflow."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Final, NamedTuple

from orchestrator.config.schema import PhaseSettings
from orchestrator.config.source.document import Node
from orchestrator.config.source.problems import KnownWords, Position, Problems, quote_text
from orchestrator.domain.workflow.routing import REVIEW_KIND

PLAN: Final = "plan"


class PhaseNode(NamedTuple):
    """A phase as it is written: its name, where that is, its keys, and what they say where their shape is right."""

    name: str
    name_at: Position
    node: Node
    settings: PhaseSettings | None

    def at(self, key: str) -> Position:
        """Return where a key's value is, or the phase's name where it has no such key."""
        found = self.node.get(key)
        return self.name_at if found is None else found.at

    def key_at(self, key: str) -> Position:
        """Return where a key is, or the phase's name where it has none."""
        return self.node.keys.get(key, self.name_at)


class KnownNames(NamedTuple):
    """The names that a phase can use."""

    kinds: Collection[str]
    transformations: Collection[str]
    workflows: Collection[str]


class _Fault(NamedTuple):
    is_there: bool
    key: str
    what: str
    remedy: str


def check_keys(phase: PhaseNode, names: KnownNames, problems: Problems) -> None:
    """Note keys of a phase that do not fit each other, and names that are not known."""
    if phase.settings is None:
        return
    for fault in _key_conflicts(phase.settings):
        if fault.is_there:
            problems.add(phase.key_at(fault.key), fault.what, fault.remedy)
    _check_kind(phase, phase.settings, names.kinds, problems)
    transform = phase.settings.transform
    if transform is not None and transform not in names.transformations:
        instead = KnownWords(names.transformations, "the transformations").suggest(transform)
        problems.add(phase.at("transform"), f"there is no transformation {quote_text(transform)}", instead)
    workflow = None if phase.settings.expand is None else phase.settings.expand.workflow
    if workflow is not None and workflow not in names.workflows:
        found = phase.node.get("expand", "workflow")
        instead = KnownWords(names.workflows, "the workflows").suggest(workflow)
        problems.add(found.at if found else phase.name_at, f"there is no workflow {quote_text(workflow)}", instead)


def _key_conflicts(settings: PhaseSettings) -> Iterator[_Fault]:
    kind = None if settings.produces is None else settings.produces.kind
    is_mediated, is_read = settings.handoff == "mediated", settings.access == "read"
    yield _Fault(
        settings.prompt is not None and settings.prompt_file is not None,
        "prompt_file",
        "there are both prompt and prompt_file",
        "keep one of the two",
    )
    yield _Fault(
        bool(settings.fallback) and settings.adapter is None,
        "fallback",
        "the phase has stand-ins and no adapter that they stand in for",
        "add `adapter:`, or remove `fallback`: then the task's own stand in",
    )
    yield _Fault(
        bool(settings.until) and is_read,
        "until",
        "a phase with `access: read` leaves no work that commands could judge",
        "remove `until`, or write `access: write`",
    )
    yield _Fault(
        settings.on_reject is not None and kind != REVIEW_KIND,
        "on_reject",
        "only a review rejects",
        f"write `produces: {REVIEW_KIND}`, or remove `on_reject`",
    )
    yield _Fault(
        settings.max_rounds is not None and not (settings.until or settings.approve or kind == REVIEW_KIND),
        "max_rounds",
        "nothing sends the work of this phase back",
        f"write `until:` or `produces: {REVIEW_KIND}`, or remove `max_rounds`",
    )
    yield _Fault(
        settings.expand is not None and kind != PLAN,
        "expand",
        "only a plan has tasks",
        f"write `produces: {PLAN}`, or remove `expand`",
    )
    yield _Fault(
        settings.handoff != "direct" and kind is None,
        "handoff",
        "the phase hands nothing over",
        "add `produces:` with a kind, or remove `handoff`",
    )
    for key in ("transform", "mediator"):
        yield _Fault(
            getattr(settings, key) is not None and not is_mediated,
            key,
            f"`{key}` is for what is mediated",
            f"write `handoff: mediated`, or remove `{key}`",
        )
    yield _Fault(
        settings.transform is not None and settings.mediator is not None,
        "mediator",
        "there are both transform and mediator",
        "keep one of the two",
    )
    yield _Fault(
        settings.key is not None and settings.handoff != "shared",
        "key",
        "`key` is for what is shared",
        "write `handoff: shared`, or remove `key`",
    )


def _check_kind(phase: PhaseNode, settings: PhaseSettings, kinds: Collection[str], problems: Problems) -> None:
    if settings.produces is None:
        return
    kind, found = settings.produces.kind, phase.node.get("produces", "kind") or phase.node.get("produces")
    at = phase.name_at if found is None else found.at
    if settings.produces.schema_ is None and kind not in kinds:
        instead = KnownWords(kinds, "the kinds of handoffs").suggest(kind)
        end = "" if instead.endswith("?") else "."
        remedy = f"{instead}{end} One of yours has a schema: `produces: {{kind: {kind}, schema: FILE}}`"
        problems.add(at, f"there is no kind of handoff {quote_text(kind)}", remedy)
    elif settings.produces.schema_ is not None and kind in kinds:
        problems.add(at, f"the kind {quote_text(kind)} is there already", "remove `schema`, or give yours another name")


def check_order(phases: Sequence[PhaseNode], problems: Problems) -> None:
    """Note names of phases that are there twice, and those that a phase can't refer to from its place."""
    first: dict[str, Position] = {}
    for place, one in enumerate(phases):
        before = [each.name for each in phases[:place]]
        if first.setdefault(one.name, one.name_at) != one.name_at:
            what = f"the phase {quote_text(one.name)} is there already, {first[one.name]}"
            problems.add(one.name_at, what, "give each phase a name of its own")
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
            at, f"there is no phase before {quote_text(phase.name)}", "remove this, or put the phase behind others"
        )
    else:
        instead = KnownWords(before, "the phases before this one").suggest(named)
        problems.add(at, f"{quote_text(named)} is no phase before {quote_text(phase.name)}", instead)


def _check_session(phase: PhaseNode, settings: PhaseSettings, before: Sequence[PhaseNode], problems: Problems) -> None:
    if settings.session is None:
        return
    named = find_continued_phase(settings, [one.name for one in before])
    found = phase.node.get("session", "continue")
    at = phase.at("session") if found is None else found.at
    _check_earlier(phase, named or phase.name, at, [one.name for one in before], problems)
    other = next((one.settings for one in before if one.name == named), None)
    if other is not None and None not in (other.adapter, settings.adapter) and other.adapter != settings.adapter:
        what = f"the conversation of {quote_text(str(named))} is one of {other.adapter!r}, not of {settings.adapter!r}"
        problems.add(at, what, "give both phases the same adapter")


def _check_mediator(phase: PhaseNode, settings: PhaseSettings, after: Sequence[PhaseNode], problems: Problems) -> None:
    if settings.handoff != "mediated":
        return
    if not after:
        what = f"nothing follows {quote_text(phase.name)} that its result could be prepared for"
        problems.add(phase.at("handoff"), what, "remove `handoff`, or add a phase")
    elif settings.mediator is not None and settings.mediator != after[0].name:
        what = (
            f"{quote_text(settings.mediator)} is not the phase after {quote_text(phase.name)}, which alone can mediate"
        )
        problems.add(phase.at("mediator"), what, f"write {after[0].name}")
    elif settings.mediator is not None and len(after) == 1:
        what = f"nothing follows {quote_text(settings.mediator)} that it could prepare the result for"
        problems.add(phase.at("mediator"), what, "remove `mediator`, or add a phase")


def find_continued_phase(settings: PhaseSettings, before: Sequence[str]) -> str | None:
    """Return the phase with whose conversation one goes on: the one that it names, or the last of those before it."""
    if settings.session is None:
        return None
    return settings.session.continue_ or (before[-1] if before else None)
