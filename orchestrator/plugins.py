"""Load plugins, including built-in ones, from the entry points `cli_council`.

A plugin that can't be used is skipped and reported; everything else works without it.
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
from typing import TYPE_CHECKING, Any, NamedTuple

import pluggy
from pydantic import BaseModel

from orchestrator import hookspecs
from orchestrator.config.entries import Extensions
from orchestrator.config.model import restore_options
from orchestrator.config.profiles import (
    ProfileAdapterType,
    check_is_own,
    describe_errors,
    list_profiles,
    read_profile,
    user_profiles_folder,
)
from orchestrator.config.store import scheme_of
from orchestrator.domain.settings.run_settings import AdapterConfig, PullRequestConfig, SinkConfig, TrackerConfig
from orchestrator.domain.wording import suggest_similar
from orchestrator.domain.workflow.handoff_kinds import HandoffKind, HandoffValidator, kind_from_model, with_validators
from orchestrator.domain.workflow.mediation import Transformation
from orchestrator.errors import ConfigError, PluginError, PluginFailed, RefusedError, plugin_code
from orchestrator.hookspecs import ENTRY_POINT_GROUP
from orchestrator.protocols import AdapterType, ForgeType, ProfileFormat, SinkType, Store, StoreType, TrackerType
from orchestrator.system.clock import Clock

if TYPE_CHECKING:  # slow to import, and seldom needed
    from orchestrator.domain.workflow.verification import Constraint

#: The distribution whose plugins are always enabled.
OWN_DISTRIBUTION = "cli-council"
#: The name of the format of the user's profiles.
USER_PROFILES = "profiles"
#: A comma-separated list of the third-party plugins to load; unset: all, empty: none.
PLUGINS_VARIABLE = "COUNCIL_PLUGINS"


class _Kind(NamedTuple):
    """Rules for registered objects of a kind: description, check, required attributes."""

    expected: str = "a type"
    is_valid: Callable[[str, Any], bool] = lambda _, registered: callable(registered)
    attributes: Sequence[str] = ()


def _is_handoff_kind(name: str, registered: Any) -> bool:
    if isinstance(registered, HandoffKind):
        return registered.name == name
    return isinstance(registered, type) and issubclass(registered, BaseModel)


#: The kinds, in the plural as in the hooks. A type for another version of the contract lacks some attributes.
_KINDS: Mapping[str, _Kind] = {
    "adapters": _Kind(attributes=("Options", "programs", "command", "parse", "verdict")),
    "stores": _Kind(),
    "sinks": _Kind(attributes=("Options",)),
    "trackers": _Kind(attributes=("Options",)),
    "forges": _Kind(attributes=("Options",)),
    "handoff_kinds": _Kind("a pydantic model or a HandoffKind of that name", _is_handoff_kind),
    "transformations": _Kind("a function"),
    "validators": _Kind("a HandoffValidator", lambda _, registered: isinstance(registered, HandoffValidator)),
    "constraints": _Kind("a function"),
    "profiles": _Kind("a ProfileFormat", lambda _, registered: isinstance(registered, ProfileFormat)),
}

#: The folder of the running package.
_PACKAGE_ROOT = Path(__file__).resolve().parents[1]

_LONGEST_REASON = 500  # characters


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """A plugin: the name of its entry point, and its distribution.

    For a profile of the user: its name, and its file with an empty version.
    """

    name: str
    distribution: str
    version: str

    @property
    def origin(self) -> str:
        """The distribution with its version, or the file."""
        return f"{self.distribution} {self.version}".rstrip()


@dataclass(frozen=True, slots=True)
class SkippedPlugin:
    """A plugin that was skipped, and the reason."""

    plugin: PluginInfo
    reason: str
    names: frozenset[str] = frozenset()
    """The names that it registered before it failed."""

    @property
    def is_profile(self) -> bool:
        """Whether it is a profile of the user."""
        return not self.plugin.version

    def __str__(self) -> str:
        if self.is_profile:
            return f"the profile {self.reason}"
        return f"the plugin {self.plugin.name!r} of {self.plugin.origin}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Plugins:
    """Everything that installed plugins have registered, by kind and name."""

    adapters: dict[str, AdapterType] = field(default_factory=dict)
    stores: dict[str, StoreType] = field(default_factory=dict)
    sinks: dict[str, SinkType] = field(default_factory=dict)
    trackers: dict[str, TrackerType] = field(default_factory=dict)
    forges: dict[str, ForgeType] = field(default_factory=dict)
    handoff_kinds: dict[str, HandoffKind] = field(default_factory=dict)
    transformations: dict[str, Transformation] = field(default_factory=dict)
    validators: dict[str, HandoffValidator] = field(default_factory=dict)
    constraints: dict[str, Constraint] = field(default_factory=dict)
    profiles: dict[str, ProfileFormat] = field(default_factory=dict)
    loaded: list[PluginInfo] = field(default_factory=list)
    left_out: list[SkippedPlugin] = field(default_factory=list)
    disabled: list[PluginInfo] = field(default_factory=list)
    """Third-party plugins that `COUNCIL_PLUGINS` does not list; they were not imported."""
    providers: dict[tuple[str, str], PluginInfo] = field(default_factory=dict)
    """The plugin that registered each kind (`adapters`, …) and name."""

    def kinds(self) -> Mapping[str, dict[str, Any]]:
        """Return the registries by kind, in the plural as in the hooks."""
        return {kind: getattr(self, kind) for kind in _KINDS}

    def checked_kinds(self) -> dict[str, HandoffKind]:
        """Return the kinds of handoffs by name, including the validators of plugins."""
        return {name: with_validators(kind, self.validators) for name, kind in self.handoff_kinds.items()}

    def extensions(self) -> Extensions:
        """Return the extensions for a YAML file, in addition to adapters."""
        kinds, transformations = tuple(self.handoff_kinds), tuple(self.transformations)
        return Extensions(self.sinks, self.trackers, self.forges, self.explain, kinds, transformations)

    def open(
        self, kind: str, name: str, stored: AdapterConfig | SinkConfig | TrackerConfig | PullRequestConfig
    ) -> AbstractAsyncContextManager[Any]:
        """Open a stored `sink`, `tracker` or `forge` for the body of an `async with`."""
        open_stream, options = restore_options(
            f"{kind} {name!r}", stored, self.kinds()[f"{kind}s"], self.explain(stored.use)
        )
        opened: AbstractAsyncContextManager[Any] = open_stream(options)
        return opened

    def open_store(self, url: str, clock: Clock) -> AbstractAsyncContextManager[Store]:
        """Open a store within the body; raise RefusedError for an unknown scheme."""
        scheme = scheme_of(url)
        if scheme not in self.stores:
            known = ", ".join(f"{name}:" for name in sorted(self.stores))
            remedy = suggest_similar(scheme, self.stores) or f"use a URL that begins with one of {known}"
            raise RefusedError(f"there is no store for {url!r}", remedy)
        return self.stores[scheme](url, clock)

    def explain(self, name: str) -> str | None:
        """Return a phrase with skipped plugins that may provide a missing name, or None."""
        disabled = {one.name: str(SkippedPlugin(one, f"{PLUGINS_VARIABLE} does not name it")) for one in self.disabled}
        certain = [str(one) for one in self.left_out if name in {one.plugin.name, *one.names}]
        certain += [disabled[name]] if name in disabled else []
        # Plugins that failed before registering, or were not imported, may provide any name.
        possible = [*(str(one) for one in self.left_out if not one.names), *disabled.values()]
        skipped = certain or possible
        return f"skipped: {'; and '.join(skipped)}" if skipped else None


def load_plugins(environ: Mapping[str, str] = os.environ, untrusted_paths: Sequence[Path] = ()) -> Plugins:
    """Load the installed and enabled plugins. Blocks.

    Skips plugins in the repositories of `untrusted_paths` and of the current folder: agents write files there, which
    must not run with the user's permissions.
    """
    plugins = Plugins()
    untrusted = [folder for path in (*untrusted_paths, Path()) for folder in _enclosing_repositories(path.absolute())]
    for entry, plugin in _installed():
        if not _is_enabled(plugin, environ):
            plugins.disabled.append(plugin)
            continue
        registered: dict[str, dict[str, Any]] = {kind: {} for kind in plugins.kinds()}
        try:
            _check_location(entry, plugin, untrusted)
            _call_hooks(entry, plugin, registered)
            _list_profiles(plugin, registered)
            _add_registered(plugins, plugin, registered)
        except PluginError as error:
            names = frozenset(name for registry in registered.values() for name in registry)
            plugins.left_out.append(SkippedPlugin(plugin, error.reason, names))
        else:
            plugins.loaded.append(plugin)
    if USER_PROFILES in plugins.profiles and (folder := user_profiles_folder(environ)) is not None:
        _add_user_profiles(plugins, folder, untrusted)
    return plugins


def _add_user_profiles(plugins: Plugins, folder: Path, untrusted: Sequence[Path]) -> None:
    """Add the user's profiles, which replace installed ones of the same name."""
    installed = {name: file for one in plugins.profiles.values() for name, file in list_profiles(one.folder).items()}
    for name, file in list_profiles(folder).items():
        profile = PluginInfo(name, str(file), "")
        try:
            check_is_own(file, untrusted, plugins.adapters.keys() - installed)
            plugins.adapters[name] = read_profile(file, plugins.profiles[USER_PROFILES], installed)
        except ConfigError as error:
            plugins.left_out.append(SkippedPlugin(profile, describe_errors(error), frozenset({name})))
        else:
            plugins.providers["adapters", name] = profile


def _enclosing_repositories(path: Path) -> list[Path]:
    """Return the repositories that contain a file or folder."""
    return [folder for folder in (path, *path.parents) if (folder / ".git").exists()]


def _installed() -> list[tuple[EntryPoint, PluginInfo]]:
    """Return installed plugins, built-in ones first: others can't take their names."""
    entries = entry_points(group=ENTRY_POINT_GROUP)
    # Once per distribution: each access parses its metadata.
    distributions = {one: _read_name_and_version(one) for one in {entry.dist for entry in entries}}
    plugins = [(entry, PluginInfo(entry.name, *distributions[entry.dist])) for entry in entries]
    return sorted(plugins, key=lambda plugin: (not _is_builtin(plugin[1]), plugin[0].name, plugin[0].value))


def _read_name_and_version(distribution: Distribution | None) -> tuple[str, str]:
    """Return the name and the version of a distribution."""
    metadata = distribution.metadata if distribution is not None else None
    name, version = (str(metadata[field]) if metadata and field in metadata else "?" for field in ("Name", "Version"))
    return name, version


def _is_builtin(plugin: PluginInfo) -> bool:
    return plugin.distribution == OWN_DISTRIBUTION


def _is_enabled(plugin: PluginInfo, environ: Mapping[str, str]) -> bool:
    limit = environ.get(PLUGINS_VARIABLE)
    return limit is None or _is_builtin(plugin) or plugin.name in {name.strip() for name in limit.split(",")}


def _check_location(entry: EntryPoint, plugin: PluginInfo, untrusted: Sequence[Path]) -> None:
    """Raise PluginError for a plugin in an untrusted folder, before it is imported."""
    locations = [] if entry.dist is None else [Path(str(entry.dist.locate_file("")))]
    try:
        # Only the top-level package: finding a submodule would import its package.
        spec = find_spec(entry.module.partition(".")[0])
    except (ImportError, ValueError, AttributeError):  # AttributeError: the entry point names no module
        spec = None  # loading it reports the error
    if spec is not None:
        origins = [Path(origin) for origin in (spec.origin, *(spec.submodule_search_locations or ())) if origin]
        # Developers of this package have it in the repository, and already run it from there.
        locations += [
            origin for origin in origins if not (_is_builtin(plugin) and origin.resolve().is_relative_to(_PACKAGE_ROOT))
        ]
    installed = [Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages(), sys.prefix)]
    for location in map(Path.resolve, locations):
        is_installed = any(location.is_relative_to(folder) for folder in installed)
        if not is_installed and any(location.is_relative_to(folder.resolve()) for folder in untrusted):
            raise PluginError(plugin.name, f"it is inside the run's repository, at {location}: install it elsewhere")


def _call_hooks(entry: EntryPoint, plugin: PluginInfo, registered: Mapping[str, dict[str, Any]]) -> None:
    """Import a plugin and call its hooks, which add to `registered` by kind and name."""
    try:
        with plugin_code(PluginError):
            manager = pluggy.PluginManager(ENTRY_POINT_GROUP)
            manager.add_hookspecs(hookspecs)
            manager.register(entry.load(), name=entry.name)
            manager.check_pending()
            for kind, registry in registered.items():
                getattr(manager.hook, f"council_register_{kind}")(register=_register(plugin, kind, registry))
    except PluginFailed as failed:
        raise PluginError(plugin.name, str(failed)[:_LONGEST_REASON]) from failed
    if not any(registered.values()):
        raise PluginError(plugin.name, "it registers nothing: it has no hook that this version calls")


def _list_profiles(plugin: PluginInfo, registered: Mapping[str, dict[str, Any]]) -> None:
    """Register an adapter for each profile of a plugin, without reading it."""
    for profile_format in registered["profiles"].values():
        for name, file in list_profiles(profile_format.folder).items():
            if name in registered["adapters"]:
                raise PluginError(plugin.name, f"it registers {name!r} twice")
            registered["adapters"][name] = ProfileAdapterType(file, profile_format)


def _register(plugin: PluginInfo, kind: str, registry: dict[str, Any]) -> Callable[[Any, Any], None]:
    expected, is_valid, wanted = _KINDS[kind]

    def register(name: Any, registered: Any) -> None:
        if not isinstance(name, str) or not name or not is_valid(name, registered):
            raise PluginError(plugin.name, f"it registers {registered!r} as {name!r}: expected a name and {expected}")
        if name in registry:
            raise PluginError(plugin.name, f"it registers {name!r} twice")
        if kind == "handoff_kinds" and not isinstance(registered, HandoffKind):
            registered = kind_from_model(name, registered)
        registry[name] = registered
        # The type that a factory function creates can be checked only when it is used.
        names = wanted if isinstance(registered, type) else [one for one in wanted if one == "Options"]
        missing = [one for one in names if not hasattr(registered, one)]
        if missing:
            names = ", ".join(missing)
            reason = f"{name!r} has no {names}: it was written for another version of the contract"
            raise PluginError(plugin.name, reason)
        options = getattr(registered, "Options", None)
        if "Options" in names and not (isinstance(options, type) and issubclass(options, BaseModel)):
            raise PluginError(plugin.name, f"the Options of {name!r} are not a pydantic model")

    return register


def _add_registered(plugins: Plugins, plugin: PluginInfo, registered: Mapping[str, dict[str, Any]]) -> None:
    """Add everything that a plugin registers.

    If a name is taken, adds nothing and raises PluginError.
    """
    for kind, registry in registered.items():
        for name in registry:
            owner = plugins.providers.get((kind, name))
            if owner is not None:
                message = (
                    f"the name {name!r} in {kind} is already registered by the plugin {owner.name!r} of"
                    f" {owner.distribution}"
                )
                raise PluginError(plugin.name, message)
    for kind, registry in registered.items():
        plugins.kinds()[kind].update(registry)
        plugins.providers.update({(kind, name): plugin for name in registry})
