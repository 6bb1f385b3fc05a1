"""Where a command's run comes from: the file that is named, the one that is found, or tasks in words."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.config.inline import InlineTasks, load_inline
from orchestrator.config.load import load_config
from orchestrator.config.location import named_repository
from orchestrator.config.model import RunConfig
from orchestrator.errors import RefusedError
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
    folders = [Path.cwd(), *(await _top_of(Path.cwd(), git) if file is None else [])]
    found = file or next((path for path in (folder / FILE_NAME for folder in folders) if path.exists()), None)
    plugins = await anyio.to_thread.run_sync(load_plugins, os.environ, await worked_on(found, folders[-1]))
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


async def _top_of(folder: Path, git: Git) -> list[Path]:
    """Return the top of the checkout that a folder is in, if it is in one."""
    try:
        repository = await inspect(folder, git)
    except RefusedError:
        return []
    return [] if repository.top is None else [repository.top]


async def worked_on(file: Path | None, folder: Path) -> list[Path]:
    """Return where the repositories are that a command works on: no plugin may lie there."""
    named = None if file is None else await anyio.to_thread.run_sync(named_repository, file)
    return [file or folder, *([] if named is None else [named])]
