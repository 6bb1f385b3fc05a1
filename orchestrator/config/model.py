"""A run as it was configured, everything resolved: no default is left for anyone downstream to fill in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, SerializeAsAny, ValidationError

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
    """How long to wait before a failed task is tried again."""

    initial: float = 2.0
    """Seconds before the second attempt."""
    factor: float = 2.0
    """How many times longer each wait is than the one before."""
    max: float = 300.0
    """The longest wait in seconds."""
    jitter: bool = True
    """Whether a wait is drawn at random between nothing and its full length."""

    def policy(self) -> retry.Backoff:
        """Return the same as the value that `retry_delay` takes."""
        return retry.Backoff(self.initial, self.factor, self.max, self.jitter)


class BudgetConfig(_Model):
    """How much may be used up; None: without a limit."""

    tokens: int | None = None
    """Tokens in and out."""
    cost: float | None = None
    """US dollars."""
    time: float | None = None
    """Seconds of sessions."""

    def policy(self) -> budget.Budget:
        """Return the same as the value that decisions take."""
        return budget.Budget(self.tokens, self.cost, self.time)


class TaskSpec(_Model):
    """One task, complete; `model_dump(mode="json")` and `model_validate` bring it through JSON."""

    id: str
    """The task's name within the run."""
    prompt: str
    """What the CLI is asked to do; the text itself, also where the file named another."""
    needs: Annotated[tuple[str, ...], Field(strict=False)]
    """The tasks that must have landed before this one starts."""
    adapter: str
    """The name of the adapter that runs it."""
    fallback: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """The names of adapters that stand in while that one is parked or stopped, in this order."""
    timeout: float
    """Wall-clock seconds that one session may take."""
    attempts: int = 3
    """How often it is tried at most. Not among the fields that are set where the file says nothing."""
    backoff: Backoff
    """How long to wait between attempts."""
    idle_timeout: float | None
    """Seconds that a session may go without output and without a change in its worktree; None: no limit."""
    retry_on: Annotated[
        frozenset[Annotated[FailureClass, Field(strict=False)]],
        Field(strict=False),
        # A set's own order differs between processes: what is recorded of one task should not.
        PlainSerializer(sorted, return_type=list[FailureClass]),
    ]
    """The classes of failure that are worth another attempt."""
    checks: Annotated[tuple[str, ...], Field(strict=False)]
    """Shell commands that must succeed on the merged tree."""
    checks_timeout: float
    """Wall-clock seconds that one check may take."""
    checks_env: Annotated[tuple[str, ...], Field(strict=False)]
    """Names of variables that checks see beside the base set."""
    allow_failing_base: bool = False
    """Whether sessions start though the checks fail on the base."""
    retry_checks: bool
    """Whether another attempt follows where the checks failed."""
    max_file: int
    """Bytes of the largest file that may be committed."""
    priority: int
    """The higher, the earlier among those that are ready."""
    owns: Annotated[tuple[str, ...], Field(strict=False)]
    """Patterns of the paths that it works on."""
    on_out_of_scope: Literal["retry", "extend", "allow"] = "retry"
    """What follows where it owns paths and has changed others."""
    instructions: str | None = None
    """What the CLI is told apart from the prompt."""
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    """What all of its sessions may use up together."""
    session_budget: BudgetConfig = Field(default_factory=BudgetConfig)
    """What each of them may use up."""
    workflow: str | None = None
    """The name of the phases that it goes through; None: the one phase `build`."""
    context: dict[str, Any] = {}
    """The values that its first phase inherits: its own before those of the file; none without a workflow."""
    tracker: str | None = None
    """The name of the tracker that it came from; None: the user's file has it."""
    plan: str | None = None
    """The id of the handoff with the plan that it came of: an agent wrote its prompt; None: no plan."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all adapters that may run it, the best first."""
        return (self.adapter, *self.fallback)

    @property
    def builds_on_target(self) -> bool:
        """Whether it starts from the target: it needs what landed there, or follows what may change its paths."""
        return bool(self.needs or self.owns)


_Paths = Annotated[tuple[Annotated[Path, Field(strict=False)], ...], Field(strict=False)]


class PathAccess(_Model):
    """What sessions may reach of this machine beyond their worktree; paths are absolute."""

    writable: _Paths = ()
    """Files and folders to write."""
    readable: _Paths = ()
    """Files and folders to read inside of what is hidden."""

    def __or__(self, other: PathAccess) -> PathAccess:
        """Return both together."""
        return PathAccess(writable=self.writable + other.writable, readable=self.readable + other.readable)


class LimitsConfig(_Model):
    """What each process of a session or check may have of a resource; None: as much as `council` itself."""

    memory: int | None = None
    """Bytes of its own."""
    file_size: int | None = None
    """Bytes of a file that it writes."""
    open_files: int | None = None
    """Files, sockets and pipes that it has open."""
    processes: int | None = None
    """Processes of the same user, wherever they belong."""

    @property
    def by_resource(self) -> dict[str, int]:
        """Return those that are set, and no core dumps, by their names in setrlimit(2)."""
        found = {"DATA": self.memory, "FSIZE": self.file_size, "NOFILE": self.open_files, "NPROC": self.processes}
        return {"CORE": 0, **{name: most for name, most in found.items() if most is not None}}


class SandboxConfig(_Model):
    """What fences all sessions and checks of a run in."""

    sandbox: str
    """`auto`, `bubblewrap`, `landlock` or `off`."""
    network: bool
    """Whether they reach the network, all of it."""
    hosts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Without `network`: what they reach all the same, as entries of `network.allow`."""
    nesting: bool = False
    """Whether they may make user namespaces, and so sandboxes of their own."""
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    """What each of their processes may have of a resource."""
    reach: PathAccess
    """What all of them may reach."""


_Strings = Annotated[tuple[str, ...], Field(strict=False)]


class SetupStep(_Model):
    """A command that makes a new worktree ready for work."""

    run: str
    """The shell command."""
    inputs: _Strings = ()
    """Files of the commit: it is run again only when one of them changed; without any, once for each worktree."""
    timeout: float = 600.0
    """Wall-clock seconds that it may take."""


class WorktreesConfig(_Model):
    """The checkouts that sessions and checks take turns in; paths are relative to their top, without `/` at the end."""

    max: int = 16
    """How many there are at most."""
    max_size: int | None = None
    """Bytes that all of them may take on disk together; None: no limit."""
    sparse: _Strings = ()
    """The folders that are checked out, beside the files at the top; none: all."""
    setup: Annotated[tuple[SetupStep, ...], Field(strict=False)] = ()
    """What is run in turn in a new worktree before its first session."""
    before_run: _Strings = ()
    """Shell commands before each session; one that fails fails the attempt."""
    after_run: _Strings = ()
    """Shell commands after each session; one that fails is only told of."""
    teardown: _Strings = ()
    """Shell commands before a worktree is deleted; one that fails is only told of."""
    hooks_timeout: float = 600.0
    """Wall-clock seconds that each of these three kinds of commands may take."""
    env: _Strings = ()
    """Names of variables that all these commands see beside the base set."""
    copied: _Strings = ()
    """Untracked files and folders of the user's checkout that each worktree gets a copy of."""
    linked: _Strings = ()
    """Untracked files and folders of the user's checkout that each worktree gets a link to."""
    keep_ignored: _Strings = ()
    """Ignored files and folders that stay for the next session: names at any depth, or paths with `/` from the top."""
    ports: int = 0
    """How many free ports each of them gets."""


class McpServerConfig(_Model):
    """A server of the Model Context Protocol: a command, or a URL."""

    argv: _Strings = ()
    """The program and its arguments."""
    env: _Strings = ()
    """Names of variables that it gets."""
    url: str | None = None
    """Where it is served."""

    def named(self, name: str) -> McpServer:
        """Return what adapters are told of it."""
        return McpServer(name, self.argv, self.env, self.url)


class AdapterConfig(_Model):
    """One adapter under its name, with validated options."""

    name: str
    """The name that tasks call it by."""
    use: str
    """The name that a plugin registered its type under."""
    capacity: int | None
    """How many of its sessions may run at once; None: as many as the run's capacity."""
    reach: PathAccess
    """What its sessions may reach beyond what all may."""
    keep_ignored: _Strings
    """What stays for its next session beside `WorktreesConfig.keep_ignored`."""
    options: SerializeAsAny[BaseModel]
    """An instance of that type's `Options`."""

    def to_stored(self) -> JsonObject:
        """Return what `restore_adapter` takes, as plain JSON."""
        return self.model_dump(mode="json", exclude={"name"})


class SinkConfig(_Model):
    """One sink under its name, with validated options."""

    name: str
    """The name that the file gives it."""
    use: str
    """The name that a plugin registered its type under."""
    events: Annotated[tuple[str, ...], Field(strict=False)]
    """Patterns of the events that it gets."""
    options: SerializeAsAny[BaseModel]
    """An instance of that type's `Options`."""

    def to_stored(self) -> JsonObject:
        """Return what `restore` takes, as plain JSON."""
        return self.model_dump(mode="json", exclude={"name"})


class TrackerConfig(_Model):
    """One tracker under its name, with validated options."""

    name: str
    """The name that the file gives it."""
    use: str
    """The name that a plugin registered its type under."""
    options: SerializeAsAny[BaseModel]
    """An instance of that type's `Options`."""

    def to_stored(self) -> JsonObject:
        """Return what `restore` takes, as plain JSON."""
        return self.model_dump(mode="json", exclude={"name"})


Type = TypeVar("Type", AdapterType, SinkType, TrackerType)


def restore_options(
    what: str, stored: JsonObject, types: Mapping[str, Type], why: str | None = None
) -> tuple[Type, BaseModel]:
    """Return the type and the options that a config's `stored` gave, without the file that it came from.

    `what` names it in messages. Raises RefusedError if its plugin is no longer installed, with `why` if that is known,
    or no longer takes these options.
    """
    use = str(stored["use"])
    if use not in types:
        reason = f": {why}" if why is not None else ""
        raise RefusedError(f"{what} uses {use!r}, which is not installed{reason}", "install the plugin that brings it")
    try:
        return types[use], types[use].Options.model_validate(stored["options"])
    except ValidationError as error:
        raise _outdated(what, use, f"{error.error_count()} options differ") from error
    except KeyError as error:
        raise _outdated(what, use, f"{error} is missing") from error


def _outdated(what: str, use: str, how: str) -> RefusedError:
    remedy = "install that version again, or start a new run"
    return RefusedError(f"{what} was configured for another version of {use!r} ({how})", remedy)


def restore_adapter(
    name: str, stored: JsonObject, adapter_types: Mapping[str, AdapterType], why: str | None = None
) -> AdapterConfig:
    """Return the adapter that `AdapterConfig.to_stored` gave; see `restore`."""
    what = f"adapter {name!r}"
    _, options = restore_options(what, stored, adapter_types, why)
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
        raise _outdated(what, stored["use"], f"{error.error_count()} options differ") from error
    except KeyError as error:
        raise _outdated(what, stored["use"], f"{error} is missing") from error


def restore_adapters(
    stored: Mapping[str, JsonObject],
    adapter_types: Mapping[str, AdapterType],
    explain: Callable[[str], str | None] = lambda _: None,
) -> dict[str, AdapterConfig]:
    """Return the adapters of a run by name, from what is recorded of them."""
    return {name: restore_adapter(name, one, adapter_types, explain(str(one["use"]))) for name, one in stored.items()}


def make_adapters(configs: Mapping[str, AdapterConfig], adapter_types: Mapping[str, AdapterType]) -> dict[str, Adapter]:
    """Return the adapters that were configured, by name."""
    return {name: adapter_types[config.use](config.options) for name, config in configs.items()}


def used_adapters(config: RunConfig, adapter_types: Mapping[str, AdapterType]) -> dict[str, Adapter]:
    """Return the adapters that a config's tasks use, made as a resume would make them from what is recorded."""
    used = {name for task in config.tasks for name in config.adapters_of(task)}
    stored = {name: entry.to_stored() for name, entry in config.adapters.items() if name in used}
    return make_adapters(restore_adapters(stored, adapter_types), adapter_types)


class Retention(_Model):
    """How much of the past a store keeps; of what is older the last versions of each document stay."""

    age: float | None = 30 * 86400.0
    """Seconds; None: without end."""
    size: int = 1_000_000_000
    """Bytes that the log may take, before what is younger goes, too."""


class StateConfig(_Model):
    """Where a run is recorded, and for how long."""

    url: str | None = None
    """The URL of the store; None: the project's own."""
    retention: Retention = Field(default_factory=Retention)
    """How much of the past it keeps."""


class CoordinationConfig(_Model):
    """How the processes that work in one run keep out of each other's way; durations are in seconds."""

    enabled: bool = True
    """Whether others can join; without it nothing is claimed beside the run itself."""
    heartbeat_interval: float = 60.0
    """How often an owner renews its claims."""
    stale_after: float = 300.0
    """How long a claim holds without that."""
    owner_stale_after: float = 600.0
    """The same for an owner on this machine that is not proven dead."""
    sweep_interval: float = 90.0
    """How often claims that no longer hold are looked for."""
    max_retries: int = 3
    """How often a task is tried again, by whomever."""
    when_unreachable: Literal["pause", "continue"] = "pause"
    """What is done while the store can't be reached."""
    role: Literal["auto", "leader", "worker"] = "auto"
    """Whether it may override the claims of others: `auto` as long as it coordinates the run."""
    tools: bool = True
    """Whether sessions can ask who else is at work."""
    lock_timeout: float = 5.0
    """How many seconds a session waits for a lock, where it does not say."""

    def timing(self) -> ClaimTiming:
        """Return what of it decisions about claims take."""
        return ClaimTiming(
            self.heartbeat_interval, self.stale_after, self.owner_stale_after, self.sweep_interval, self.max_retries
        )


class RunConfig(_Model):
    """What one file asks for."""

    path: Annotated[Path, Field(strict=False)]
    """The file, absolute; where there is none, the name of the run in the folder that its paths start from."""
    texts: Annotated[tuple[Annotated[Path, Field(strict=False)], ...], Field(strict=False)] = ()
    """The files that prompts and schemas were read from; absolute, with symlinks resolved."""
    repo: str
    """The repository: an absolute path, or a URL as it was written."""
    is_url: bool
    """Whether `repo` is a URL."""
    base: str
    """The branch that work starts from."""
    target: str | None
    """The branch that work lands on; None leaves the choice to the run."""
    capacity: int
    """How many sessions may run at once."""
    session_memory: int
    """Bytes of memory that one session is expected to take."""
    fence: SandboxConfig
    """What sessions and checks are fenced in by."""
    worktrees: WorktreesConfig
    """What they take turns in."""
    mcp_servers: Mapping[str, McpServerConfig] = {}
    """What sessions can use, by name."""
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    """What all sessions may use up together."""
    prices: Mapping[str, Price] = {}
    """What the file says that models cost, by name."""
    state: StateConfig = Field(default_factory=StateConfig)
    """Where all is recorded."""
    coordination: CoordinationConfig = Field(default_factory=CoordinationConfig)
    """How those that work in it keep out of each other's way."""
    adapters: Mapping[str, AdapterConfig]
    """The adapters by name."""
    sinks: Mapping[str, SinkConfig] = {}
    """Who gets to know what happens, by name."""
    trackers: Mapping[str, TrackerConfig] = {}
    """Where further tasks are taken from when the run is made, by name."""
    tasks: Annotated[tuple[TaskSpec, ...], Field(strict=False)]
    """The tasks in the file's order."""
    workflows: Mapping[str, Annotated[tuple[Phase, ...], Field(strict=False)]] = {}
    """The phases of the workflows that tasks go through, and of those that tasks of their plans will, by name."""
    context: dict[str, Any] = {}
    """What the file gives to the phases of all tasks; the tasks' own `context` has it already."""
    given: tuple[str, ...] = ()
    """The fields of this that the command line gave instead of the file."""
    template: TaskSpec | None = None
    """What a task is that says nothing but its id, its prompt and its needs; None where there is no tracker."""

    def adapters_of(self, task: TaskSpec) -> tuple[str, ...]:
        """Return the names of all adapters that may run a phase of a task, or of what its plan becomes."""
        workflows = [task.workflow]
        for name in workflows:  # those of what plans become with them
            expansions = [one.expand for one in self.phases_of(name) if one.expand is not None]
            workflows += dict.fromkeys(one.workflow for one in expansions if one.workflow not in workflows)
        phases = [phase for name in workflows for phase in self.phases_of(name)]
        own = task.adapters if None in workflows or any(phase.adapter is None for phase in phases) else ()
        named = [name for phase in phases if phase.adapter is not None for name in (phase.adapter, *phase.fallback)]
        return tuple(dict.fromkeys((*own, *named)))

    def phases_of(self, workflow: str | None) -> tuple[Phase, ...]:
        """Return the phases of a workflow; None has none."""
        return () if workflow is None else self.workflows[workflow]
