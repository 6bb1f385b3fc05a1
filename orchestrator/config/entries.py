"""Read config entries with a plugin type under `use` and options: adapters, sinks, trackers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from pydantic import BaseModel

from orchestrator.config.model import SinkConfig, TrackerConfig
from orchestrator.config.schema import SinkSettings, TrackerSettings
from orchestrator.config.source.document import UNREADABLE, Node
from orchestrator.config.source.problems import KnownWords, Problems, quote_text
from orchestrator.config.source.validation import validate
from orchestrator.domain.workflow.handoff_kinds import HANDOFF_KINDS
from orchestrator.domain.workflow.mediation import TRANSFORMATIONS
from orchestrator.protocols import SinkType, TrackerType


class HasOptions(Protocol):
    """A registered plugin type with options."""

    @property
    def Options(self) -> type[BaseModel]:  # noqa: N802  the contract's name
        """The model of its options."""


ExplainMissing = Callable[[str], str | None]
"""Returns why a type of this name may be missing; None if unknown."""


def _unexplained(_name: str) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Extensions:
    """Config extensions from plugins, except adapters, and reasons for missing types."""

    sinks: Mapping[str, SinkType] = field(default_factory=dict)
    trackers: Mapping[str, TrackerType] = field(default_factory=dict)
    explain: ExplainMissing = _unexplained
    kinds: Collection[str] = tuple(HANDOFF_KINDS)
    """The names of the kinds of handoffs, including built-in ones."""
    transformations: Collection[str] = tuple(TRANSFORMATIONS)
    """The names of the transformations, including built-in ones."""


class PluginEntry(NamedTuple):
    """An entry with a known type and valid options."""

    name: str
    node: Node
    use: str
    options: BaseModel


def read_entries(
    root: Node,
    kind: str,
    types: Mapping[str, HasOptions],
    own: Collection[str],
    folder: Path,
    explain: ExplainMissing,
    problems: Problems,
) -> Iterator[PluginEntry]:
    """Yield the valid entries of the section `<kind>s`, and report mistakes of all other entries.

    `own` are the common keys of all entries of the section.
    """
    installed = KnownWords(types, "the installed ones")
    for name, node in _nodes(root, f"{kind}s"):
        use = node.get("use")
        if use is None or not isinstance(use.value, str):
            continue
        if use.value not in types:
            remedy = "; ".join(filter(None, (explain(use.value), installed.suggest(use.value))))
            problems.add(use.at, f"there is no {kind} type {quote_text(use.value)}", remedy)
            continue
        # Validators of types never get values that the file reader rejected.
        unreadable = {key for key in node.value if _is_unreadable(node.children[key])}
        options = validate(types[use.value].Options, node, problems, without={*own, *unreadable}, folder=folder)
        if options is not None and not unreadable:
            yield PluginEntry(name, node, use.value, options)


def read_sinks(root: Node, folder: Path, extensions: Extensions, problems: Problems) -> dict[str, SinkConfig]:
    """Return the valid sinks, and report mistakes of all other ones."""
    found = {}
    own = SinkSettings.model_fields.keys()
    for used in read_entries(root, "sink", extensions.sinks, own, folder, extensions.explain, problems):
        events = used.node.value.get("events", ["*"])
        if isinstance(events, list) and all(isinstance(one, str) for one in events):
            found[used.name] = SinkConfig(name=used.name, use=used.use, events=tuple(events), options=used.options)
    return found


def read_trackers(root: Node, folder: Path, extensions: Extensions, problems: Problems) -> dict[str, TrackerConfig]:
    """Return the valid trackers, and report mistakes of all other ones."""
    own = TrackerSettings.model_fields.keys()
    return {
        used.name: TrackerConfig(name=used.name, use=used.use, options=used.options)
        for used in read_entries(root, "tracker", extensions.trackers, own, folder, extensions.explain, problems)
    }


def _nodes(root: Node, section: str) -> Iterator[tuple[str, Node]]:
    entries = root.get(section)
    for name, node in entries.children.items() if entries is not None else ():
        if isinstance(name, str) and isinstance(node.value, dict):
            yield name, node


def _is_unreadable(node: Node) -> bool:
    return any(part.value is UNREADABLE for part in node.walk())
