"""The resolved config of a run, with all defaults applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, SerializeAsAny, TypeAdapter, ValidationError

from orchestrator.domain.runs import budget, retry
from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.prices import Price
from orchestrator.domain.scheduling.claims import ClaimTiming
from orchestrator.domain.workflow.routing import Phase
from orchestrator.errors import RefusedError
from orchestrator.protocols import Adapter, AdapterType, JsonObject, McpServer, SinkType, TrackerType


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


class Backoff(_Model):
    """The wait before a failed task is retried."""

    initial: float = 2.0
    """Seconds before the second attempt."""
    factor: float = 2.0
    """The factor by which each wait is longer than the previous one."""
    max: float = 300.0
    """The longest wait in seconds."""
    jitter: bool = True
    """Whether to draw each wait at random between zero and its full length."""

    def policy(self) -> retry.Backoff:
        """Return the argument for `retry_delay`."""
        return retry.Backoff(self.initial, self.factor, self.max, self.jitter)


class BudgetConfig(_Model):
    """Spending limits; None: no limit."""

    tokens: int | None = None
    """Input and output tokens."""
    cost: float | None = None
    """US dollars."""
    time: float | None = None
    """The sum of session durations, in seconds."""

    def policy(self) -> budget.Budget:
        """Return the domain value of this budget."""
        return budget.Budget(self.tokens, self.cost, self.time)


class TaskSpec(_Model):
    """A resolved task; round-trips through `model_dump(mode="json")` and `model_validate`."""

    id: str
    """The task's name within the run."""
    prompt: str
    """The prompt text, even if the config named a file."""
    needs: Annotated[tuple[str, ...], Field(strict=False)]
    """The tasks that must land before this one starts."""
    adapter: str
    """The name of the adapter that runs it."""
    fallback: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """The names of adapters to use, in this order, while that one is in cooldown or disabled."""
    timeout: float
    """The wall-clock limit of one session, in seconds."""
    attempts: int = 3
    """The largest number of attempts. Not in `model_fields_set` if the file does not give it."""
    backoff: Backoff
    """The wait between attempts."""
    idle_timeout: float | None
    """Seconds that a session may run without output and without a change in its worktree; None: no limit."""
    retry_on: Annotated[
        frozenset[Annotated[FailureClass, Field(strict=False)]],
        Field(strict=False),
        # The order of a set differs between processes; the recorded order must not.
        PlainSerializer(sorted, return_type=list[FailureClass]),
    ]
    """The failure classes that are retried."""
    checks: Annotated[tuple[str, ...], Field(strict=False)]
    """Shell commands that must succeed on the merged tree."""
    checks_timeout: float
    """The wall-clock limit of one check, in seconds."""
    checks_env: Annotated[tuple[str, ...], Field(strict=False)]
    """Names of environment variables that checks get in addition to the base set."""
    allow_failing_base: bool = False
    """Whether sessions start even if the checks fail on the base."""
    retry_checks: bool
    """Whether to retry the task after failed checks."""
    max_file: int
    """The size of the largest file that may be committed, in bytes."""
    priority: int
    """Ready tasks with a higher priority start first."""
    owns: Annotated[tuple[str, ...], Field(strict=False)]
    """Patterns of the paths that it may change."""
    on_out_of_scope: Literal["retry", "extend", "allow"] = "retry"
    """What to do if it owns paths and changed other paths."""
    instructions: str | None = None
    """Instructions for the CLI in addition to the prompt."""
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    """The budget of the task, for all of its sessions."""
    session_budget: BudgetConfig = Field(default_factory=BudgetConfig)
    """The budget of each session."""
    workflow: str | None = None
    """The name of its workflow; None: the single phase `build`."""
    context: dict[str, Any] = {}
    """The values for its first phase: its own override the file's. Empty without a workflow."""
    tracker: str | None = None
    """The name of the tracker that it came from; None: it is in the config file."""
    plan: str | None = None
    """The id of the plan handoff that created it, so that an agent wrote its prompt; None: no plan."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all adapters that may run it, in order of preference."""
        return (self.adapter, *self.fallback)

    @property
    def builds_on_target(self) -> bool:
        """Whether it starts from the target: it needs landed tasks, or follows tasks that may change its paths."""
        return bool(self.needs or self.owns)


_Paths = Annotated[tuple[Annotated[Path, Field(strict=False)], ...], Field(strict=False)]


class PathAccess(_Model):
    """Paths outside the worktree that sessions may access; absolute."""

    writable: _Paths = ()
    """Writable files and folders."""
    readable: _Paths = ()
    """Readable files and folders inside hidden folders."""

    def __or__(self, other: PathAccess) -> PathAccess:
        """Return the union of both."""
        return PathAccess(writable=self.writable + other.writable, readable=self.readable + other.readable)


class LimitsConfig(_Model):
    """Resource limits of each process of a session or check; None: the limits of `council` itself."""

    memory: int | None = None
    """Private memory in bytes."""
    file_size: int | None = None
    """The size of the largest file that it may write, in bytes."""
    open_files: int | None = None
    """Open files, sockets and pipes."""
    processes: int | None = None
    """Processes of the same user, including unrelated ones."""

    @property
    def by_resource(self) -> dict[str, int]:
        """Return the limits that are set, by their names in setrlimit(2); core dumps are always disabled."""
        limits = {"DATA": self.memory, "FSIZE": self.file_size, "NOFILE": self.open_files, "NPROC": self.processes}
        return {"CORE": 0, **{name: limit for name, limit in limits.items() if limit is not None}}


class SandboxConfig(_Model):
    """The sandbox of all sessions and checks of a run."""

    sandbox: str
    """`auto`, `bubblewrap`, `landlock` or `off`."""
    network: bool
    """Whether they may use the network without limits."""
    hosts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Hosts that they may reach if `network` is false, as entries of `network.allow`."""
    nesting: bool = False
    """Whether they may create user namespaces, and so nested sandboxes."""
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    """Resource limits of each of their processes."""
    reach: PathAccess
    """Paths that all of them may access."""


_Strings = Annotated[tuple[str, ...], Field(strict=False)]


class SetupStep(_Model):
    """A command that sets up a new worktree."""

    run: str
    """The shell command."""
    inputs: _Strings = ()
    """Tracked files: the command runs again if one of them changed. Without any, it runs once per worktree."""
    timeout: float = 600.0
    """Its wall-clock limit in seconds."""


class WorktreesConfig(_Model):
    """The pool of worktrees for sessions and checks; paths are relative to the top, without a trailing `/`."""

    max: int = 16
    """The largest number of worktrees."""
    max_size: int | None = None
    """Their total size on disk in bytes; None: no limit."""
    sparse: _Strings = ()
    """The folders to check out, in addition to top-level files; empty: all."""
    setup: Annotated[tuple[SetupStep, ...], Field(strict=False)] = ()
    """Commands that run in order in a new worktree, before its first session."""
    before_run: _Strings = ()
    """Shell commands that run before each session; a failure fails the attempt."""
    after_run: _Strings = ()
    """Shell commands that run after each session; a failure is only reported."""
    teardown: _Strings = ()
    """Shell commands that run before a worktree is deleted; a failure is only reported."""
    hooks_timeout: float = 600.0
    """The wall-clock limit of each of these three kinds of commands, in seconds."""
    env: _Strings = ()
    """Names of environment variables that all these commands get in addition to the base set."""
    copied: _Strings = ()
    """Untracked files and folders of the user's checkout that are copied into each worktree."""
    linked: _Strings = ()
    """Untracked files and folders of the user's checkout that each worktree links to."""
    keep_ignored: _Strings = ()
    """Ignored paths to preserve for the next session: names at any depth, or paths with `/` from the top."""
    ports: int = 0
    """The number of free ports per worktree."""


class McpServerConfig(_Model):
    """A Model Context Protocol server: a command, or a URL."""

    argv: _Strings = ()
    """The program and its arguments."""
    env: _Strings = ()
    """Names of environment variables that it gets."""
    url: str | None = None
    """The URL of a running server."""

    def named(self, name: str) -> McpServer:
        """Return the server under this name, in the form that adapters get."""
        return McpServer(name, self.argv, self.env, self.url)


class AdapterConfig(_Model):
    """A named adapter with validated options."""

    name: str
    """The name that tasks refer to."""
    use: str
    """The registered name of its type."""
    capacity: int | None
    """The largest number of its concurrent sessions; None: the capacity of the run."""
    reach: PathAccess
    """Paths that its sessions may access in addition to `SandboxConfig.reach`."""
    keep_ignored: _Strings
    """Paths to preserve for its next session in addition to `WorktreesConfig.keep_ignored`."""
    options: SerializeAsAny[BaseModel]
    """An instance of the `Options` of its type."""

    def to_stored(self) -> JsonObject:
        """Return plain JSON for `restore_adapter`."""
        return self.model_dump(mode="json", exclude={"name"})


class SinkConfig(_Model):
    """A named sink with validated options."""

    name: str
    """Its name in the config file."""
    use: str
    """The registered name of its type."""
    events: Annotated[tuple[str, ...], Field(strict=False)]
    """Patterns of the events that it receives."""
    options: SerializeAsAny[BaseModel]
    """An instance of the `Options` of its type."""

    def to_stored(self) -> JsonObject:
        """Return plain JSON for `restore_options`."""
        return self.model_dump(mode="json", exclude={"name"})


class TrackerConfig(_Model):
    """A named tracker with validated options."""

    name: str
    """Its name in the config file."""
    use: str
    """The registered name of its type."""
    options: SerializeAsAny[BaseModel]
    """An instance of the `Options` of its type."""

    def to_stored(self) -> JsonObject:
        """Return plain JSON for `restore_options`."""
        return self.model_dump(mode="json", exclude={"name"})


Type = TypeVar("Type", AdapterType, SinkType, TrackerType)


def restore_options(
    subject: str, stored: JsonObject, types: Mapping[str, Type], why: str | None = None
) -> tuple[Type, BaseModel]:
    """Return the type and options of a stored adapter, sink or tracker, without its config file.

    `subject` names the entry in messages. Raises RefusedError if its plugin is no longer installed, with the reason
    `why` if known, or if the type no longer accepts these options.
    """
    use = str(stored["use"])
    if use not in types:
        reason = f": {why}" if why is not None else ""
        raise RefusedError(
            f"{subject} uses {use!r}, which is not installed{reason}", "install the plugin that provides it"
        )
    try:
        return types[use], types[use].Options.model_validate(stored["options"])
    except ValidationError as error:
        raise _outdated(subject, use, f"{error.error_count()} options differ") from error
    except KeyError as error:
        raise _outdated(subject, use, f"{error} is missing") from error


def _outdated(subject: str, use: str, difference: str) -> RefusedError:
    remedy = "install that version again, or start a new run"
    return RefusedError(f"{subject} was configured for another version of {use!r} ({difference})", remedy)


def restore_adapter(
    name: str, stored: JsonObject, adapter_types: Mapping[str, AdapterType], why: str | None = None
) -> AdapterConfig:
    """Return the adapter from `AdapterConfig.to_stored`; see `restore_options` for `why` and errors."""
    subject = f"adapter {name!r}"
    _, options = restore_options(subject, stored, adapter_types, why)
    try:
        reach = PathAccess.model_validate(stored["reach"])
        return AdapterConfig(
            name=name,
            use=stored["use"],
            capacity=stored["capacity"],
            reach=reach,
            keep_ignored=stored["keep_ignored"],
            options=options,
        )
    except ValidationError as error:
        raise _outdated(subject, stored["use"], f"{error.error_count()} options differ") from error
    except KeyError as error:
        raise _outdated(subject, stored["use"], f"{error} is missing") from error


def restore_adapters(
    stored: Mapping[str, JsonObject],
    adapter_types: Mapping[str, AdapterType],
    explain: Callable[[str], str | None] = lambda _: None,
) -> dict[str, AdapterConfig]:
    """Return the adapters of a run by name, from their stored configs."""
    return {
        name: restore_adapter(name, config, adapter_types, explain(str(config["use"])))
        for name, config in stored.items()
    }


def make_adapters(configs: Mapping[str, AdapterConfig], adapter_types: Mapping[str, AdapterType]) -> dict[str, Adapter]:
    """Return an adapter instance for each config, by name."""
    return {name: adapter_types[config.use](config.options) for name, config in configs.items()}


def used_adapters(config: RunConfig, adapter_types: Mapping[str, AdapterType]) -> dict[str, Adapter]:
    """Return the adapters that the tasks of a config use, created from stored configs as on resume."""
    used = {name for task in config.tasks for name in config.adapters_of(task)}
    stored = {name: entry.to_stored() for name, entry in config.adapters.items() if name in used}
    return make_adapters(restore_adapters(stored, adapter_types), adapter_types)


class Retention(_Model):
    """How much history a store retains; the last version of older documents is always retained."""

    age: float | None = 30 * 86400.0
    """Seconds; None: unlimited."""
    size: int = 1_000_000_000
    """The size of the log in bytes above which newer history is pruned too."""


class StateConfig(_Model):
    """The state store of a run, and its retention."""

    url: str | None = None
    """The URL of the store; None: the default store of the project."""
    retention: Retention = Field(default_factory=Retention)
    """How much history it retains."""


class CoordinationConfig(_Model):
    """How the processes of one run coordinate; durations are in seconds."""

    enabled: bool = True
    """Whether other processes can join; if false, only the run itself is claimed."""
    heartbeat_interval: float = 60.0
    """How often an owner renews its claims."""
    stale_after: float = 300.0
    """How long after its last renewal a claim expires."""
    owner_stale_after: float = 600.0
    """The same for an owner on this machine that is not proven dead."""
    sweep_interval: float = 90.0
    """How often to look for expired claims."""
    max_retries: int = 3
    """The largest number of retries of a task, across all processes."""
    when_unreachable: Literal["pause", "continue"] = "pause"
    """What to do while the store is unreachable."""
    role: Literal["auto", "leader", "worker"] = "auto"
    """Whether it may override the claims of workers; with `auto`, only while it leads the run."""
    tools: bool = True
    """Whether sessions can use the coordination tools."""
    lock_timeout: float = 5.0
    """How many seconds a session waits for a lock by default."""

    def timing(self) -> ClaimTiming:
        """Return the settings that decisions about claims need."""
        return ClaimTiming(
            self.heartbeat_interval, self.stale_after, self.owner_stale_after, self.sweep_interval, self.max_retries
        )


class RunConfig(_Model):
    """The resolved config of one run."""

    path: Annotated[Path, Field(strict=False)]
    """The absolute path of the config file; without a file, the run's name in the folder that paths are relative to."""
    texts: Annotated[tuple[Annotated[Path, Field(strict=False)], ...], Field(strict=False)] = ()
    """The prompt and schema files; absolute, with symlinks resolved."""
    digest: str | None = None
    """The SHA-256 of the config file; None without a file, and if it names prompt or schema files."""
    repo: str
    """The repository: an absolute path, or a URL as written."""
    is_url: bool
    """Whether `repo` is a URL."""
    base: str
    """The branch that tasks start from."""
    target: str | None
    """The branch that tasks land on; None: the run chooses it."""
    capacity: int
    """The largest number of concurrent sessions."""
    session_memory: int
    """The expected memory of one session, in bytes."""
    fence: SandboxConfig
    """The sandbox of sessions and checks."""
    worktrees: WorktreesConfig
    """The pool of worktrees for sessions and checks."""
    mcp_servers: Mapping[str, McpServerConfig] = {}
    """Model Context Protocol servers for sessions, by name."""
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    """The budget of the run, for all sessions together."""
    prices: Mapping[str, Price] = {}
    """The prices in the config file, by model."""
    state: StateConfig = Field(default_factory=StateConfig)
    """The state store."""
    coordination: CoordinationConfig = Field(default_factory=CoordinationConfig)
    """How the processes of the run coordinate."""
    adapters: Mapping[str, AdapterConfig]
    """The adapters by name."""
    sinks: Mapping[str, SinkConfig] = {}
    """Sinks that receive events, by name."""
    trackers: Mapping[str, TrackerConfig] = {}
    """Sources of additional tasks when the run is created, by name."""
    tasks: Annotated[tuple[TaskSpec, ...], Field(strict=False)]
    """The tasks in the file's order."""
    workflows: Mapping[str, Annotated[tuple[Phase, ...], Field(strict=False)]] = {}
    """Phases by workflow name, including the workflows of tasks that plans create."""
    context: dict[str, Any] = {}
    """Values for the phases of all tasks; the `context` of each task already includes them."""
    given: tuple[str, ...] = ()
    """The fields that the command line overrode."""
    template: TaskSpec | None = None
    """The defaults of a task from a tracker; None if there are no trackers."""

    def adapters_of(self, task: TaskSpec) -> tuple[str, ...]:
        """Return the names of all adapters that may run a phase of a task, or of tasks that its plan creates."""
        workflows = [task.workflow]
        for name in workflows:  # grows: includes the workflows of tasks that plans create
            expansions = [phase.expand for phase in self.phases_of(name) if phase.expand is not None]
            workflows += dict.fromkeys(each.workflow for each in expansions if each.workflow not in workflows)
        phases = [phase for name in workflows for phase in self.phases_of(name)]
        own = task.adapters if None in workflows or any(phase.adapter is None for phase in phases) else ()
        named = [name for phase in phases if phase.adapter is not None for name in (phase.adapter, *phase.fallback)]
        return tuple(dict.fromkeys((*own, *named)))

    def phases_of(self, workflow: str | None) -> tuple[Phase, ...]:
        """Return the phases of a workflow; empty for None."""
        return () if workflow is None else self.workflows[workflow]


_PRICES_FILE = Path(__file__).with_name("prices.json")


@cache
def known_prices() -> dict[str, Price]:
    """Return the prices by model name or prefix. Blocks on the first call."""
    return TypeAdapter(dict[str, Price]).validate_json(_PRICES_FILE.read_bytes())
