"""Load a config file into a resolved run, or report every mistake in it."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from orchestrator.config import adapters, references
from orchestrator.config.entries import Extensions, read_sinks, read_trackers
from orchestrator.config.model import (
    Backoff,
    BudgetConfig,
    CoordinationConfig,
    LimitsConfig,
    McpServerConfig,
    Retention,
    RunConfig,
    SandboxConfig,
    StateConfig,
    TaskSpec,
    WorktreesConfig,
)
from orchestrator.config.schema import (
    NO_WORKFLOW,
    BackoffSettings,
    BudgetSettings,
    Config,
    NetworkSettings,
    Task,
    TaskDefaults,
)
from orchestrator.config.source.document import Node, read_document
from orchestrator.config.source.files import MAX_FILE_BYTES, open_regular_file
from orchestrator.config.source.names import is_url
from orchestrator.config.source.problems import Position, Problems, TooManyProblems
from orchestrator.config.source.validation import validate
from orchestrator.config.source.values import read_value
from orchestrator.config.store import folder_url
from orchestrator.config.workflows import load
from orchestrator.domain.runs.failures import RETRIED_BY_DEFAULT, FailureClass
from orchestrator.protocols import AdapterType

T = TypeVar("T")

NO_EXTENSIONS: Final = Extensions()
_START: Final = Position(1, 1)
_TIMEOUT: Final = 30 * 60.0
_IDLE_TIMEOUT: Final = 10 * 60.0
_CHECKS_TIMEOUT: Final = 10 * 60.0
_MAX_FILE: Final = 50_000_000


def load_config(
    path: Path, adapter_types: Mapping[str, AdapterType], extensions: Extensions = NO_EXTENSIONS
) -> RunConfig:
    """Return the run that a file describes, with its prompt files read. Blocks.

    `extensions` has the types of sinks and trackers. Raises ConfigError with all mistakes, in file order.
    """
    problems = Problems(path)
    text = _read_text(path, problems)

    def read() -> Node | None:
        return None if text is None else read_document(text, problems)

    config = build_run_config(read, path.absolute(), adapter_types, extensions, problems)
    return config if text is None or config.texts else config.model_copy(update={"digest": _digest(text)})


def read_digest(path: Path) -> str | None:
    """Return the digest of a file as in `RunConfig.digest`; None if it can't be read. Blocks."""
    text = _read_text(path, Problems(path))
    return None if text is None else _digest(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load_value(
    value: Mapping[str, Any],
    folder: Path,
    adapter_types: Mapping[str, AdapterType],
    name: str = "<run>",
    extensions: Extensions = NO_EXTENSIONS,
) -> RunConfig:
    """Return the run that a mapping with the structure of a file describes; paths are relative to `folder`.

    Raises ConfigError with all mistakes, located by `name` instead of a file and by a path such as `tasks[0].prompt`.
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
    """Return the run that `read` returns for `path`; raise ConfigError if `problems` has any entry afterwards."""
    try:
        root = read()
        config = _read_run(root, path, adapter_types, extensions, problems) if root is not None else None
    except TooManyProblems:
        config = None
    if config is None or problems:
        raise problems.error()
    return config


def read_file(path: Path, problems: Problems) -> Node | None:
    """Return the top mapping of a file; None if it can't be parsed. Mistakes are added to `problems`."""
    text = _read_text(path, problems)
    return read_document(text, problems) if text is not None else None


def _read_text(path: Path, problems: Problems) -> str | None:
    try:
        with open_regular_file(path) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        problems.add(_START, "file not found", "name an existing file, or write one with `council init`")
        return None
    except OSError as error:
        problems.add(
            _START, f"the file can't be read, {(error.strerror or str(error)).lower()}", "name a readable file"
        )
        return None
    if len(data) > MAX_FILE_BYTES:
        problems.add(_START, "the file is larger than 8 MiB", "move prompts into files of their own (prompt_file)")
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
    references.check_required_sections(root, problems)
    references.check_empty_keys(root, problems)
    references.check_folder(root, path.parent, problems)
    references.check_ids(root, problems)
    references.check_needs(root, problems)
    prompts = references.read_prompts(root, path.parent, problems)
    configured = adapters.read_adapters(root, path.parent, adapter_types, extensions.explain, problems)
    sinks = read_sinks(root, path.parent, extensions, problems)
    trackers = read_trackers(root, path.parent, extensions, problems)
    reach = adapters.read_path_access(root, path.parent, problems)
    references.check_state(root, problems)
    references.check_coordination(root, problems)
    references.check_network(root, problems)
    references.check_copied_files(root, problems)
    references.check_commands(root, problems)
    references.check_mcp_servers(root, problems)
    phases = load.read_workflows(root, path.parent, extensions, problems)
    load.check_contexts(root, problems)
    assigned = adapters.assign_adapters(root, only, phases, problems)
    default = adapters.default_adapter(root, only, phases, problems) if trackers else None
    possible = adapters.possible_adapters(root, assigned, phases)
    adapters.try_commands(root, prompts, possible, configured, adapter_types, problems)
    if file is None or problems:
        return None
    backoff = _backoff(file.defaults.backoff, Backoff())
    return RunConfig(
        path=path,
        texts=_texts(root, path.parent),
        repo=file.repo if is_url(file.repo) else os.path.realpath(path.parent / file.repo),
        is_url=is_url(file.repo),
        base=file.base,
        target=file.target,
        capacity=file.capacity,
        session_memory=file.session_memory,
        fence=SandboxConfig(
            sandbox=file.sandbox,
            network=file.network == "on",
            hosts=file.network.allow if isinstance(file.network, NetworkSettings) else (),
            nesting=file.nested_sandboxes,
            limits=LimitsConfig.model_validate(dict(file.limits)),
            reach=reach,
        ),
        worktrees=_worktrees(file),
        mcp_servers={
            name: McpServerConfig(argv=server.command or (), env=server.env, url=server.url)
            for name, server in file.mcp_servers.items()
        },
        budget=_budget(file.budget),
        prices=file.prices,
        state=_state(file, path.parent),
        coordination=CoordinationConfig.model_validate(file.coordination.model_dump(exclude_unset=True)),
        adapters=configured,
        sinks=sinks,
        trackers=trackers,
        workflows=phases,
        context=file.context,
        template=_template(file, backoff, default) if default is not None else None,
        tasks=tuple(
            _resolve(task, file, backoff, prompts[index], assigned[index]) for index, task in enumerate(file.tasks)
        ),
    )


def _texts(root: Node, folder: Path) -> tuple[Path, ...]:
    nodes = (node.children.get(key) for node in root.walk() for key in ("prompt_file", "schema"))
    names = dict.fromkeys(node.value for node in nodes if node is not None and isinstance(node.value, str))
    return tuple(Path(os.path.realpath(folder / name)) for name in names)


def _template(file: Config, backoff: Backoff, adapter: str) -> TaskSpec:
    return _resolve(Task(id="template"), file, backoff, "", adapter)


def _resolve(task: Task, file: Config, backoff: Backoff, prompt: str, adapter: str) -> TaskSpec:
    defaults, workflow = file.defaults, task.workflow or file.defaults.workflow
    workflow = None if workflow == NO_WORKFLOW else workflow
    idle_timeout = task.idle_timeout or defaults.idle_timeout or _IDLE_TIMEOUT
    attempts = task.attempts or defaults.attempts
    spec = TaskSpec(
        id=task.id,
        prompt=prompt,
        needs=task.needs,
        adapter=adapter,
        fallback=_fallback(task, defaults),
        timeout=task.timeout or defaults.timeout or _TIMEOUT,
        idle_timeout=None if idle_timeout == math.inf else idle_timeout,
        backoff=_backoff(task.backoff, backoff),
        retry_on=frozenset(map(FailureClass, _first(task.retry_on, defaults.retry_on, RETRIED_BY_DEFAULT))),
        checks=_first(task.checks, defaults.checks, ()),
        checks_timeout=task.checks_timeout or defaults.checks_timeout or _CHECKS_TIMEOUT,
        checks_env=_first(task.checks_env, defaults.checks_env, ()),
        allow_failing_base=_first(task.allow_failing_base, defaults.allow_failing_base, False),
        retry_checks=(task.on_checks_failed or defaults.on_checks_failed or "retry") == "retry",
        max_file=task.max_file or defaults.max_file or _MAX_FILE,
        priority=_first(task.priority, defaults.priority, 0),
        owns=task.owns,
        on_out_of_scope=task.on_out_of_scope or defaults.on_out_of_scope or "retry",
        instructions=_first(task.instructions, defaults.instructions, None),
        budget=_budget(task.budget, defaults.budget),
        session_budget=_budget(task.session_budget, defaults.session_budget),
        workflow=workflow,
        context={} if workflow is None else {**file.context, **task.context},
    )
    return spec if attempts is None else spec.model_copy(update={"attempts": attempts})


def _budget(*entries: BudgetSettings | None) -> BudgetConfig:
    """Return the merged limits; earlier entries override later ones."""
    limits: dict[str, float | int] = {}
    for entry in entries:
        limits = (entry.model_dump(exclude_none=True) if entry is not None else {}) | limits
    return BudgetConfig.model_validate(limits)


def _fallback(task: Task, defaults: TaskDefaults) -> tuple[str, ...]:
    """Return the fallback adapters of a task; its own adapter is removed from the default list."""
    if task.fallback is not None or task.adapter is None:
        return _first(task.fallback, defaults.fallback, ())
    return tuple(name for name in defaults.fallback or () if name != task.adapter)


def _first(own: T | None, default: T | None, otherwise: T) -> T:
    """Return the first value that is not None; it may be empty."""
    return own if own is not None else default if default is not None else otherwise


def _backoff(entry: BackoffSettings | None, default: Backoff) -> Backoff:
    return default.model_copy(update=entry.model_dump(exclude_none=True)) if entry is not None else default


def _worktrees(file: Config) -> WorktreesConfig:
    given = file.worktrees.model_dump()
    most = {} if given["max"] is not None else {"max": default_slot_count(file.capacity)}
    return WorktreesConfig.model_validate(given | most)


def default_slot_count(capacity: int) -> int:
    """Return the default number of worktree slots: at least one more than sessions, for checks."""
    return max(WorktreesConfig().max, capacity + 1)


def _state(file: Config, folder: Path) -> StateConfig:
    url = file.state.url
    if file.state_dir is not None:
        url = folder_url(Path(os.path.realpath(folder / Path(file.state_dir).expanduser())))
    age = None if file.state.retention == math.inf else file.state.retention
    return StateConfig(url=url, retention=Retention(age=age, size=file.state.max_size))
