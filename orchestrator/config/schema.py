"""What users write: the shape of the file, before references between its parts are checked."""

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
#: What a task says that has no workflow although the defaults name one.
NO_WORKFLOW: Final = "none"
#: Bytes of one `context:` as JSON.
MAX_CONTEXT_BYTES: Final = 64 << 10
VALUE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


def _check_version(version: int) -> int:
    if version != 1:
        raise ValueError(f"version {version} is not known here: write 1")
    return version


def _check_prompt(prompt: str) -> str:
    if not prompt.strip():
        raise ValueError("the prompt is empty: say what is to be done")
    return prompt


# A file's numbers need a unit; from code, where types and names tell it, they are seconds and bytes.
def _seconds(value: Any, info: ValidationInfo) -> float:
    return check_seconds(value) if _is_number_of_code(value, info) else parse_duration(value)


def _idle_timeout(value: Any, info: ValidationInfo) -> float:
    if value == math.inf and not _is_from_file(info):
        return math.inf
    return check_seconds(value) if _is_number_of_code(value, info) else parse_optional_duration(value)


def _retention(value: Any, info: ValidationInfo) -> float:
    if value == math.inf and not _is_from_file(info):
        return math.inf
    if _is_number_of_code(value, info):
        return check_seconds(value, longest=MAX_RETENTION)
    return parse_optional_duration(value, longest=MAX_RETENTION)


def _bytes(value: Any, info: ValidationInfo) -> int:
    return check_bytes(value) if _is_number_of_code(value, info) and type(value) is int else parse_size(value)


def _is_number_of_code(value: Any, info: ValidationInfo) -> bool:
    return not _is_from_file(info) and type(value) in {int, float}


def _is_from_file(info: ValidationInfo) -> bool:
    return bool(info.context and info.context.get("from_file"))


def _text(pattern: str) -> WithJsonSchema:
    """Return what an editor knows of a text that a validator of ours judges: a pattern to search in it."""
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
            f"{quote_text(name)} can't name a variable: use letters, digits and '_', not beginning with a digit"
        )
    return name


def _check_retryable(name: str) -> str:
    if name not in RETRYABLE:
        raise ValueError(
            f"{quote_text(name)} is no class of failure that can be retried: use {', '.join(sorted(RETRYABLE))}"
        )
    return name


def _check_command(command: str) -> str:
    if not command.strip() or "\0" in command:
        raise ValueError("a command is empty or holds a NUL character: write one for the shell, or remove it")
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
    if value not in ("on", "off"):  # which may be a list, that no set takes
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
                f"the keys of the phase {quote_text(str(name))} are beside its name: indent them more than it"
            )
    raise ValueError(
        f"a phase can't be {describe_value(value)}: write `- NAME: {{…}}`, one name with the keys of the phase"
    )


def _check_value_name(name: str) -> str:
    if not VALUE_NAME.fullmatch(name):
        raise ValueError(
            f"{quote_text(name)} can't name a value: use up to 64 letters, digits and '_', not beginning with a digit"
        )
    return name


def _check_context(context: dict[str, Any]) -> dict[str, Any]:
    size = len(json.dumps(context, ensure_ascii=False, default=str).encode())
    if size > MAX_CONTEXT_BYTES:
        raise ValueError(
            f"these values take {size} bytes: keep them within {MAX_CONTEXT_BYTES}, or name a file to read"
        )
    return context


def _check_workflow_name(name: str) -> str:
    if name == NO_WORKFLOW:
        raise ValueError(f"{NO_WORKFLOW!r} is what a task says that has no workflow: give this one another name")
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
    """How long to wait before a failed task is tried again; what is left out comes from the defaults."""

    initial: Duration | None = None
    """The wait before the second attempt: 2s unless given."""
    factor: Annotated[float, Field(ge=1)] | None = None
    """How many times longer each wait is than the one before: 2 unless given."""
    max: Duration | None = None
    """The longest wait: 5m unless given."""
    jitter: bool | None = None
    """Whether a wait is drawn at random between nothing and its full length: true unless given."""


class BudgetSettings(_Entry):
    """How much may be used up; what is left out has no limit."""

    tokens: Count | None = None
    """Tokens in and out, such as 500k or 2M."""
    cost: Annotated[float, Field(gt=0, le=MAX_DOLLARS, strict=False)] | None = None
    """US dollars, as far as they are known."""
    time: Duration | None = None
    """Wall-clock time of sessions, one after the other."""


class NetworkSettings(_Entry):
    """The hosts that sessions and checks reach by HTTP and HTTPS, through a proxy; they reach no others."""

    allow: Annotated[tuple[AllowedHost, ...], Field(strict=False, min_length=1, max_length=MAX_HOSTS)]
    """Hosts such as api.example.com (ports 80 and 443), *.example.com (its subdomains), or localhost:8080."""


class LimitSettings(_Entry):
    """What each process may have of a resource; what is left out has no limit of ours."""

    memory: Size | None = None
    """Memory of its own."""
    file_size: Size | None = None
    """The largest file that it may write."""
    open_files: Annotated[int, Field(ge=64, le=1 << 20)] | None = None
    """Files, sockets and pipes that it may have open."""
    processes: Annotated[int, Field(ge=16, le=1 << 22)] | None = None
    """Processes that the same user may have, those of others included; no limit for root."""


class McpServerSettings(_Entry):
    """A server of the Model Context Protocol."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["command"]}, {"required": ["url"]}]})

    command: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, min_length=1)] | None = None
    """The program and its arguments, which speaks on standard input and output; or else give `url`."""
    env: EnvNames = ()
    """Names of variables that it gets, and the session with it."""
    url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    """Where it is served (streamable HTTP)."""


class HandoffSettings(_Entry):
    """What a phase hands over."""

    kind: Name
    """The kind: scout, plan, build, test, deploy, review, what a plugin brings, or, with `schema`, one of your own."""
    schema_: Annotated[str, Field(min_length=1)] | dict[str, Any] | None = Field(None, alias="schema")
    """The JSON Schema (draft 2020-12) that it has to fit: a file, relative to this one, or the schema itself."""


class ContinueSettings(_Entry):
    """Whose conversation a phase goes on with."""

    continue_: Name | None = Field(None, alias="continue")
    """An earlier phase: the one before unless given."""


class ExpansionSettings(_Entry):
    """How the tasks of a plan become tasks of the run."""

    max: Annotated[int, Field(ge=1, le=1000)] = 20
    """How many there may be."""
    workflow: WorkflowName | None = None
    """The workflow of each of them: none unless given."""


class PhaseSettings(_Entry):
    """One step of a workflow: a session with a purpose of its own."""

    adapter: str | None = None
    """The adapter that does it: the task's unless given."""
    fallback: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Adapters that stand in while that one is parked or stopped."""
    access: Literal["read", "write"] = "write"
    """With `read`, whatever it changes is discarded."""
    produces: Annotated[HandoffSettings, BeforeValidator(_produces, json_schema_input_type=Name | HandoffSettings)] | (
        None
    ) = None
    """What it hands to the next phase: a kind; nothing but its work unless given."""
    prompt: Prompt | None = None
    """The template of what its session is told: that of its kind, or of its name, unless given."""
    prompt_file: Annotated[str, Field(min_length=1)] | None = None
    """A file that holds the template, relative to this one."""
    needs: Annotated[tuple[ValueName, ...], Field(strict=False)] | None = None
    """The values that it is given: what its kind of phase needs, else all, unless given."""
    context: Context = {}
    """Values that this phase alone has."""
    when: Annotated[str, Field(min_length=1)] | None = None
    """An expression over the values that are known: where it does not hold, the phase is skipped."""
    approve: bool = False
    """Whether a person has to approve its result before anything follows."""
    session: (
        Annotated[
            ContinueSettings,
            BeforeValidator(_session, json_schema_input_type=Literal["continue"] | ContinueSettings),
        ]
        | None
    ) = None
    """`continue`: it goes on with the conversation of an earlier phase, where its adapter can."""
    handoff: Literal["direct", "mediated", "shared"] = "direct"
    """How its result gets to the next phase: as it is, prepared for it, or under a key that others read, too."""
    transform: Name | None = None
    """With `mediated`: the transformation that prepares it, as a plugin names it."""
    mediator: Name | None = None
    """With `mediated`: the phase that prepares it, which is the next one."""
    key: Key | None = None
    """With `shared`: the key."""
    until: Commands = ()
    """Shell commands that must succeed on its work before the phase is complete."""
    on_reject: Name | None = None
    """Of a review: the earlier phase that a rejection goes back to, the last one that writes unless given."""
    max_rounds: Annotated[int, Field(ge=1, le=20)] | None = None
    """How often `until` or a rejection may send work back before the task fails: 3 unless given."""
    expand: Annotated[
        ExpansionSettings | None, BeforeValidator(_expand, json_schema_input_type=bool | ExpansionSettings)
    ] = None
    """Of a plan: whether its tasks become tasks of the run."""
    timeout: Duration | None = None
    """The wall-clock time that one session of it may take: the task's unless given."""


_OnePhase = Name | Annotated[dict[Name, PhaseSettings], Field(min_length=1, max_length=1)]


class TaskDefaults(_Entry):
    """What holds for each task that doesn't say otherwise."""

    adapter: str | None = None
    """The adapter that runs the tasks; not needed where there is only one."""
    fallback: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Adapters that stand in while that one is parked or stopped: the first of them that is not."""
    timeout: Duration | None = None
    """The wall-clock time that one session may take: 30m unless given."""
    attempts: Attempts | None = None
    """How often a task is tried at most: 3 unless given, or once more than `coordination.max_retries` if that is."""
    backoff: BackoffSettings | None = None
    """How long to wait between attempts."""
    idle_timeout: IdleTimeout | None = None
    """How long a session may go without output and without a change in its worktree: 10m unless given."""
    retry_on: Annotated[frozenset[RetryableName], Field(strict=False)] | None = None
    """The classes of failure that are worth another attempt."""
    checks: Commands | None = None
    """Shell commands that must succeed on the merged tree before the target moves."""
    checks_timeout: Duration | None = None
    """The wall-clock time that one check may take: 10m unless given."""
    checks_env: EnvNames | None = None
    """Names of variables that checks see beside the base set."""
    allow_failing_base: bool | None = None
    """Whether sessions start though the checks fail on the base: no unless given; set it to fix a broken base."""
    on_checks_failed: Literal["retry", "fail"] | None = None
    """Whether another attempt is told what the checks said, or the task is over: retry unless given."""
    on_out_of_scope: Literal["retry", "extend", "allow"] | None = None
    """What follows where a task with `owns` has changed other paths: another attempt, owning those too, or nothing."""
    max_file: Size | None = None
    """The largest file that may be committed: 50MB unless given."""
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    """Which ready tasks start first: the higher, 0 unless given; ten minutes of waiting count as much as one."""
    instructions: Prompt | None = None
    """What the CLI is told apart from the prompt, as a part of its system prompt where it has one."""
    budget: BudgetSettings | None = None
    """How much a task may use up, in all of its sessions."""
    session_budget: BudgetSettings | None = None
    """How much each of its sessions may use up."""
    workflow: Name | None = None
    """The phases that a task goes through: a name under `workflows`, `adw`, or `none`, as it is unless given."""


class Task(TaskDefaults):
    """One unit of work."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["prompt_file"]}]},
    )

    id: Name
    """The task's name within the run."""
    prompt: Prompt | None = None
    """What the CLI is asked to do; or else give `prompt_file`."""
    prompt_file: Annotated[str, Field(min_length=1)] | None = None
    """A file that holds the prompt, relative to this one."""
    needs: Annotated[tuple[str, ...], Field(strict=False, json_schema_extra={"uniqueItems": True})] = ()
    """The tasks that must have landed before this one starts."""
    owns: Annotated[tuple[PathPattern, ...], Field(strict=False)] = ()
    """Patterns of the paths that it works on: tasks whose patterns overlap are never at work at the same time."""
    context: Context = {}
    """Values for the phases of its workflow, beside those of the file."""


class AdapterSettings(_Entry):
    """An adapter; the other keys beside `use` are its own options."""

    model_config = ConfigDict(extra="allow")

    use: str
    """The kind of adapter: `command`, or what an installed plugin brings."""
    capacity: Annotated[int, Field(ge=1, le=1000)] | None = None
    """How many of its sessions may run at once: as many as `capacity` in all unless given."""
    writable: Paths = ()
    """Files and folders that its sessions may write, beside their worktree."""
    readable: Paths = ()
    """Files and folders inside of what is hidden that its sessions may read."""
    keep_ignored: KeptPaths = ()
    """Ignored files and folders of a worktree that stay for the adapter's next session, beside those of all."""
    __pydantic_extra__: dict[str, Any]

    @classmethod
    def of(cls, use: str, options: BaseModel, **settings: Any) -> Self:
        """Return the adapter of kind `use` with an instance of its `Options`, and the other keys as settings."""
        return cls.model_validate({"use": use, **options.model_dump(exclude_unset=True), **settings})


class SinkSettings(_Entry):
    """Somebody who gets to know what happens; the other keys beside `use` are the sink's own options."""

    model_config = ConfigDict(extra="allow")

    use: str
    """The kind of sink: `jsonlines`, or what an installed plugin brings."""
    events: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, min_length=1)] = ("*",)
    """Patterns of the events that it gets, as in `task.*`: all unless given."""
    __pydantic_extra__: dict[str, Any]


class TrackerSettings(_Entry):
    """A list of tasks that is kept elsewhere; the other keys beside `use` are the tracker's own options."""

    model_config = ConfigDict(extra="allow")

    use: str
    """The kind of tracker: `checklist`, or what an installed plugin brings."""
    __pydantic_extra__: dict[str, Any]


_DEFAULT_LIMIT = Field(json_schema_extra={"default": "10m"})


class SetupSettings(_Entry):
    """A command that makes a new worktree ready for work."""

    run: Command
    """The shell command."""
    inputs: RepositoryPaths = ()
    """Files of the commit: it is run again only when one of them changed; without any, once for each worktree."""
    timeout: Annotated[Duration, _DEFAULT_LIMIT] = 600.0
    """The wall-clock time that it may take."""


class WorktreeSettings(_Entry):
    """The checkouts that sessions and checks take turns in."""

    max: Annotated[int, Field(ge=1, le=1000)] | None = None
    """How many there are at most: 16 unless given, or one more than `capacity` where that is more."""
    max_size: Size | None = None
    """What all of them may take on disk together: no limit unless given."""
    sparse: RepositoryPaths = ()
    """The folders that are checked out, beside the files at the top: all unless given."""
    setup: Annotated[
        tuple[Annotated[SetupSettings, BeforeValidator(_step, json_schema_input_type=Command | SetupSettings)], ...],
        Field(strict=False),
    ] = ()
    """Shell commands, run in turn in a new worktree before its first session or check."""
    before_run: Commands = ()
    """Shell commands before each session; one that fails fails the attempt."""
    after_run: Commands = ()
    """Shell commands after each session; one that fails is only told of."""
    teardown: Commands = ()
    """Shell commands before a worktree is deleted; one that fails is only told of."""
    hooks_timeout: Annotated[Duration, _DEFAULT_LIMIT] = 600.0
    """The wall-clock time that each command of `before_run`, `after_run` and `teardown` may take."""
    env: EnvNames = ()
    """Names of variables that these commands see beside the base set."""
    copied: RepositoryPaths = Field((), alias="copy")
    """Files and folders of your checkout that git doesn't track: each worktree gets a copy."""
    linked: RepositoryPaths = Field((), alias="link")
    """Files and folders of your checkout that git doesn't track: each worktree gets a link, to read only."""
    keep_ignored: KeptPaths = ()
    """Ignored files and folders that stay for the next session, not for checks: names, or paths from the top."""
    ports: Annotated[int, Field(ge=0, le=100)] = 0
    """How many free ports each worktree gets, as COUNCIL_PORT_0 and so on."""


class StateSettings(_Entry):
    """Where all is recorded that happens, and how much of the past stays."""

    url: StoreUrl | None = None
    """The store: file:///a/folder, memory: (gone at the end), or what an installed plugin brings."""
    retention: Annotated[Retention, Field(json_schema_extra={"default": "30d"})] = 30 * 86400.0
    """How far back all of it can be looked at; `off` for without end. Of what is older the last versions stay."""
    max_size: Annotated[Size, Field(json_schema_extra={"default": "1GB"})] = 1_000_000_000
    """What the log may take on disk, before what is younger goes, too."""


def _unless_given(default: str) -> Any:
    return Field(json_schema_extra={"default": default})


class CoordinationSettings(_Entry):
    """How the processes that work in one run, and their sessions, keep out of each other's way."""

    enabled: bool = True
    """Whether others can join a run (`council work`): without it the run's own process has all to itself."""
    heartbeat_interval: Annotated[Duration, _unless_given("60s")] = 60.0
    """How often the claim on a task is renewed: at most a third of `stale_after`."""
    stale_after: Annotated[Duration, _unless_given("300s")] = 300.0
    """How long after that a claim counts no more, and somebody else takes the task over."""
    owner_stale_after: Annotated[Duration, _unless_given("600s")] = 600.0
    """The same for an owner on this machine, unless it is proven dead: at least `stale_after`."""
    sweep_interval: Annotated[Duration, _unless_given("90s")] = 90.0
    """How often tasks whose claim counts no more are looked for."""
    max_retries: Annotated[int, Field(ge=0, le=MAX_RETRIES)] = 3
    """How often a task is tried again at most, whatever its `attempts`; a takeover counts as one."""
    when_unreachable: Literal["pause", "continue"] = "pause"
    """While the store can't be reached: wait for it, or go on with what this machine knows."""
    role: Literal["auto", "leader", "worker"] = "auto"
    """Whether claims of others can be overridden: `auto` only by who coordinates the run."""
    tools: bool = True
    """Whether sessions can ask who else is at work, take files and leave notes."""
    lock_timeout: Annotated[Duration, _unless_given("5s")] = 5.0
    """How long a session waits for files that another one has, where it does not say."""


class Config(_Entry):
    """The whole file."""

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
    """The branch that work starts from."""
    target: Branch | None = None
    """The branch that work lands on: council/ and the run's id unless given."""
    capacity: Annotated[int, Field(ge=1, le=MAX_CAPACITY)] = 4
    """How many sessions may run at once."""
    session_memory: Annotated[Size, Field(json_schema_extra={"default": "256MiB"})] = 256 << 20
    """The memory that one session is expected to take: no more are started than fit."""
    sandbox: Literal["auto", "bubblewrap", "landlock", "off"] = "auto"
    """What fences sessions and checks in; `off` leaves them free to reach whatever you can."""
    network: Annotated[
        Annotated[Literal["on", "off"], BeforeValidator(_check_network), Tag("word")]
        | Annotated[NetworkSettings, Tag("hosts")],
        Discriminator(_network),
    ] = "on"
    """Whether sessions and checks reach the network, or which hosts of it."""
    nested_sandboxes: bool = False
    """Whether programs in sessions and checks may make sandboxes of their own, by user namespaces."""
    limits: LimitSettings = Field(default_factory=LimitSettings)
    """What each process of a session or check may have of a resource."""
    writable: Paths = ()
    """Files and folders that sessions and checks may write, beside their worktree."""
    readable: Paths = ()
    """Files and folders inside of what is hidden that sessions and checks may read."""
    adapters: Annotated[
        dict[Name, AdapterSettings], Field(min_length=1, json_schema_extra={"additionalProperties": False})
    ] = {}
    """The ways to run a CLI, by a name of your own; types that need no options can be named without an entry here."""
    mcp_servers: dict[Name, McpServerSettings] = {}
    """Servers of the Model Context Protocol that sessions can use, by a name of your own."""
    budget: BudgetSettings = Field(default_factory=BudgetSettings)
    """How much all sessions of the run may use up together."""
    prices: dict[Annotated[str, Field(min_length=1)], Price] = {}
    """What a million tokens of a model cost, where its CLI does not tell and where ours are not yours."""
    worktrees: WorktreeSettings = Field(default_factory=WorktreeSettings)
    """The checkouts that sessions and checks take turns in."""
    state: Annotated[StateSettings, BeforeValidator(_store, json_schema_input_type=StoreUrl | StateSettings)] = Field(
        default_factory=StateSettings
    )
    """The store that all is recorded in: .council/state of the repository unless given."""
    state_dir: Annotated[str, Field(min_length=1)] | None = None
    """The folder of the store, relative to this file, instead of its URL."""
    coordination: CoordinationSettings = Field(default_factory=CoordinationSettings)
    """How those that work in one run keep out of each other's way."""
    defaults: TaskDefaults = Field(default_factory=TaskDefaults)
    """What holds for each task that doesn't say otherwise."""
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
    """Phases that tasks go through one after the other, by a name of your own; `adw` is there already."""
    context: Context = {}
    """Values that the phases of all tasks are given."""
    sinks: dict[Name, SinkSettings] = {}
    """Who gets to know what happens, by a name of your own."""
    trackers: dict[Name, TrackerSettings] = {}
    """Lists of tasks that are kept elsewhere, by a name of your own."""
    tasks: Annotated[tuple[Task, ...], Field(strict=False, max_length=MAX_TASKS)] = ()
    """What is to be done; required unless there are trackers."""
