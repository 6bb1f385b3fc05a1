"""Loading and validation of a council's run and project."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio.to_thread
import yaml

from orchestrator.config.load import load_config, load_value
from orchestrator.config.model import RunConfig
from orchestrator.config.schema import Config
from orchestrator.config.source.document import MAX_DEPTH
from orchestrator.config.source.files import MAX_FILE_BYTES, open_regular_file
from orchestrator.domain.settings.fields import TO_FILE
from orchestrator.domain.settings.names import is_url
from orchestrator.engine.diagnostics.preflight import project_of_config
from orchestrator.engine.diagnostics.trust import find_unconfirmed, list_requests, unconfirmed_error
from orchestrator.plugins import Plugins, load_plugins
from orchestrator.project import Project
from orchestrator.repo.source.run_repository import find_run_repository


async def load_run(
    source: str | Path | Config | RunConfig, plugins: Plugins | None, environ: Mapping[str, str]
) -> tuple[Plugins, RunConfig, Project]:
    """Return the plugins, the validated run of `source`, and its project.

    The default plugins are the installed ones.
    """
    if plugins is None:
        paths = await anyio.to_thread.run_sync(find_source_paths, source)
        plugins = await anyio.to_thread.run_sync(load_plugins, environ, paths)
    config = await anyio.to_thread.run_sync(_load, source, plugins)
    return (
        plugins,
        config,
        project_of_config(config, await find_run_repository(config.repo, is_url=config.is_url, environ=environ)),
    )


async def load_confirmed(file: Path, environ: Mapping[str, str]) -> tuple[Plugins, RunConfig]:
    """Return the installed plugins, and the run of a file that the user has not chosen.

    Raises ConfigError if the file has errors, RefusedError if it requests permissions that the user has not confirmed.
    """
    paths = await anyio.to_thread.run_sync(find_source_paths, file)
    plugins = await anyio.to_thread.run_sync(load_plugins, environ, paths)
    config = await anyio.to_thread.run_sync(_load, file, plugins)
    requests = await list_requests(config, environ, is_chosen=False)
    if new := await find_unconfirmed(config.path, requests, environ):
        remedy = f"ask the user to read the file and to run `council doctor {shlex.quote(str(file))} --trust`"
        raise unconfirmed_error(config.path, new, remedy)
    return plugins, config


def find_source_paths(source: str | Path | Config | RunConfig) -> list[Path]:
    """Return the file, if any, and the local repository of a run. Blocks.

    Plugins inside these are untrusted.
    """
    match source:
        case RunConfig():
            return [source.path, *([] if source.is_url else [Path(source.repo)])]
        case Config():
            return [] if is_url(source.repo) else [Path(source.repo)]
        case _:
            named = named_repository(Path(source))
            return [Path(source), *([] if named is None else [named])]


def _load(source: str | Path | Config | RunConfig, plugins: Plugins) -> RunConfig:
    match source:
        case RunConfig():
            return source
        case Config():
            value = source.model_dump(mode="json", exclude_unset=True, context=TO_FILE)
            return load_value(_without_none(value), Path.cwd(), plugins.adapters, "Config", plugins.extensions())
        case _:
            return load_config(Path(source), plugins.adapters, plugins.extensions())


def _without_none(value: Any) -> Any:
    """Return a config without keys that are None, as in a file.

    Values and schemas of users may contain None.
    """
    match value:
        case dict():
            kept = {key: each for key, each in value.items() if each is not None}
            return {key: each if key in {"context", "schema"} else _without_none(each) for key, each in kept.items()}
        case list():
            return [_without_none(each) for each in value]
    return value


def named_repository(path: Path) -> Path | None:
    """Return the folder under a file's key `repo`; None if missing or unreadable.

    Blocks. Stops reading at that key.
    """
    try:
        with open_regular_file(path) as file:
            events = yaml.parse(file.read(MAX_FILE_BYTES), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            repo = next((value for key, value in _top_scalars(events) if key == "repo"), None)
        return None if repo is None or is_url(repo) else Path(os.path.realpath(path.parent / repo))
    except (yaml.YAMLError, OSError, ValueError, OverflowError):
        return None


def _top_scalars(events: Iterator[yaml.Event]) -> Iterator[tuple[str, str]]:
    """Yield the keys and values of the top mapping whose values are scalars."""
    depth, key = 0, None
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:  # rejected later; the cost of parsing is proportional to depth times length
                return
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            key = None if depth == 1 else key
        elif depth == 1 and isinstance(event, yaml.ScalarEvent):
            if key is None:
                key = event.value
            else:
                yield key, event.value
                key = None
