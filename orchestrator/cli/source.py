"""Where a command's run comes from: the file that is named, the one that is found, or tasks in words."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.config.inline import InlineTasks, load_inline
from orchestrator.config.load import load_config
from orchestrator.config.model import RunConfig
from orchestrator.errors import RefusedError
from orchestrator.loading import worked_on
from orchestrator.plugins import Plugins, load_plugins
from orchestrator.repo.checkout import current_branch, inspect
from orchestrator.repo.git import Git

FILE_NAME = "council.yaml"


async def read_config(file: Path | None, tasks: InlineTasks | None = None) -> tuple[Plugins, RunConfig]:
    """Return the run of a file (`council.yaml` unless named), with these tasks instead of its own where there are any.

    Beside it the plugins that it was read with.

    Raises ConfigError for mistakes, RefusedError if a file is needed and there is none.
    """
    git = Git(None, users=True, environ=os.environ)
    top = await top_of(Path.cwd(), git) if file is None else None
    folders = [Path.cwd()] if top is None else [Path.cwd(), top]
    found = file or find_file(folders)
    places = await anyio.to_thread.run_sync(worked_on, found or folders[-1])
    plugins = await anyio.to_thread.run_sync(load_plugins, os.environ, places)
    if tasks is not None:
        if found is None and tasks.base is None:
            tasks = replace(tasks, base=await current_branch(folders[-1], git))
        return plugins, await anyio.to_thread.run_sync(
            load_inline, tasks, found, folders[-1], plugins.adapters, plugins.extensions()
        )
    if found is None:
        where = " or ".join(map(str, dict.fromkeys(folders)))
        remedy = "name a file, write one with `council init`, or say what to do with --task"
        raise RefusedError(f"there is no {FILE_NAME} in {where}", remedy)
    return plugins, await anyio.to_thread.run_sync(load_config, found, plugins.adapters, plugins.extensions())


async def top_of(folder: Path, git: Git) -> Path | None:
    """Return the top of the checkout that a folder is in, if it is in one."""
    try:
        return (await inspect(folder, git)).top
    except RefusedError:
        return None


def find_file(folders: Iterable[Path]) -> Path | None:
    """Return the `council.yaml` of the first of the folders that has one."""
    return next((path for path in (folder / FILE_NAME for folder in folders) if path.exists()), None)
