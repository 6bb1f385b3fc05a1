"""Read entries with a plugin type under `use`: adapters, sinks, trackers, pull requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel

from orchestrator.config.source.document import UNREADABLE, Node
from orchestrator.config.source.problems import Problems
from orchestrator.config.source.validation import validate
from orchestrator.domain.settings.fields import Settings
from orchestrator.domain.settings.run_settings import (
    PullRequestConfig,
    PullRequestSettings,
    SinkConfig,
    SinkSettings,
    TrackerConfig,
    TrackerSettings,
)
from orchestrator.domain.wording import quote_text, suggest
from orchestrator.domain.workflow.handoff_kinds import HANDOFF_KINDS
from orchestrator.domain.workflow.mediation import TRANSFORMATIONS
from orchestrator.protocols import ForgeType, PluginType, SinkType, TrackerType

ExplainMissing = Callable[[str], str | None]
"""Returns the reason why a type of this name may be missing; None if unknown."""


def _unexplained(_name: str) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Extensions:
    """Config extensions from plugins except adapters, with reasons for missing types."""

    sinks: Mapping[str, SinkType] = field(default_factory=dict)
    trackers: Mapping[str, TrackerType] = field(default_factory=dict)
    forges: Mapping[str, ForgeType] = field(default_factory=dict)
    explain: ExplainMissing = _unexplained
    kinds: Collection[str] = tuple(HANDOFF_KINDS)
    """The names of the kinds of handoffs, including built-in ones."""
    transformations: Collection[str] = tuple(TRANSFORMATIONS)
    """The names of the transformations, including built-in ones."""


SettingsT = TypeVar("SettingsT", bound=Settings)


class PluginEntry(NamedTuple, Generic[SettingsT]):
    """An entry with a known type and valid options."""

    name: str
    node: Node
    settings: SettingsT
    options: BaseModel


def read_entries(
    root: Node,
    kind: str,
    types: Mapping[str, PluginType[Any]],
    common: type[SettingsT],
    folder: Path,
    explain: ExplainMissing,
    problems: Problems,
) -> Iterator[PluginEntry[SettingsT]]:
    """Yield valid entries of the section `<kind>s`; report errors in their options.

    `common` has the keys of all entries of the section, whose errors schema validation reports.
    """
    for name, node in _nodes(root, f"{kind}s"):
        if (entry := _read_entry(name, node, kind, types, common, folder, explain, problems)) is not None:
            yield entry


def _read_entry(
    name: str,
    node: Node,
    kind: str,
    types: Mapping[str, PluginType[Any]],
    common: type[SettingsT],
    folder: Path,
    explain: ExplainMissing,
    problems: Problems,
) -> PluginEntry[SettingsT] | None:
    own, use = common.model_fields.keys(), node.get("use")
    if use is None or not isinstance(use.value, str):
        return None
    if use.value not in types:
        remedy = "; ".join(filter(None, (explain(use.value), suggest(use.value, types, "the installed ones"))))
        problems.add(use.at, f"there is no {kind} type {quote_text(use.value)}", remedy)
        return None
    # Validators of types never get values that the file reader rejected.
    unreadable = {key for key in node.value if _is_unreadable(node.children[key])}
    options = validate(types[use.value].Options, node, problems, without={*own, *unreadable}, folder=folder)
    settings = validate(common, node, Problems(""), without=node.value.keys() - own)
    if settings is None or options is None or unreadable:
        return None
    return PluginEntry(name, node, settings, options)


def read_sinks(root: Node, folder: Path, extensions: Extensions, problems: Problems) -> dict[str, SinkConfig]:
    """Return the valid sinks, and report errors in the others."""
    read = read_entries(root, "sink", extensions.sinks, SinkSettings, folder, extensions.explain, problems)
    return {name: SinkConfig(**dict(settings), options=options) for name, _, settings, options in read}


def read_trackers(root: Node, folder: Path, extensions: Extensions, problems: Problems) -> dict[str, TrackerConfig]:
    """Return the valid trackers, and report errors in the others."""
    read = read_entries(root, "tracker", extensions.trackers, TrackerSettings, folder, extensions.explain, problems)
    return {name: TrackerConfig(**dict(settings), options=options) for name, _, settings, options in read}


def read_pull_requests(
    root: Node, folder: Path, extensions: Extensions, problems: Problems
) -> PullRequestConfig | None:
    """Return how tasks land by pull requests; None if they do not, or if there is an error, which is reported."""
    node = root.get("pull_requests")
    if node is None or not isinstance(node.value, dict):
        return None
    types, explain = extensions.forges, extensions.explain
    entry = _read_entry("", node, "forge", types, PullRequestSettings, folder, explain, problems)
    return None if entry is None else PullRequestConfig(**dict(entry.settings), options=entry.options)


def _nodes(root: Node, section: str) -> Iterator[tuple[str, Node]]:
    entries = root.get(section)
    for name, node in entries.children.items() if entries is not None else ():
        if isinstance(name, str) and isinstance(node.value, dict):
            yield name, node


def _is_unreadable(node: Node) -> bool:
    return any(part.value is UNREADABLE for part in node.walk())
