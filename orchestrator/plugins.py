"""Finds plugins through the entry-point group `cli_council`; what we ship comes in by the same door.

A plugin that can't be used is named and left out; everything else goes on without it.
"""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy
from pydantic import BaseModel

from orchestrator import hookspecs
from orchestrator.config.entries import Extensions
from orchestrator.config.model import restore_options
from orchestrator.config.store import scheme_of
from orchestrator.domain.workflow.handoff_kinds import HandoffKind, HandoffValidator, kind_from_model, with_validators
from orchestrator.domain.workflow.mediation import Transformation
from orchestrator.errors import PluginError, RefusedError
from orchestrator.hookspecs import ENTRY_POINT_GROUP
from orchestrator.protocols import AdapterType, JsonObject, SinkType, Store, StoreType, TrackerType
from orchestrator.system.clock import Clock

if TYPE_CHECKING:  # it brings what most programs do without
    from orchestrator.domain.workflow.verification import Constraint

#: The distribution whose plugins are always there.
OWN_DISTRIBUTION = "cli-council"
#: Names the plugins of others that may be loaded, with commas between them; unset: all. Empty: none.
PLUGINS_VARIABLE = "COUNCIL_PLUGINS"

#: What an adapter must have; one that was written for another version of the contract lacks some of it.
_ADAPTER = ("Options", "programs", "command", "parse", "verdict")
_SINK = ("Options",)
#: By the kind of what is registered: what it must have.
_REQUIRED_ATTRIBUTES: Mapping[str, Sequence[str]] = {
    "adapters": _ADAPTER,
    "stores": (),
    "sinks": _SINK,
    "trackers": _SINK,
    "handoff_kinds": (),
    "transformations": (),
    "validators": (),
    "constraints": (),
}

#: Where the package that is running lies.
_PACKAGE_ROOT = Path(__file__).resolve().parents[1]

_LONGEST_REASON = 500  # characters


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """A plugin: the name of its entry point, and the distribution that brings it."""

    name: str
    distribution: str
    version: str


@dataclass(frozen=True, slots=True)
class SkippedPlugin:
    """A plugin that is not used, and why."""

    plugin: PluginInfo
    reason: str
    names: frozenset[str] = frozenset()
    """What it would have registered, as far as it came to that."""

    def __str__(self) -> str:
        return f"the plugin {self.plugin.name!r} of {self.plugin.distribution} {self.plugin.version}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Plugins:
    """What is installed: everything that plugins registered, by kind and name."""

    adapters: dict[str, AdapterType] = field(default_factory=dict)
    stores: dict[str, StoreType] = field(default_factory=dict)
    sinks: dict[str, SinkType] = field(default_factory=dict)
    trackers: dict[str, TrackerType] = field(default_factory=dict)
    handoff_kinds: dict[str, HandoffKind] = field(default_factory=dict)
    transformations: dict[str, Transformation] = field(default_factory=dict)
    validators: dict[str, HandoffValidator] = field(default_factory=dict)
    constraints: dict[str, Constraint] = field(default_factory=dict)
    loaded: list[PluginInfo] = field(default_factory=list)
    left_out: list[SkippedPlugin] = field(default_factory=list)
    disabled: list[PluginInfo] = field(default_factory=list)
    """Those of others that `COUNCIL_PLUGINS` does not name; nothing of them was imported."""
    providers: dict[tuple[str, str], PluginInfo] = field(default_factory=dict)
    """The plugin that registered what stands under a kind (`adapters`, …) and a name."""

    def kinds(self) -> Mapping[str, dict[str, Any]]:
        """Return the registries by the kind's name in the plural, as the hooks have it."""
        return {kind: getattr(self, kind) for kind in _REQUIRED_ATTRIBUTES}

    def checked_kinds(self) -> dict[str, HandoffKind]:
        """Return the kinds of handoffs by name, each with the checks that plugins add to it."""
        return {name: with_validators(kind, self.validators) for name, kind in self.handoff_kinds.items()}

    def extensions(self) -> Extensions:
        """Return what a file can use beside adapters."""
        return Extensions(
            self.sinks, self.trackers, self.explain, tuple(self.handoff_kinds), tuple(self.transformations)
        )

    def open(self, kind: str, name: str, stored: JsonObject) -> AbstractAsyncContextManager[Any]:
        """Open a `sink` or `tracker` from what its run has stored of it, for the body of an `async with`."""
        opens, options = restore_options(
            f"{kind} {name!r}", stored, self.kinds()[f"{kind}s"], self.explain(str(stored["use"]))
        )
        opened: AbstractAsyncContextManager[Any] = opens(options)
        return opened

    def open_store(self, url: str, clock: Clock) -> AbstractAsyncContextManager[Store]:
        """Open the store at a URL, for the body of an `async with`; RefusedError where nothing knows its scheme."""
        scheme = scheme_of(url)
        if scheme not in self.stores:
            known = ", ".join(f"{name}:" for name in sorted(self.stores))
            raise RefusedError(f"there is no store for {url!r}", f"write a URL that begins with one of {known}")
        return self.stores[scheme](url, clock)

    def explain(self, name: str) -> str | None:
        """Return why a name may be missing that a file calls for: its plugin was left out; None if nothing was."""
        unwanted = {
            one.name: f"the plugin {one.name!r} of {one.distribution} {one.version}: {PLUGINS_VARIABLE} does not name it"
            for one in self.disabled
        }
        surely = [str(one) for one in self.left_out if name in {one.plugin.name, *one.names}]
        surely += [unwanted[name]] if name in unwanted else []
        # What was not imported has not said what it brings.
        perhaps = [*(str(one) for one in self.left_out if not one.names), *unwanted.values()]
        found = surely or perhaps
        return f"left out was {'; and '.join(found)}" if found else None


def load_plugins(environ: Mapping[str, str] = os.environ, worked_on: Sequence[Path] = ()) -> Plugins:
    """Load what is installed and allowed; nothing that lies in the repositories of `find_source_paths` or the current folder.

    What agents write there must not run as us. Blocks.
    """
    plugins = Plugins()
    untrusted = [folder for path in (*worked_on, Path()) for folder in _enclosing_repositories(path.absolute())]
    for entry, found in _installed():
        if not _is_wanted(found, environ):
            plugins.disabled.append(found)
            continue
        registered: dict[str, dict[str, Any]] = {kind: {} for kind in plugins.kinds()}
        try:
            _check_location(entry, found, untrusted)
            _call_hooks(entry, found, registered)
            _add_registered(plugins, found, registered)
        except PluginError as error:
            names = frozenset(name for registry in registered.values() for name in registry)
            plugins.left_out.append(SkippedPlugin(found, error.why, names))
        else:
            plugins.loaded.append(found)
    return plugins


def _enclosing_repositories(path: Path) -> list[Path]:
    """Return the repositories that a file or folder is in."""
    return [folder for folder in (path, *path.parents) if (folder / ".git").exists()]


def _installed() -> list[tuple[EntryPoint, PluginInfo]]:
    """Return the plugins that there are. Ours come first: what they register stays theirs."""
    entries = entry_points(group=ENTRY_POINT_GROUP)
    told = {
        one: _read_name_and_version(one) for one in {entry.dist for entry in entries}
    }  # once: each time it is all read anew
    found = [(entry, PluginInfo(entry.name, *told[entry.dist])) for entry in entries]
    return sorted(found, key=lambda one: (not _is_ours(one[1]), one[0].name, one[0].value))


def _read_name_and_version(distribution: Distribution | None) -> tuple[str, str]:
    """Return the name and the version of a distribution."""
    metadata = distribution.metadata if distribution is not None else None
    name, version = (str(metadata[field]) if metadata and field in metadata else "?" for field in ("Name", "Version"))
    return name, version


def _is_ours(found: PluginInfo) -> bool:
    return found.distribution == OWN_DISTRIBUTION


def _is_wanted(found: PluginInfo, environ: Mapping[str, str]) -> bool:
    limit = environ.get(PLUGINS_VARIABLE)
    return limit is None or _is_ours(found) or found.name in {name.strip() for name in limit.split(",")}


def _check_location(entry: EntryPoint, found: PluginInfo, untrusted: Sequence[Path]) -> None:
    """Refuse what lies in an untrusted folder, before any of it is imported."""
    places = [] if entry.dist is None else [Path(str(entry.dist.locate_file("")))]
    try:
        # Of the top package alone: to find what is in it would import it.
        spec = find_spec(entry.module.partition(".")[0])
    except (ImportError, ValueError, AttributeError):  # the last where the entry point names no module
        spec = None  # loading it says what is wrong
    if spec is not None:
        found_in = [Path(place) for place in (spec.origin, *(spec.submodule_search_locations or ())) if place]
        # Whoever works on this package itself has it in the repository, and runs it from there already.
        places += [
            place for place in found_in if not (_is_ours(found) and place.resolve().is_relative_to(_PACKAGE_ROOT))
        ]
    installed = [Path(place).resolve() for place in (*site.getsitepackages(), site.getusersitepackages(), sys.prefix)]
    for place in map(Path.resolve, places):
        is_installed = any(place.is_relative_to(one) for one in installed)
        if not is_installed and any(place.is_relative_to(one.resolve()) for one in untrusted):
            raise PluginError(found.name, f"it lies in the repository that is worked on, {place}: install it elsewhere")


def _call_hooks(entry: EntryPoint, found: PluginInfo, registered: Mapping[str, dict[str, Any]]) -> None:
    """Import one plugin and call its hooks, which add to `registered` by kind and name."""
    try:
        manager = pluggy.PluginManager(ENTRY_POINT_GROUP)
        manager.add_hookspecs(hookspecs)
        manager.register(entry.load(), name=entry.name)
        manager.check_pending()
        for kind, registry in registered.items():
            getattr(manager.hook, f"council_register_{kind}")(register=_register(found, kind, registry))
    except PluginError:
        raise
    except (Exception, SystemExit) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise PluginError(found.name, told[:_LONGEST_REASON]) from error
    if not any(registered.values()):
        raise PluginError(found.name, "it registers nothing: it has none of the hooks that this version calls")


#: What is wanted of those kinds that are no types.
_EXPECTED_TYPES: Mapping[str, str] = {
    "handoff_kinds": "a pydantic model or a Kind of that name",
    "transformations": "a function",
    "validators": "a Validator",
    "constraints": "a function",
}


def _is_valid(kind: str, name: str, registered: Any) -> bool:
    match kind:
        case "handoff_kinds":
            if isinstance(registered, HandoffKind):
                return registered.name == name
            return isinstance(registered, type) and issubclass(registered, BaseModel)
        case "validators":
            return isinstance(registered, HandoffValidator)
        case _:
            return callable(registered)


def _register(found: PluginInfo, kind: str, registry: dict[str, Any]) -> Callable[[Any, Any], None]:
    wanted = _REQUIRED_ATTRIBUTES[kind]

    def register(name: Any, registered: Any) -> None:
        if not isinstance(name, str) or not name or not _is_valid(kind, name, registered):
            what = _EXPECTED_TYPES.get(kind, "a type")
            raise PluginError(found.name, f"it registers {registered!r} as {name!r}: a name and {what} are wanted")
        if name in registry:
            raise PluginError(found.name, f"it registers {name!r} twice")
        if kind == "handoff_kinds" and not isinstance(registered, HandoffKind):
            registered = kind_from_model(name, registered)
        registry[name] = registered
        # A type that is made by a function shows what it lacks only when it is used.
        names = wanted if isinstance(registered, type) else [one for one in wanted if one == "Options"]
        missing = [one for one in names if not hasattr(registered, one)]
        if missing:
            lacks = ", ".join(missing)
            raise PluginError(found.name, f"{name!r} has no {lacks}: it is made for another version of the contract")
        options = getattr(registered, "Options", None)
        if "Options" in names and not (isinstance(options, type) and issubclass(options, BaseModel)):
            raise PluginError(found.name, f"the Options of {name!r} are no pydantic model")

    return register


def _add_registered(plugins: Plugins, found: PluginInfo, registered: Mapping[str, dict[str, Any]]) -> None:
    """Add all that a plugin registers, or nothing of it."""
    for kind, registry in registered.items():
        for name in registry:
            owner = plugins.providers.get((kind, name))
            if owner is not None:
                what = f"{name!r} among the {kind} is already the plugin {owner.name!r} of {owner.distribution}"
                raise PluginError(found.name, what)
    for kind, registry in registered.items():
        plugins.kinds()[kind].update(registry)
        plugins.providers.update({(kind, name): found for name in registry})
