"""The environment of a command: the file, the repository, and installed plugins."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.api.loading import find_source_paths
from orchestrator.cli.core.run_source import find_checkout_root, find_config_file
from orchestrator.cli.core.trust import require_trust
from orchestrator.config.inline import InlineTasks, load_inline
from orchestrator.config.load import load_config, read_file
from orchestrator.config.model import RunConfig
from orchestrator.config.source.problems import Problems
from orchestrator.errors import ConfigError, RefusedError
from orchestrator.plugins import Plugins, load_plugins
from orchestrator.repo.git.command import Git

#: A prompt for a file without tasks.
_PROMPT = "Describe this repository."


@dataclass(frozen=True, slots=True)
class CommandEnvironment:
    """The environment; `config` is that of the file, or its mistakes."""

    folder: Path
    top: Path | None
    """The top of the checkout that the folder is in."""
    plugins: Plugins
    file: Path | None
    config: RunConfig | ConfigError | None


async def discover_environment(file: Path | None = None) -> CommandEnvironment:
    """Return what there is around `file`, or else the `council.yaml` of the current folder or of its repository's top.

    What the file asks for beyond the default is confirmed first. A file that is named and can't be read is a
    ConfigError in the scene; without a file there is no config.
    """
    folder = Path.cwd() if file is None else (Path.cwd() / file).parent
    top = await _top_of(folder)
    found = file or find_config_file([folder] if top is None else [folder, top])
    places = await anyio.to_thread.run_sync(find_source_paths, found or folder)
    plugins = await anyio.to_thread.run_sync(load_plugins, os.environ, places)
    config = None if found is None else await anyio.to_thread.run_sync(_load, found, plugins)
    if isinstance(config, RunConfig):
        await require_trust(config, is_named=file is not None)
    return CommandEnvironment(folder, top, plugins, found, config)


def _load(file: Path, plugins: Plugins) -> RunConfig | ConfigError:
    node = read_file(file, Problems(file))
    try:
        if node is not None and not {"tasks", "trackers"} & node.value.keys():
            # It is for `council run "PROMPT"`: any prompt and, without a default, any of its adapters will do.
            named = node.value.get("adapters")
            is_open = node.get("defaults", "adapter") is None and isinstance(named, dict)
            tasks = InlineTasks([_PROMPT], next(iter(named), None) if is_open and named else None)
            with suppress(RefusedError):  # no adapter can run it
                return load_inline(tasks, file, file.parent, plugins.adapters, plugins.extensions())
        return load_config(file, plugins.adapters, plugins.extensions())
    except ConfigError as error:
        return error


async def _top_of(folder: Path) -> Path | None:
    try:
        return await find_checkout_root(folder, Git(None, as_user=True))
    except OSError:  # a git that can't be started
        return None
