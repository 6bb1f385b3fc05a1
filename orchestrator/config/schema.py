"""Pydantic models of the config file as users write it, before cross-references are checked."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationInfo,
    WithJsonSchema,
)

from orchestrator.config.source.names import (
    BRANCH_PATTERN,
    KEPT_PATTERN,
    NAME_PATTERN,
    PATH_PATTERN,
    check_branch,
    check_kept_path,
    check_name,
    check_path,
    check_repo,
)
from orchestrator.config.source.problems import describe_value, quote_text
from orchestrator.config.source.quantities import (
    COUNT_PATTERN,
    DURATION_PATTERN,
    MAX_COUNT,
    MAX_DOLLARS,
    MAX_RETENTION,
    OPTIONAL_DURATION_PATTERN,
    SIZE_PATTERN,
    check_bytes,
    check_seconds,
    format_duration,
    format_size,
    parse_count,
    parse_duration,
    parse_optional_duration,
    parse_size,
)
from orchestrator.config.store import STORE_PATTERN, check_store_url
from orchestrator.domain.runs.failures import RETRYABLE
from orchestrator.domain.runs.model import MAX_CAPACITY
from orchestrator.domain.runs.prices import Price
from orchestrator.domain.scheduling.path_patterns import check_pattern
from orchestrator.domain.security.hosts import parse_allowed_host

MAX_TASKS = 100_000
MAX_RETRIES = 99
MAX_PHASES = 50
MAX_HOSTS = 1_000
#: The value of `workflow` for a task without a workflow, where the defaults name one.
NO_WORKFLOW: Final = "none"
#: Size limit of one `context:` mapping as JSON, in bytes.
MAX_CONTEXT_BYTES: Final = 64 << 10
VALUE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


def _check_version(version: int) -> int:
    if version != 1:
        raise ValueError(f"unsupported version {version}: write 1")
    return version


def _check_prompt(prompt: str) -> str:
    if not prompt.strip():
        raise ValueError("the prompt is empty: describe the task")
    return prompt


# Numbers in a file need a unit; numbers passed from Python are seconds or bytes.
def _seconds(value: Any, info: ValidationInfo) -> float:
    return check_seconds(value) if _is_number_from_code(value, info) else parse_duration(value)


def _idle_timeout(value: Any, info: ValidationInfo) -> float:
    if value == math.inf and not _is_from_file(info):
        return math.inf
    return check_seconds(value) if _is_number_from_code(value, info) else parse_optional_duration(value)


def _retention(value: Any, info: ValidationInfo) -> float:
    if value == math.inf and not _is_from_file(info):
        return math.inf
    if _is_number_from_code(value, info):
        return check_seconds(value, longest=MAX_RETENTION)
    return parse_optional_duration(value, longest=MAX_RETENTION)


def _bytes(value: Any, info: ValidationInfo) -> int:
    return check_bytes(value) if _is_number_from_code(value, info) and type(value) is int else parse_size(value)


def _is_number_from_code(value: Any, info: ValidationInfo) -> bool:
    return not _is_from_file(info) and type(value) in {int, float}


def _is_from_file(info: ValidationInfo) -> bool:
    return bool(info.context and info.context.get("from_file"))


def _text(pattern: str) -> WithJsonSchema:
    """Return the JSON Schema of a string that a validator here checks: a search pattern, for editors."""
    return WithJsonSchema({"type": "string", "pattern": pattern})


_NOT_BLANK = r"\S"
Name = Annotated[str, AfterValidator(check_name), _text(NAME_PATTERN)]
Branch = Annotated[str, AfterValidator(check_branch), _text(BRANCH_PATTERN)]
Duration = Annotated[
    float, BeforeValidator(_seconds), PlainSerializer(format_duration, when_used="json"), _text(DURATION_PATTERN)
]
Attempts = Annotated[int, Field(ge=1, le=100)]
Prompt = Annotated[str, AfterValidator(_check_prompt), _text(_NOT_BLANK)]


_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _check_env_name(name: str) -> str:
    if not _ENV_NAME.fullmatch(name):
        raise ValueError(
            f"{quote_text(name)} is not a valid variable name: use letters, digits and '_', not starting with a digit"
        )
    return name


def _check_retryable(name: str) -> str:
    if name not in RETRYABLE:
        raise ValueError(f"{quote_text(name)} is not a retryable failure class: use {', '.join(sorted(RETRYABLE))}")
    return name


def _check_command(command: str) -> str:
    if not command.strip() or "\0" in command:
        raise ValueError("a command is empty or contains a NUL character: write a shell command, or remove it")
    return command


def _step(value: Any) -> Any:
    match value:
        case str():
            return {"run": value}
        case dict() | BaseModel():
            return value
    raise ValueError(f"a step can't be {describe_value(value)}: write a shell command, or a mapping with `run:`")


def _store(value: Any) -> Any:
    match value:
        case str():
            return {"url": value}
        case dict() | BaseModel():
            return value
    raise ValueError(f"a store can't be {describe_value(value)}: write its URL, or a mapping")


def _network(value: Any) -> str:
    return "hosts" if isinstance(value, dict | BaseModel) else "word"


def _check_network(value: Any) -> Any:
    if value not in ("on", "off"):  # not a set: the value may be unhashable
        raise ValueError(
            f"the network can't be {describe_value(value)}: write on, off, or {{allow: [api.example.com]}}"
        )
    return value


def _check_host(text: str) -> str:
    return str(parse_allowed_host(text))


def _produces(value: Any) -> Any:
    match value:
        case str():
            return {"kind": value}
        case dict() | BaseModel():
            return value
    raise ValueError(
        f"a handoff can't be {describe_value(value)}: write its kind, or a mapping with `kind:` and `schema:`"
    )


def _session(value: Any) -> Any:
    match value:
        case "continue":
            return {}
        case dict() | BaseModel():
            return value
    raise ValueError(f"a session can't be {describe_value(value)}: write `continue`, or {{continue: PHASE}}")


def _expand(value: Any) -> Any:
    match value:
        case True:
            return {}
        case False:
            return None
        case dict() | BaseModel():
            return value
    raise ValueError(f"expand can't be {describe_value(value)}: write true, or a mapping with `max:` and `workflow:`")


def _phase(value: Any) -> Any:
    match value:
        case str():
            return {value: {}}
        case dict() if len(value) == 1:
            name, settings = next(iter(value.items()))
            if settings is not None:
                return value
            raise ValueError(f"the phase {quote_text(str(name))} is empty: write `- {name}`, or its keys")
        case dict() if value and next(iter(value.values())) is None:
            name = next(iter(value))
            raise ValueError(
                f"the keys of the phase {quote_text(str(name))} are at the level of its name: indent them further"
            )
    raise ValueError(
        f"a phase can't be {describe_value(value)}: write `- NAME: {{…}}`, one name with the keys of the phase"
    )


def _check_value_name(name: str) -> str:
    if not VALUE_NAME.fullmatch(name):
        raise ValueError(
            f"{quote_text(name)} is not a valid value name: "
            "use up to 64 letters, digits and '_', not starting with a digit"
        )
    return name


def _check_context(context: dict[str, Any]) -> dict[str, Any]:
    size = len(json.dumps(context, ensure_ascii=False, default=str).encode())
    if size > MAX_CONTEXT_BYTES:
        raise ValueError(f"these values take {size} bytes: use at most {MAX_CONTEXT_BYTES}, or name a file to read")
    return context


def _check_workflow_name(name: str) -> str:
    if name == NO_WORKFLOW:
        raise ValueError(f"{NO_WORKFLOW!r} is reserved for tasks without a workflow: choose another name")
    return check_name(name)


def _check_key(key: str) -> str:
    for part in key.split("/"):
        check_name(part)
    return key


RetryableName = Annotated[str, AfterValidator(_check_retryable), WithJsonSchema({"enum": sorted(RETRYABLE)})]
EnvName = Annotated[str, AfterValidator(_check_env_name), _text(f"^{_ENV_NAME.pattern}$")]
Command = Annotated[str, AfterValidator(_check_command), _text(_NOT_BLANK)]
IdleTimeout = Annotated[
    float,
    BeforeValidator(_idle_timeout),
    PlainSerializer(format_duration, when_used="json"),
    _text(OPTIONAL_DURATION_PATTERN),
]
Retention = Annotated[
    float,
    BeforeValidator(_retention),
    PlainSerializer(format_duration, when_used="json"),
    _text(OPTIONAL_DURATION_PATTERN),
]
StoreUrl = Annotated[str, AfterValidator(check_store_url), _text(STORE_PATTERN)]
Size = Annotated[int, BeforeValidator(_bytes), PlainSerializer(format_size, when_used="json"), _text(SIZE_PATTERN)]
Count = Annotated[
    int,
    BeforeValidator(parse_count),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": MAX_COUNT},
                {"type": "string", "pattern": COUNT_PATTERN},
            ]
        }
    ),
]
AllowedHost = Annotated[str, AfterValidator(_check_host), _text(r"^(?:\*\.)?[^\s/@*]+$")]
PathPattern = Annotated[str, AfterValidator(check_pattern), _text(r"^(?!/)[^\\]+$")]
Paths = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
RepositoryPaths = Annotated[
    tuple[Annotated[str, AfterValidator(check_path), _text(PATH_PATTERN)], ...], Field(strict=False)
]
KeptPaths = Annotated[
    tuple[Annotated[str, AfterValidator(check_kept_path), _text(KEPT_PATTERN)], ...], Field(strict=False)
]
Commands = Annotated[tuple[Command, ...], Field(strict=False)]
EnvNames = Annotated[tuple[EnvName, ...], Field(strict=False)]
ValueName = Annotated[str, AfterValidator(_check_value_name), _text(f"^{VALUE_NAME.pattern}$")]
Context = Annotated[dict[ValueName, Any], AfterValidator(_check_context)]
WorkflowName = Annotated[str, AfterValidator(_check_workflow_name), _text(NAME_PATTERN)]
Key = Annotated[str, AfterValidator(_check_key), _text(r"\S")]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)


class BackoffSettings(_Entry):
    """The wait before a failed task is retried; missing keys come from the defaults."""

    initial: Duration | None = None
    """The wait before the second attempt. Default: 2s."""
    factor: Annotated[float, Field(ge=1)] | None = None
    """The factor by which each wait is longer than the previous one. Default: 2."""
    max: Duration | None = None
    """The longest wait. Default: 5m."""
    jitter: bool | None = None
    """Whether to draw each wait at random between zero and its full length. Default: true."""


class BudgetSettings(_Entry):
    """Spending limits; a missing key means no limit."""

    tokens: Count | None = None
    """Input and output tokens, such as 500k or 2M."""
    cost: Annotated[float, Field(gt=0, le=MAX_DOLLARS, strict=False)] | None = None
    """US dollars, as far as they are known."""
    time: Duration | None = None
    """The sum of the wall-clock times of sessions."""


class NetworkSettings(_Entry):
    """The hosts that sessions and checks may reach by HTTP and HTTPS, through a proxy; all other hosts are blocked."""

    allow: Annotated[tuple[AllowedHost, ...], Field(strict=False, min_length=1, max_length=MAX_HOSTS)]
    """Hosts such as api.example.com (ports 80 and 443), *.example.com (its subdomains), or localhost:8080."""


class LimitSettings(_Entry):
    """Resource limits of each process; a missing key sets no limit."""

    memory: Size | None = None
    """Private memory."""
    file_size: Size | None = None
    """The size of the largest file that it may write."""
    open_files: Annotated[int, Field(ge=64, le=1 << 20)] | None = None
    """Open files, sockets and pipes."""
    processes: Annotated[int, Field(ge=16, le=1 << 22)] | None = None
    """Processes of the same user, including unrelated ones; no limit for root."""


class McpServerSettings(_Entry):
    """A Model Context Protocol server."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["command"]}, {"required": ["url"]}]})

    command: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, min_length=1)] | None = None
    """The program and its arguments, which uses standard input and output; or use `url`."""
    env: EnvNames = ()
    """Names of environment variables that it gets; the session gets them too."""
    url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    """The URL of a server (streamable HTTP)."""


class HandoffSettings(_Entry):
    """The handoff that a phase produces."""

    kind: Name
    """The kind: scout, plan, build, test, deploy, review, one from a plugin, or, with `schema`, a custom one."""
    schema_: Annotated[str, Field(min_length=1)] | dict[str, Any] | None = Field(None, alias="schema")
    """The JSON Schema (draft 2020-12) of the handoff: a file, relative to this one, or the schema itself."""


class ContinueSettings(_Entry):
    """The conversation that a phase continues."""

    continue_: Name | None = Field(None, alias="continue")
    """An earlier phase. Default: the previous phase."""


class ExpansionSettings(_Entry):
    """How the tasks of a plan become tasks of the run."""

    max: Annotated[int, Field(ge=1, le=1000)] = 20
    """The largest number of tasks."""
    workflow: WorkflowName | None = None
    """The workflow of each task. Default: none."""


class PhaseSettings(_Entry):
    """One step of a workflow, run in its own sessions."""

    adapter: str | None = None
    """The adapter that runs it. Default: the adapter of the task."""
    fallback: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Adapters to use while that one is in cooldown or disabled."""
    access: Literal["read", "write"] = "write"
    """With `read`, its changes are discarded."""
    produces: Annotated[HandoffSettings, BeforeValidator(_produces, json_schema_input_type=Name | HandoffSettings)] | (
        None
    ) = None
    """The kind of handoff for the next phase. Default: none, only its work."""
    prompt: Prompt | None = None
    """The prompt template. Default: the template of its kind, or of its name."""
    prompt_file: Annotated[str, Field(min_length=1)] | None = None
    """A file with the prompt template, relative to this one."""
    needs: Annotated[tuple[ValueName, ...], Field(strict=False)] | None = None
    """The values that it gets. Default: the values that its kind of phase needs, else all."""
    context: Context = {}
    """Values for this phase only."""
    when: Annotated[str, Field(min_length=1)] | None = None
    """An expression over the known values; if it is false, the phase is skipped."""
    approve: bool = False
    """Whether a person must approve its result before the next phase starts."""
    session: (
        Annotated[
            ContinueSettings,
            BeforeValidator(_session, json_schema_input_type=Literal["continue"] | ContinueSettings),
        ]
        | None
    ) = None
    """`continue`: continue the conversation of an earlier phase, if the adapter supports it."""
    handoff: Literal["direct", "mediated", "shared"] = "direct"
    """How its result reaches the next phase: unchanged, transformed, or under a key that other tasks can read."""
    transform: Name | None = None
    """With `mediated`: the transformation, as named by a plugin."""
    mediator: Name | None = None
    """With `mediated`: the phase that transforms the result; it must be the next phase."""
    key: Key | None = None
    """With `shared`: the key."""
    until: Commands = ()
    """Shell commands that must succeed on its work before the phase is complete."""
    on_reject: Name | None = None
    """For a review: the earlier phase to return to after a rejection. Default: the last phase that writes."""
    max_rounds: Annotated[int, Field(ge=1, le=20)] | None = None
    """How often `until` or a rejection may send work back before the task fails. Default: 3."""
    expand: Annotated[
        ExpansionSettings | None, BeforeValidator(_expand, json_schema_input_type=bool | ExpansionSettings)
    ] = None
    """For a plan: whether its tasks become tasks of the run."""
    timeout: Duration | None = None
    """The wall-clock limit of one session. Default: the timeout of the task."""


_OnePhase = Name | Annotated[dict[Name, PhaseSettings], Field(min_length=1, max_length=1)]


class TaskDefaults(_Entry):
    """Defaults for tasks; each task can override them."""

    adapter: str | None = None
    """The adapter that runs the tasks; optional if there is only one."""
    fallback: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Adapters to use, in this order, while that one is in cooldown or disabled."""
    timeout: Duration | None = None
    """The wall-clock limit of one session. Default: 30m."""
    attempts: Attempts | None = None
    """The largest number of attempts. Default: 3, or one more than `coordination.max_retries` if that is given."""
    backoff: BackoffSettings | None = None
    """The wait between attempts."""
    idle_timeout: IdleTimeout | None = None
    """How long a session may run without output and without a change in its worktree. Default: 10m."""
    retry_on: Annotated[frozenset[RetryableName], Field(strict=False)] | None = None
    """The failure classes that are retried."""
    checks: Commands | None = None
    """Shell commands that must succeed on the merged tree before the target moves."""
    checks_timeout: Duration | None = None
    """The wall-clock limit of one check. Default: 10m."""
    checks_env: EnvNames | None = None
    """Names of environment variables that checks get in addition to the base set."""
    allow_failing_base: bool | None = None
    """Whether sessions start even if the checks fail on the base, to fix a broken base. Default: false."""
    on_checks_failed: Literal["retry", "fail"] | None = None
    """Whether to retry with the output of the failed check, or to fail the task. Default: retry."""
    on_out_of_scope: Literal["retry", "extend", "allow"] | None = None
    """If a task with `owns` changed other paths: retry it, extend its ownership, or allow the change."""
    max_file: Size | None = None
    """The size of the largest file that may be committed. Default: 50MB."""
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    """Ready tasks with a higher priority start first. Default: 0; each ten minutes of waiting add one."""
    instructions: Prompt | None = None
    """Instructions in addition to the prompt, as part of the system prompt if the CLI has one."""
    budget: BudgetSettings | None = None
    """The budget of a task, for all of its sessions."""
    session_budget: BudgetSettings | None = None
    """The budget of each session."""
    workflow: Name | None = None
    """The workflow of a task: a name under `workflows`, `adw`, or `none`. Default: none."""


class Task(TaskDefaults):
    """One unit of work."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["prompt_file"]}]},
    )

    id: Name
    """The task's name within the run."""
    prompt: Prompt | None = None
    """The prompt for the CLI; or use `prompt_file`."""
    prompt_file: Annotated[str, Field(min_length=1)] | None = None
    """A file with the prompt, relative to this one."""
    needs: Annotated[tuple[str, ...], Field(strict=False, json_schema_extra={"uniqueItems": True})] = ()
    """The tasks that must land before this one starts."""
    owns: Annotated[tuple[PathPattern, ...], Field(strict=False)] = ()
    """Patterns of the paths that it may change; tasks with overlapping patterns never run at the same time."""
    context: Context = {}
    """Values for the phases of its workflow, in addition to the file's."""


class AdapterSettings(_Entry):
    """An adapter; keys not listed here are options of its kind."""

    model_config = ConfigDict(extra="allow")

    use: str
    """The kind of adapter: `command`, or one from an installed plugin."""
    capacity: Annotated[int, Field(ge=1, le=1000)] | None = None
    """The largest number of its concurrent sessions. Default: the `capacity` of the run."""
    writable: Paths = ()
    """Files and folders that its sessions may write, in addition to their worktree."""
    readable: Paths = ()
    """Files and folders inside hidden folders that its sessions may read."""
    keep_ignored: KeptPaths = ()
    """Ignored files and folders to preserve for the adapter's next session, in addition to `worktrees.keep_ignored`."""
    __pydantic_extra__: dict[str, Any]

    @classmethod
    def of(cls, use: str, options: BaseModel, **settings: Any) -> Self:
        """Return the settings of an adapter of kind `use`, given an instance of its `Options`."""
        return cls.model_validate({"use": use, **options.model_dump(exclude_unset=True), **settings})


class SinkSettings(_Entry):
    """A sink that receives events; keys not listed here are options of its kind."""

    model_config = ConfigDict(extra="allow")

    use: str
    """The kind of sink: `jsonlines`, or one from an installed plugin."""
    events: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, min_length=1)] = ("*",)
    """Patterns of the events that it receives, such as `task.*`. Default: all."""
    __pydantic_extra__: dict[str, Any]


class TrackerSettings(_Entry):
    """An external task list; keys not listed here are options of its kind."""

    model_config = ConfigDict(extra="allow")

    use: str
    """The kind of tracker: `checklist`, or one from an installed plugin."""
    __pydantic_extra__: dict[str, Any]


_DEFAULT_LIMIT = Field(json_schema_extra={"default": "10m"})


class SetupSettings(_Entry):
    """A command that sets up a new worktree."""

    run: Command
    """The shell command."""
    inputs: RepositoryPaths = ()
    """Tracked files: the command runs again if one of them changed. Without any, it runs once per worktree."""
    timeout: Annotated[Duration, _DEFAULT_LIMIT] = 600.0
    """Its wall-clock limit."""


class WorktreeSettings(_Entry):
    """The pool of worktrees for sessions and checks."""

    max: Annotated[int, Field(ge=1, le=1000)] | None = None
    """The largest number of worktrees. Default: 16, or `capacity` + 1 if that is more."""
    max_size: Size | None = None
    """Their total size on disk. Default: no limit."""
    sparse: RepositoryPaths = ()
    """The folders to check out, in addition to top-level files. Default: all."""
    setup: Annotated[
        tuple[Annotated[SetupSettings, BeforeValidator(_step, json_schema_input_type=Command | SetupSettings)], ...],
        Field(strict=False),
    ] = ()
    """Shell commands that run in order in a new worktree, before its first session or check."""
    before_run: Commands = ()
    """Shell commands that run before each session; a failure fails the attempt."""
    after_run: Commands = ()
    """Shell commands that run after each session; a failure is only reported."""
    teardown: Commands = ()
    """Shell commands that run before a worktree is deleted; a failure is only reported."""
    hooks_timeout: Annotated[Duration, _DEFAULT_LIMIT] = 600.0
    """The wall-clock limit of each command of `before_run`, `after_run` and `teardown`."""
    env: EnvNames = ()
    """Names of environment variables that these commands get in addition to the base set."""
    copied: RepositoryPaths = Field((), alias="copy")
    """Untracked files and folders of your checkout that are copied into each worktree."""
    linked: RepositoryPaths = Field((), alias="link")
    """Untracked files and folders of your checkout that each worktree links to, read-only."""
    keep_ignored: KeptPaths = ()
    """Ignored files and folders to preserve for the next session (not for checks): names, or paths from the top."""
    ports: Annotated[int, Field(ge=0, le=100)] = 0
    """The number of free ports per worktree, passed as COUNCIL_PORT_0 and so on."""


class StateSettings(_Entry):
    """The state store, and how much history it retains."""

    url: StoreUrl | None = None
    """The store: file:///a/folder, memory: (lost at exit), or one from an installed plugin."""
    retention: Annotated[Retention, Field(json_schema_extra={"default": "30d"})] = 30 * 86400.0
    """How long full history is retained; `off` retains all of it. Older documents keep their last version."""
    max_size: Annotated[Size, Field(json_schema_extra={"default": "1GB"})] = 1_000_000_000
    """The size of the log on disk above which newer history is pruned too."""


def _documented_default(default: str) -> Any:
    return Field(json_schema_extra={"default": default})


class CoordinationSettings(_Entry):
    """How the processes and sessions of one run coordinate."""

    enabled: bool = True
    """Whether other processes can join a run (`council work`). If false, one process runs all tasks."""
    heartbeat_interval: Annotated[Duration, _documented_default("60s")] = 60.0
    """How often claims on tasks are renewed; at most a third of `stale_after`."""
    stale_after: Annotated[Duration, _documented_default("300s")] = 300.0
    """How long after its last heartbeat a claim expires, so that another process can take over the task."""
    owner_stale_after: Annotated[Duration, _documented_default("600s")] = 600.0
    """The same for an owner on this machine that is not proven dead; at least `stale_after`."""
    sweep_interval: Annotated[Duration, _documented_default("90s")] = 90.0
    """How often to look for expired claims."""
    max_retries: Annotated[int, Field(ge=0, le=MAX_RETRIES)] = 3
    """The largest number of retries of a task, regardless of `attempts`; a takeover counts as a retry."""
    when_unreachable: Literal["pause", "continue"] = "pause"
    """While the store is unreachable: wait for it, or continue with local state."""
    role: Literal["auto", "leader", "worker"] = "auto"
    """Whether this process may override the claims of workers. With `auto`, only while it leads the run."""
    tools: bool = True
    """Whether sessions can list other sessions, lock files and leave notes."""
    lock_timeout: Annotated[Duration, _documented_default("5s")] = 5.0
    """How long a session waits for locked files by default."""


class Config(_Entry):
    """The config file."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["tasks"], "properties": {"tasks": {"minItems": 1}}},
                {"required": ["trackers"], "properties": {"trackers": {"minProperties": 1}}},
            ]
        },
    )

    version: Annotated[int, AfterValidator(_check_version), WithJsonSchema({"const": 1})]
    """The version of this format: 1."""
    repo: Annotated[str, AfterValidator(check_repo), _text(_NOT_BLANK)] = "."
    """The repository: a path, relative to this file, or a URL."""
    base: Branch = "main"
    """The branch that tasks start from."""
    target: Branch | None = None
    """The branch that tasks land on. Default: council/ and the run id."""
    capacity: Annotated[int, Field(ge=1, le=MAX_CAPACITY)] = 4
    """The largest number of concurrent sessions."""
    session_memory: Annotated[Size, Field(json_schema_extra={"default": "256MiB"})] = 256 << 20
    """The expected memory of one session; only as many sessions start as fit in memory."""
    sandbox: Literal["auto", "bubblewrap", "landlock", "off"] = "auto"
    """The sandbox of sessions and checks; with `off` they have all of your permissions."""
    network: Annotated[
        Annotated[Literal["on", "off"], BeforeValidator(_check_network), Tag("word")]
        | Annotated[NetworkSettings, Tag("hosts")],
        Discriminator(_network),
    ] = "on"
    """Whether sessions and checks may use the network, or the hosts that they may reach."""
    nested_sandboxes: bool = False
    """Whether programs in sessions and checks may create nested sandboxes with user namespaces."""
    limits: LimitSettings = Field(default_factory=LimitSettings)
    """Resource limits of each process of a session or check."""
    writable: Paths = ()
    """Files and folders that sessions and checks may write, in addition to their worktree."""
    readable: Paths = ()
    """Files and folders inside hidden folders that sessions and checks may read."""
    adapters: Annotated[
        dict[Name, AdapterSettings], Field(min_length=1, json_schema_extra={"additionalProperties": False})
    ] = {}
    """Adapters by name; kinds that need no options can be used without an entry."""
    mcp_servers: dict[Name, McpServerSettings] = {}
    """Model Context Protocol servers for sessions, by name."""
    budget: BudgetSettings = Field(default_factory=BudgetSettings)
    """The budget of the run, for all sessions together."""
    prices: dict[Annotated[str, Field(min_length=1)], Price] = {}
    """Prices per million tokens by model, for CLIs that report no cost; they override the built-in prices."""
    worktrees: WorktreeSettings = Field(default_factory=WorktreeSettings)
    """The pool of worktrees for sessions and checks."""
    state: Annotated[StateSettings, BeforeValidator(_store, json_schema_input_type=StoreUrl | StateSettings)] = Field(
        default_factory=StateSettings
    )
    """The state store. Default: .council/state of the repository."""
    state_dir: Annotated[str, Field(min_length=1)] | None = None
    """The folder of the store, relative to this file; an alternative to its URL."""
    coordination: CoordinationSettings = Field(default_factory=CoordinationSettings)
    """How the processes of one run coordinate."""
    defaults: TaskDefaults = Field(default_factory=TaskDefaults)
    """Defaults for tasks; each task can override them."""
    workflows: dict[
        WorkflowName,
        Annotated[
            tuple[
                Annotated[
                    dict[Name, PhaseSettings],
                    BeforeValidator(_phase, json_schema_input_type=_OnePhase),
                ],
                ...,
            ],
            Field(strict=False, min_length=1, max_length=MAX_PHASES),
        ],
    ] = {}
    """Workflows by name, each a list of phases; `adw` is built in."""
    context: Context = {}
    """Values for the phases of all tasks."""
    sinks: dict[Name, SinkSettings] = {}
    """Sinks that receive events, by name."""
    trackers: dict[Name, TrackerSettings] = {}
    """External task lists, by name."""
    tasks: Annotated[tuple[Task, ...], Field(strict=False, max_length=MAX_TASKS)] = ()
    """The tasks; required unless there are trackers."""
