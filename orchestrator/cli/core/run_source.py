"""The source of a command's run: a named file, the default file, or prompts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
import anyio.to_thread
import click

from orchestrator.api.loading import find_source_paths
from orchestrator.cli.core.confirm import require_trust
from orchestrator.config.adapters import has_only_optional_options
from orchestrator.config.inline import InlineTasks, load_inline
from orchestrator.config.load import load_config, read_file
from orchestrator.config.model import RunConfig
from orchestrator.config.source.problems import Problems
from orchestrator.domain.wording import find_similar
from orchestrator.engine.diagnostics.programs import make_default_adapters
from orchestrator.errors import ConfigError, RefusedError
from orchestrator.plugins import Plugins, load_plugins
from orchestrator.project import not_in_repository_error
from orchestrator.repo.git.command import Git
from orchestrator.repo.source.user_checkouts import find_repository, read_current_branch

CONFIG_FILE_NAME = "council.yaml"
#: The suffixes that make an argument a file name, even if the file does not exist.
_CONFIG_SUFFIXES = (".yaml", ".yml")
#: The minimum number of words of a prompt; a single word may be a mistyped file name.
_MIN_PROMPT_WORDS = 2


async def load_run_config(file: Path | None, tasks: InlineTasks | None = None) -> tuple[Plugins, RunConfig]:
    """Return the installed plugins and the run of a file.

    The default file is `council.yaml`. `tasks` replace those of the file. Raises ConfigError if the file has errors,
    RefusedError if a file is required and missing.
    """
    git = Git(None, as_user=True, environ=os.environ)
    top = await find_checkout_root(Path.cwd(), git) if file is None else None
    folders = [Path.cwd()] if top is None else [Path.cwd(), top]
    found = file or find_config_file(folders)
    if (
        found is None
        and (no_repository := await anyio.to_thread.run_sync(not_in_repository_error, folders[-1])) is not None
    ):
        raise no_repository
    places = await anyio.to_thread.run_sync(find_source_paths, found or folders[-1])
    plugins = await anyio.to_thread.run_sync(load_plugins, os.environ, places)
    if tasks is not None:
        if found is None and tasks.base is None:
            tasks = replace(tasks, base=await read_current_branch(folders[-1], git))
        if found is None and tasks.adapter is None:
            tasks = replace(tasks, adapter=_only_installed_adapter(folders[-1], plugins))
        return plugins, await anyio.to_thread.run_sync(
            load_inline, tasks, found, folders[-1], plugins.adapters, plugins.extensions()
        )
    if found is None:
        where = " or ".join(map(str, dict.fromkeys(folders)))
        remedy = (
            'specify a file, write one with `council init`, or give a prompt, for example `council run "fix the bug"`'
        )
        raise RefusedError(f"there is no {CONFIG_FILE_NAME} in {where}", remedy)
    return plugins, await anyio.to_thread.run_sync(load_config, found, plugins.adapters, plugins.extensions())


def is_prompt(text: str) -> bool:
    """Return True if an argument is a prompt, False if it is the name of a file.

    Raises UsageError for a single word without such a file, which may be a mistyped file name.
    """
    if not text.strip():
        return True  # the caller rejects it
    if text.endswith(_CONFIG_SUFFIXES) or os.path.lexists(text):
        return False
    if len(text.split()) < _MIN_PROMPT_WORDS:
        near = find_similar(text, [path.name for path in Path.cwd().glob("*.y*ml")], cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise click.UsageError(f"no such file: {text!r}: {hint}for a prompt of one word use --task {text}")
    return True


def _only_installed_adapter(folder: Path, plugins: Plugins) -> str | None:
    """Return the only adapter type that is installed and needs no options.

    Returns None if there are none or several. An adapter is installed if its programs are on PATH. Those that were
    never run, or can't change files, do not count if there are others.
    """
    types = {name: kind for name, kind in plugins.adapters.items() if has_only_optional_options(kind, folder)}
    made, _ = make_default_adapters(types)
    path = os.environ.get("PATH")
    programs = {name: one.programs() for name, one in made.items()}
    found = [name for name, needed in programs.items() if all(shutil.which(one.name, path=path) for one in needed)]
    sure = [name for name in found if all(one.edits and one.verified != () for one in programs[name])]
    return next((names[0] for names in (sure, found) if len(names) == 1), None)


async def find_checkout_root(folder: Path, git: Git) -> Path | None:
    """Return the root of the checkout that contains a folder; None if there is none."""
    try:
        return (await find_repository(folder, git)).top
    except RefusedError:
        return None


def find_config_file(folders: Iterable[Path]) -> Path | None:
    """Return the first `council.yaml` in some folders; None if there is none."""
    return next((path for path in (folder / CONFIG_FILE_NAME for folder in folders) if path.exists()), None)


#: A prompt with which a file without tasks can be checked.
_PROMPT = "Describe this repository."


@dataclass(frozen=True, slots=True)
class CommandEnvironment:
    """The project, plugins and run file of a command.

    `config` is the run of the file, its errors, or None without a file.
    """

    folder: Path
    top: Path | None
    """The root of the checkout that contains the folder."""
    plugins: Plugins
    file: Path | None
    config: RunConfig | ConfigError | None


async def discover_environment(file: Path | None = None) -> CommandEnvironment:
    """Return the environment of `file`, by default of the project's `council.yaml`.

    Asks the user to confirm the permissions that the file requests. If the file can't be read, `config` is the
    ConfigError.
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
            # The file is for `council run "PROMPT"`: check it with any prompt and, without a default, any adapter.
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
