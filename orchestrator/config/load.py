"""Load a config file into a resolved run, or report all errors in it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from orchestrator.config import adapters, references
from orchestrator.config.entries import Extensions, read_pull_requests, read_sinks, read_trackers
from orchestrator.config.model import RunConfig, expand_accounts
from orchestrator.config.schema import Config, Need, StateSettings, Task
from orchestrator.config.source.document import RUN_KEYS, Node, read_document
from orchestrator.config.source.files import MAX_FILE_BYTES, open_regular_file
from orchestrator.config.source.problems import INLINE_NAME, Position, Problems, TooManyProblems
from orchestrator.config.source.validation import validate
from orchestrator.config.source.values import read_value
from orchestrator.config.store import folder_url
from orchestrator.config.workflows import load
from orchestrator.domain.settings.fields import NO_WORKFLOW, Settings
from orchestrator.domain.settings.names import is_url
from orchestrator.domain.settings.run_settings import (
    MAX_WORKTREES,
    RunSettings,
    SandboxSettings,
    TaskSettings,
    TaskSpec,
    WorktreeSettings,
)
from orchestrator.protocols import AdapterType

NO_EXTENSIONS: Final = Extensions()
_START: Final = Position(1, 1)


def load_config(
    path: Path, adapter_types: Mapping[str, AdapterType], extensions: Extensions = NO_EXTENSIONS
) -> RunConfig:
    """Return the run that a file describes, with its prompt files read. Blocks.

    `extensions` has the types of sinks and trackers. Raises ConfigError with all errors, in file order.
    """
    problems = Problems(path)
    text = _read_text(path, problems)

    def read() -> Node | None:
        return None if text is None else read_document(text, problems)

    config = build_run_config(read, path.absolute(), adapter_types, extensions, problems)
    return config if text is None or config.texts else config.model_copy(update={"digest": _digest(text)})


def read_digest(path: Path) -> str | None:
    """Return a file's `RunConfig.digest`; None if the file is unreadable. Blocks."""
    text = _read_text(path, Problems(path))
    return None if text is None else _digest(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load_value(
    value: Mapping[str, Any],
    folder: Path,
    adapter_types: Mapping[str, AdapterType],
    name: str = INLINE_NAME,
    extensions: Extensions = NO_EXTENSIONS,
) -> RunConfig:
    """Return the run of a mapping with a file's structure, in `folder`.

    Paths are relative to `folder`. Raises ConfigError with all errors, located by `name` instead of a file, and by
    paths such as `tasks[0].prompt`.
    """
    problems = Problems(name)
    return build_run_config(
        lambda: read_value(value, problems), folder.absolute() / name, adapter_types, extensions, problems
    )


def build_run_config(
    read: Callable[[], Node | None],
    path: Path,
    adapter_types: Mapping[str, AdapterType],
    extensions: Extensions,
    problems: Problems,
) -> RunConfig:
    """Return the run that `read` returns for `path`; raise ConfigError for problems."""
    try:
        root = read()
        config = _read_run(root, path, adapter_types, extensions, problems) if root is not None else None
    except TooManyProblems:
        config = None
    if config is None or problems:
        raise problems.error()
    return config


def read_file(path: Path, problems: Problems, keys: str = RUN_KEYS) -> Node | None:
    """Return a file's top mapping; None, with errors in `problems`, if invalid.

    `keys` are the first keys of such a file, for remedies.
    """
    text = _read_text(path, problems)
    return read_document(text, problems, keys) if text is not None else None


def _read_text(path: Path, problems: Problems) -> str | None:
    try:
        with open_regular_file(path) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        problems.add(_START, "file not found", "use an existing file, or create one with `council init`")
        return None
    except OSError as error:
        problems.add(_START, f"can't read the file: {(error.strerror or str(error)).lower()}", "use a readable file")
        return None
    if len(data) > MAX_FILE_BYTES:
        problems.add(_START, "the file is larger than 8 MiB", "move prompts into separate files (prompt_file)")
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # `start` is an offset into the data without its byte order mark.
        before = error.object[: error.start].decode("utf-8")
        at = Position(before.count("\n") + 1, len(before) - before.rfind("\n"))
        problems.add(at, f"the byte 0x{error.object[error.start]:02x} is not UTF-8", "save the file as UTF-8")
        return None


def _read_run(
    written: Node, path: Path, adapter_types: Mapping[str, AdapterType], extensions: Extensions, problems: Problems
) -> RunConfig | None:
    if not references.check_size(written, problems):
        return None
    root = adapters.add_named_types(written, path.parent, adapter_types)
    only = adapters.find_only_adapter(written, root)
    file = validate(Config, root, problems)
    references.check_references(root, path.parent, problems)
    prompts = references.read_prompts(root, path.parent, problems)
    configured = adapters.read_adapters(root, path.parent, adapter_types, extensions.explain, problems)
    sinks = read_sinks(root, path.parent, extensions, problems)
    trackers = read_trackers(root, path.parent, extensions, problems)
    pull_requests = read_pull_requests(root, path.parent, extensions, problems)
    access = adapters.read_path_access(root, path.parent, problems)
    phases = load.read_workflows(root, path.parent, extensions, problems)
    load.check_contexts(root, problems)
    assigned = adapters.assign_adapters(root, only, phases, adapter_types, path.parent, problems)
    default = adapters.default_adapter(root, only, phases, problems) if trackers else None
    possible = adapters.possible_adapters(root, assigned, phases)
    adapters.try_commands(root, prompts, possible, configured, adapter_types, problems)
    if file is None or problems:
        return None
    run = RunConfig(
        **{name: getattr(file, name) for name in RunSettings.model_fields.keys() - {"repo", "target", "worktrees"}},
        path=path,
        texts=_texts(root, path.parent),
        repo=file.repo if is_url(file.repo) else os.path.realpath(path.parent / file.repo),
        is_url=is_url(file.repo),
        target=file.base if file.target is None and pull_requests is not None else file.target,
        sandbox=SandboxSettings(**{name: getattr(file, name) for name in SandboxSettings.model_fields} | access),
        worktrees=_worktrees(file),
        state=_state(file, path.parent),
        adapters=configured,
        sinks=sinks,
        trackers=trackers,
        pull_requests=pull_requests,
        workflows=phases,
        context=file.context,
        template=_resolve(Task(id="template"), file, "", default) if default is not None else None,
        tasks=tuple(_resolve(task, file, prompts[index], assigned[index]) for index, task in enumerate(file.tasks)),
    )
    return expand_accounts(run)


def _texts(root: Node, folder: Path) -> tuple[Path, ...]:
    nodes = (node.children.get(key) for node in root.walk() for key in ("prompt_file", "schema"))
    names = dict.fromkeys(node.value for node in nodes if node is not None and isinstance(node.value, str))
    return tuple(Path(os.path.realpath(folder / name)) for name in names)


def _resolve(task: Task, file: Config, prompt: str, adapter: str) -> TaskSpec:
    defaults, workflow = file.defaults, task.workflow or file.defaults.workflow
    workflow = None if workflow == NO_WORKFLOW else workflow
    given = {**_given(defaults), **_given(task)}
    for key in ("backoff", "budget", "session_budget"):
        if key in given:
            own, general = getattr(task, key), getattr(defaults, key)
            given[key] = general.model_copy(update=_given(own))
    given |= {"prompt": prompt, "adapter": adapter, "workflow": workflow, "fallback": _fallback(task, defaults)}
    given["context"] = {} if workflow is None else {**file.context, **task.context}
    given |= resolve_needs(task)
    given.pop("prompt_file", None)
    # The parts are already valid: validating them again would take most of the time for a large file.
    return TaskSpec.model_construct(**given)


def resolve_needs(task: Task) -> dict[str, tuple[str, ...]]:
    """Return the needs of a task as fields of its specification."""
    needs = [need if isinstance(need, Need) else Need(task=need) for need in task.needs]
    built = [need.task for need in needs if need.at == "built"]
    return {"needs": tuple(need.task for need in needs), "built_needs": tuple(built)}


def _given(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.model_fields_set}


def _fallback(task: Task, defaults: TaskSettings) -> tuple[str, ...]:
    """Return a task's fallback adapters, without its main adapter if from the default."""
    if "fallback" in task.model_fields_set:
        return task.fallback
    return tuple(name for name in defaults.fallback if task.adapter is None or name != task.adapter)


def _worktrees(file: Config) -> WorktreeSettings:
    if "max" in file.worktrees.model_fields_set:
        return file.worktrees
    return file.worktrees.model_copy(update={"max": default_slot_count(file.capacity)})


def default_slot_count(capacity: int) -> int:
    """Return the default number of worktree slots, with extra ones for checks."""
    return min(max(WorktreeSettings().max, capacity + 1), MAX_WORKTREES)


def _state(file: Config, folder: Path) -> StateSettings:
    if file.state_dir is None:
        return file.state
    url = folder_url(Path(os.path.realpath(folder / Path(file.state_dir).expanduser())))
    return file.state.model_copy(update={"url": url})
