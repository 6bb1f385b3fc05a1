"""Where a command's run comes from: the file that is named, the one that is found, or tasks in words."""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread
import click

from orchestrator.api.loading import worked_on
from orchestrator.config.adapters import needs_no_options
from orchestrator.config.inline import InlineTasks, load_inline
from orchestrator.config.load import load_config
from orchestrator.config.model import RunConfig
from orchestrator.engine.diagnostics.programs import make_without_options
from orchestrator.errors import RefusedError
from orchestrator.plugins import Plugins, load_plugins
from orchestrator.project import outside
from orchestrator.repo.git.runner import Git
from orchestrator.repo.source.checkout import current_branch, inspect

FILE_NAME = "council.yaml"
#: How the names of files end that a run can be of, also of those that are not there.
_ENDINGS = (".yaml", ".yml")
#: Words of what says what to do.
_FEWEST_WORDS = 2


async def read_config(file: Path | None, tasks: InlineTasks | None = None) -> tuple[Plugins, RunConfig]:
    """Return the run of a file (`council.yaml` unless named), with these tasks instead of its own where there are any.

    Beside it the plugins that it was read with.

    Raises ConfigError for mistakes, RefusedError if a file is needed and there is none.
    """
    git = Git(None, users=True, environ=os.environ)
    top = await top_of(Path.cwd(), git) if file is None else None
    folders = [Path.cwd()] if top is None else [Path.cwd(), top]
    found = file or find_file(folders)
    if found is None and (no_repository := await anyio.to_thread.run_sync(outside, folders[-1])) is not None:
        raise no_repository
    places = await anyio.to_thread.run_sync(worked_on, found or folders[-1])
    plugins = await anyio.to_thread.run_sync(load_plugins, os.environ, places)
    if tasks is not None:
        if found is None and tasks.base is None:
            tasks = replace(tasks, base=await current_branch(folders[-1], git))
        if found is None and tasks.adapter is None:
            tasks = replace(tasks, adapter=_only_installed(folders[-1], plugins))
        return plugins, await anyio.to_thread.run_sync(
            load_inline, tasks, found, folders[-1], plugins.adapters, plugins.extensions()
        )
    if found is None:
        where = " or ".join(map(str, dict.fromkeys(folders)))
        remedy = 'name a file, write one with `council init`, or say what to do, as in `council run "fix the bug"`'
        raise RefusedError(f"there is no {FILE_NAME} in {where}", remedy)
    return plugins, await anyio.to_thread.run_sync(load_config, found, plugins.adapters, plugins.extensions())


def is_prompt(text: str) -> bool:
    """Whether an argument says what to do, and names no file.

    UsageError for a single word that is neither, which may as well be a file's name with a mistake in it.
    """
    if not text.strip():
        return True  # which is refused as an empty prompt
    if text.endswith(_ENDINGS) or os.path.lexists(text):
        return False
    if len(text.split()) < _FEWEST_WORDS:
        near = difflib.get_close_matches(text, (path.name for path in Path.cwd().glob("*.y*ml")), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise click.UsageError(f"there is no file {text!r}: {hint}for a task of one word write --task {text}")
    return True


def _only_installed(folder: Path, plugins: Plugins) -> str | None:
    """Return the one adapter that takes no options and has its programs on PATH; None for none or several."""
    types = {name: kind for name, kind in plugins.adapters.items() if needs_no_options(kind, folder)}
    made, _ = make_without_options(types)
    path = os.environ.get("PATH")
    ready = [
        name for name, one in made.items() if all(shutil.which(program.name, path=path) for program in one.programs())
    ]
    return ready[0] if len(ready) == 1 else None


async def top_of(folder: Path, git: Git) -> Path | None:
    """Return the top of the checkout that a folder is in, if it is in one."""
    try:
        return (await inspect(folder, git)).top
    except RefusedError:
        return None


def find_file(folders: Iterable[Path]) -> Path | None:
    """Return the `council.yaml` of the first of the folders that has one."""
    return next((path for path in (folder / FILE_NAME for folder in folders) if path.exists()), None)
