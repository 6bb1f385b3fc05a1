"""Settings of runs and tasks: in config files, resolved configs, and documents.

A field has the same name and default in all three. The docstrings of fields also describe the config file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    TypeAdapter,
)

from orchestrator.domain.settings.failures import RETRIED_BY_DEFAULT, FailureClass
from orchestrator.domain.settings.fields import (
    AccountValue,
    AllowedHost,
    Attempts,
    Branch,
    Command,
    Commands,
    Context,
    Count,
    Duration,
    EnvName,
    EnvNames,
    KeptPaths,
    Name,
    NotEmpty,
    OptionalDuration,
    OptionalRetention,
    PathPattern,
    Paths,
    Prompt,
    Repository,
    RepositoryPath,
    RepositoryPaths,
    RetryableClass,
    Settings,
    Size,
    Strings,
    short_form,
)
from orchestrator.domain.settings.path_patterns import is_match
from orchestrator.domain.settings.phase_settings import Phase
from orchestrator.domain.settings.quantities import MAX_DOLLARS
from orchestrator.domain.wording import describe_value
from orchestrator.errors import InvalidValue

#: The largest number of concurrent sessions of a run.
MAX_CAPACITY = 1000
MAX_RETRIES = 99
MAX_HOSTS = 1_000


class Backoff(Settings):
    """The exponential wait before a retry; missing keys come from the defaults."""

    initial: Duration = 2.0
    """The wait before the second attempt."""
    factor: Annotated[float, Field(ge=1)] = 2.0
    """The factor by which each wait is longer than the previous one."""
    max: Duration = 300.0
    """The longest wait."""
    jitter: bool = True
    """Whether to draw each wait at random between zero and its full length."""


class Budget(Settings):
    """Spending limits; a missing key means no limit."""

    tokens: Count | None = None
    """Input and output tokens, such as 500k or 2M."""
    cost: Annotated[float, Field(gt=0, le=MAX_DOLLARS, strict=False)] | None = None
    """US dollars, as far as they are known."""
    time: Duration | None = None
    """The sum of the wall-clock times of sessions."""

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by key."""
        return {key: limit for key, limit in self if limit is not None}


class Price(Settings):
    """Prices of a model in US dollars per million tokens."""

    input: float = Field(ge=0, le=MAX_DOLLARS, strict=False)
    """Input tokens."""
    output: float = Field(ge=0, le=MAX_DOLLARS, strict=False)
    """Output tokens."""
    cached_input: float | None = Field(default=None, ge=0, le=MAX_DOLLARS, strict=False)
    """Input tokens read from a cache. Default: the price of input tokens."""

    def cost(self, input_tokens: int, output_tokens: int, cached_tokens: int) -> float:
        """Return the cost in US dollars; `input_tokens` include the `cached_tokens`."""
        cached = self.input if self.cached_input is None else self.cached_input
        fresh = max(input_tokens - cached_tokens, 0)
        return (fresh * self.input + cached_tokens * cached + output_tokens * self.output) / 1e6


@cache
def known_prices() -> dict[str, Price]:
    """Return the built-in prices by model name or prefix. Blocks on the first call."""
    file = resources.files("orchestrator.domain.settings").joinpath("prices.json")
    return TypeAdapter(dict[str, Price]).validate_json(file.read_bytes())


def find_price(model: str | None, prices: Mapping[str, Price]) -> Price | None:
    """Return a model's price by its full name, or by its longest known prefix.

    For example, `anthropic/claude-opus-4-8-20260101` matches `claude-opus-4` if there is no longer prefix.
    """
    if model is None:
        return None
    bare = model.rpartition("/")[2]
    for name in (model, bare):
        if name in prices:
            return prices[name]
    prefixes = [name for name in prices if bare.startswith(name) and bare[len(name)] in "-.@:"]
    return prices[max(prefixes, key=len)] if prefixes else None


class NetworkSettings(Settings):
    """The hosts that sessions and checks may reach by HTTP and HTTPS via a proxy.

    All other hosts are blocked.
    """

    allow: Annotated[tuple[AllowedHost, ...], Field(strict=False, min_length=1, max_length=MAX_HOSTS)]
    """Hosts such as api.example.com (ports 80 and 443), *.example.com (its subdomains), or localhost:8080."""


class LimitSettings(Settings):
    """Resource limits of each process; a missing key sets no limit."""

    memory: Size | None = None
    """Private memory."""
    file_size: Size | None = None
    """The size of the largest file that it may write."""
    open_files: Annotated[int, Field(ge=64, le=1 << 20)] | None = None
    """Open files, sockets and pipes."""
    processes: Annotated[int, Field(ge=16, le=1 << 22)] | None = None
    """Maximum number of processes of the user, including unrelated ones; no limit for root."""

    @property
    def by_resource(self) -> dict[str, int]:
        """Return the set limits by their names in setrlimit(2); core dumps are off."""
        limits = {"DATA": self.memory, "FSIZE": self.file_size, "NOFILE": self.open_files, "NPROC": self.processes}
        return {"CORE": 0, **{name: limit for name, limit in limits.items() if limit is not None}}


@dataclass(frozen=True, slots=True)
class PathAccess:
    """Absolute paths outside the worktree that sessions may access."""

    writable: tuple[Path, ...] = ()
    """Writable files and folders."""
    readable: tuple[Path, ...] = ()
    """Readable files and folders inside hidden folders."""

    def __or__(self, other: PathAccess) -> PathAccess:
        """Return the union of both."""
        return PathAccess(self.writable + other.writable, self.readable + other.readable)


def _network_tag(value: Any) -> str:
    return "hosts" if isinstance(value, dict | BaseModel) else "word"


def _check_network(value: Any) -> Any:
    if value not in ("on", "off"):  # not a set: the value may be unhashable
        message = f"the network can't be {describe_value(value)}"
        raise InvalidValue(message, "write on, off, or {allow: [api.example.com]}")
    return value


class SandboxSettings(Settings):
    """The sandbox of sessions and checks. In a resolved config all paths are absolute."""

    sandbox: Literal["auto", "bubblewrap", "landlock", "off"] = "auto"
    """The sandbox of sessions and checks; with `off` they have all of your permissions."""
    network: Annotated[
        Annotated[Literal["on", "off"], BeforeValidator(_check_network), Tag("word")]
        | Annotated[NetworkSettings, Tag("hosts")],
        Discriminator(_network_tag),
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

    @property
    def has_network(self) -> bool:
        """Whether the network may be used without limits."""
        return self.network == "on"

    @property
    def hosts(self) -> tuple[str, ...]:
        """The only hosts that may be reached; empty: all, or none."""
        return self.network.allow if isinstance(self.network, NetworkSettings) else ()

    @property
    def access(self) -> PathAccess:
        """The paths that all sessions and checks may access."""
        return PathAccess(tuple(map(Path, self.writable)), tuple(map(Path, self.readable)))


class SetupStep(Settings):
    """A command that sets up a new worktree."""

    run: Command
    """The shell command."""
    inputs: RepositoryPaths = ()
    """Tracked files: the command runs again if one of them changed. Without any, it runs once per worktree."""
    timeout: Duration = 600.0
    """Its wall-clock limit."""


_STEP = short_form("run", "a step", "a shell command, or a mapping with `run:`", Command | SetupStep)


#: The largest value of `worktrees.max`.
MAX_WORKTREES: Final = 1000


class WorktreeSettings(Settings):
    """The pool of worktrees for sessions and checks."""

    max: Annotated[int, Field(ge=1, le=MAX_WORKTREES)] = 16
    """The largest number of worktrees. Default: 16, or `capacity` + 1 if that is more."""
    max_size: Size | None = None
    """Their total size on disk. Default: no limit."""
    sparse: RepositoryPaths = ()
    """The folders to check out, in addition to top-level files. Default: all."""
    setup: Annotated[tuple[Annotated[SetupStep, _STEP], ...], Field(strict=False)] = ()
    """Shell commands that run in order in a new worktree, before its first session or check."""
    before_run: Commands = ()
    """Shell commands that run before each session; a failure fails the attempt."""
    after_run: Commands = ()
    """Shell commands that run after each session; a failure is only reported."""
    teardown: Commands = ()
    """Shell commands that run before a worktree is deleted; a failure is only reported."""
    hooks_timeout: Duration = 600.0
    """The wall-clock limit of each command of `before_run`, `after_run` and `teardown`."""
    env: EnvNames = ()
    """Names of environment variables that these commands get in addition to the base set."""
    copied: RepositoryPaths = Field((), alias="copy")
    """Untracked files and folders of your checkout that are copied into each worktree."""
    linked: RepositoryPaths = Field((), alias="link")
    """Untracked files and folders of your checkout that each worktree links to, read-only."""
    keep_ignored: KeptPaths = ()
    """Ignored files and folders to preserve for the next session (not for checks): names, or paths from the root."""
    ports: Annotated[int, Field(ge=0, le=100)] = 0
    """The number of free ports per worktree, passed as COUNCIL_PORT_0 and so on."""


class McpServerSettings(Settings):
    """A Model Context Protocol server."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["command"]}, {"required": ["url"]}]})

    command: Annotated[tuple[NotEmpty, ...], Field(strict=False, min_length=1)] | None = None
    """The program, which uses standard input and output, and its arguments; or use `url`."""
    env: EnvNames = ()
    """Names of environment variables that it gets; the session gets them too."""
    url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    """The URL of a server (streamable HTTP)."""


class Retention(Settings):
    """How much history a state store retains."""

    retention: OptionalRetention = 30 * 86400.0
    """How long full history is retained; `off` retains all of it. Older documents keep their last version."""
    max_size: Size = 1_000_000_000
    """The size of the log on disk above which newer history is pruned too."""


class CoordinationSettings(Settings):
    """The coordination of the processes and sessions of one run."""

    enabled: bool = True
    """Whether other processes can join a run (`council work`). If false, one process runs all tasks."""
    heartbeat_interval: Duration = 60.0
    """How often claims on tasks are renewed; at most a third of `stale_after`."""
    stale_after: Duration = 300.0
    """How long after its last heartbeat a claim expires, so that another process can take over the task."""
    owner_stale_after: Duration = 600.0
    """The same for an owner on this machine that is not proven dead; at least `stale_after`."""
    stale_check_interval: Duration = 90.0
    """How often to look for expired claims."""
    max_retries: Annotated[int, Field(ge=0, le=MAX_RETRIES)] = 3
    """The largest number of retries of a task, regardless of `attempts`; a takeover counts as a retry."""
    when_unreachable: Literal["pause", "continue"] = "pause"
    """While the store is unreachable: wait for it, or continue with local state."""
    role: Literal["auto", "leader", "worker"] = "auto"
    """Whether this process may override the claims of workers. With `auto`, only while it leads the run."""
    tools: bool = True
    """Whether sessions can list other sessions, lock files and leave notes."""
    lock_timeout: Duration = 5.0
    """How long a session waits for locked files by default."""


class MergeSettings(Settings):
    """The merge queue."""

    batch: Annotated[int, Field(ge=1, le=64)] = 1
    """The largest number of tasks with equal checks that are checked as one merge. If a check fails, the task
    that causes the failure is located, and only that task is sent back."""
    wait: OptionalDuration = None
    """How long to wait for a full batch while sessions are running; `off` lands what is ready."""
    window: Annotated[int, Field(ge=1, le=64)] = 4
    """How many merges are checked at the same time: each on the assumption that all before it land. Grows by one with
    each merge that passes, up to `capacity`, and is halved by each that fails."""
    check_every_commit: bool = True
    """Whether a batch lands as one merge commit, which passed the checks, instead of one for each task."""
    on_predicted_conflict: Literal["notify", "hold", "rebase", "off"] = "notify"
    """The reaction to a predicted merge conflict between two running sessions: only report it, let the later task land
    after the other one, continue the task that still runs on top of the other one's landed work, or predict none."""


class Check(Settings):
    """A command that must succeed on the merged tree."""

    run: Command
    """The shell command."""
    cache: bool = True
    """Whether a recorded success on the same files counts; `false` for a command whose result depends on more."""
    report: RepositoryPath | None = None
    """The JUnit XML file that the command writes in its worktree, to name the failed tests."""
    paths: Annotated[tuple[PathPattern, ...], Field(strict=False)] = ()
    """Patterns of the paths that its result depends on. It runs only for work that changes one of them. Default: for
    all work."""

    def is_selected(self, changed: Iterable[str]) -> bool:
        """Return True if work with these changed paths needs the check."""
        return not self.paths or any(is_match(pattern, path) for path in changed for pattern in self.paths)


def _write_check(check: Check) -> str | dict[str, Any]:
    value = check.model_dump(mode="json", exclude_defaults=True)
    return check.run if value.keys() == {"run"} else value


#: One check in a setting or a document: a command, or a mapping.
CheckField = Annotated[
    Check,
    short_form("run", "a check", "a shell command, or a mapping with `run:`", Command | Check),
    PlainSerializer(_write_check),
]


class TaskSettings(Settings):
    """The settings that tasks share: each task can override them."""

    adapter: str | None = None
    """The adapter that runs the tasks; optional if there is only one."""
    fallback: Strings = ()
    """Adapters to use, in this order, while `adapter` is in cooldown or disabled."""
    timeout: Duration = 1800.0
    """The wall-clock limit of one session."""
    attempts: Attempts = 3
    """The largest number of attempts. Default: 3, or one more than `coordination.max_retries` if that is given."""
    backoff: Backoff = Field(default_factory=Backoff)
    """The wait between attempts."""
    idle_timeout: OptionalDuration = 600.0
    """How long a session may run without output and without a change in its worktree; `off` sets no limit."""
    retry_on: Annotated[
        frozenset[RetryableClass],
        Field(strict=False),
        # The order of a set differs between processes; the recorded order must not.
        PlainSerializer(sorted, return_type=list[FailureClass]),
    ] = RETRIED_BY_DEFAULT
    """The failure classes that are retried."""
    checks: Annotated[tuple[CheckField, ...], Field(strict=False)] = ()
    """Shell commands that must succeed on the merged tree before the target moves."""
    checks_timeout: Duration = 600.0
    """The wall-clock limit of one check."""
    checks_env: EnvNames = ()
    """Names of environment variables that checks get in addition to the base set."""
    allow_failing_base: bool = False
    """Whether sessions start even if the checks fail on the base, to fix a broken base."""
    stop_gate: bool = False
    """Whether a session that is about to end first runs the checks in its worktree, and continues if one fails."""
    on_checks_failed: Literal["retry", "fail"] = "retry"
    """Whether to retry with the output of the failed check, or to fail the task."""
    on_conflict: Literal["keep", "rebase", "resolve"] = "keep"
    """If the work has merge conflicts with the target: keep it on a branch for you to merge, repeat it from the target,
    or have a session resolve them, whose resolution is verified."""
    on_out_of_scope: Literal["retry", "extend", "allow"] = "retry"
    """If a task with `owns` changed other paths: retry it, extend its ownership, or allow the change."""
    max_file: Size = 50_000_000
    """The size of the largest file that may be committed."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Tasks with a higher priority start first, and land first; each ten minutes of waiting add one."""
    labels: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """The labels that a machine must have to run it; see `council work --label`."""
    instructions: Prompt | None = None
    """Instructions in addition to the prompt, as part of the system prompt if the CLI has one."""
    budget: Budget = Field(default_factory=Budget)
    """The budget of a task, for all of its sessions."""
    session_budget: Budget = Field(default_factory=Budget)
    """The budget of each session."""
    workflow: Name | None = None
    """The workflow of a task: a name under `workflows`, `adw`, or `none`. Default: none."""


class TaskSpec(TaskSettings):
    """A resolved task, with its file's defaults and its prompt as text."""

    id: Name
    """The task's name within the run."""
    prompt: Prompt
    """The prompt for the CLI."""
    adapter: str
    """The adapter that runs it."""
    needs: Strings = ()
    """The tasks that must land before this one lands, and before it starts unless they are `built_needs`."""
    built_needs: Strings = ()
    """The needs whose built work it starts on before that has landed."""
    owns: Annotated[tuple[PathPattern, ...], Field(strict=False)] = ()
    """Patterns of the paths that it may change; tasks with overlapping patterns never run at the same time."""
    context: Context = Field(default_factory=dict)
    """Values for its first phase, including those of the file. Empty without a workflow."""
    tracker: str | None = None
    """The name of the tracker that it came from; None: it is in the config file."""
    past_requests: Strings = ()
    """The requests in its tracker that were meant for an earlier run."""
    plan: str | None = None
    """The id of the plan handoff that created it, so that an agent wrote its prompt; None: no plan."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all adapters that may run it, in order of preference."""
        return (self.adapter, *self.fallback)

    @property
    def check_commands(self) -> tuple[str, ...]:
        """The shell commands of its checks."""
        return tuple(check.run for check in self.checks)

    @property
    def builds_on_target(self) -> bool:
        """Whether it starts from the target, because it builds on landed tasks.

        It needs them, or follows tasks that may change its paths.
        """
        return bool(self.needs or self.owns)


class AdapterSettings(Settings):
    """An adapter without its type's options; resolved paths are absolute."""

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
    accounts: dict[Name, dict[EnvName, AccountValue]] = Field(default_factory=dict)
    """Accounts by name, each with variables, whose value is a folder, or `$NAME` for that of your variable."""

    @property
    def access(self) -> PathAccess:
        """The paths that its sessions may access in addition to the sandbox settings."""
        return PathAccess(tuple(map(Path, self.writable)), tuple(map(Path, self.readable)))


class SinkSettings(Settings):
    """A sink that receives events, without the options of its type."""

    use: str
    """The kind of sink: `jsonlines`, or one from an installed plugin."""
    events: Annotated[tuple[NotEmpty, ...], Field(strict=False, min_length=1)] = ("*",)
    """Patterns of the events that it receives, such as `task.*`. Default: all."""


class TrackerSettings(Settings):
    """An external task list, without the options of its type."""

    use: str
    """The kind of tracker: `checklist`, `github`, `gitlab`, or one from an installed plugin."""
    sync_interval: Duration = 60.0
    """How often the tracker shows the states of tasks and looks for requests, in addition to when a task changes."""


class PullRequestSettings(Settings):
    """How tasks land by pull requests (GitLab: merge requests), without the options of the forge."""

    use: str
    """The kind of forge: `github`, `gitlab`, or one from an installed plugin."""
    draft: bool = False
    """Whether to open pull requests as drafts."""
    labels: Strings = ()
    """Labels of the pull requests."""
    reviewers: Strings = ()
    """The logins of the users whose review is requested."""
    auto_merge: bool = False
    """Whether the forge merges a pull request as soon as its own rules allow it."""
    template: Prompt | None = None
    """The text of a pull request, with {task}, {run} and {prompt}. Default: the prompt of the task and the run."""
    on_ci_failure: Literal["fix", "keep"] = "fix"
    """If the forge's checks of a pull request fail: continue the task with their output, or only report it."""
    on_review: Literal["fix", "keep"] = "fix"
    """If someone with write access requests changes or comments on lines: continue the task, or only report it."""
    rounds: Annotated[int, Field(ge=0, le=MAX_RETRIES)] = 3
    """How many times a task is continued for its pull request."""
    sync_interval: Duration = 60.0
    """How often the pull requests are read."""


class _WithOptions(Settings):
    options: Any
    """An instance of the `Options` of its type; in a run document, the same as JSON."""

    def to_stored(self) -> Self:
        """Return the entry for a run document."""
        return self.model_copy(update={"options": self.options.model_dump(mode="json")})


class AdapterConfig(AdapterSettings, _WithOptions):
    """An adapter with valid options."""


class SinkConfig(SinkSettings, _WithOptions):
    """A sink with valid options."""


class TrackerConfig(TrackerSettings, _WithOptions):
    """A tracker with valid options."""


class PullRequestConfig(PullRequestSettings, _WithOptions):
    """How tasks land by pull requests, with valid options of the forge."""


class RunSettings(Settings):
    """The settings that a config file, its resolved config and the document share."""

    repo: Repository = "."
    """The repository: a path, relative to this file, or a URL."""
    base: Branch = "main"
    """The branch that tasks start from."""
    target: Branch | None = None
    """The branch that tasks land on. Default: council/ and the run id."""
    capacity: Annotated[int, Field(ge=1, le=MAX_CAPACITY)] = 4
    """The largest number of concurrent sessions."""
    checks_capacity: Annotated[int, Field(ge=1, le=MAX_CAPACITY)] | None = None
    """The largest number of checks and commands in `council slot` that run at the same time. Default: `capacity`."""
    session_memory: Size = 256 << 20
    """The expected memory of one session; only as many sessions start as fit in memory."""
    mcp_servers: dict[Name, McpServerSettings] = Field(default_factory=dict)
    """Model Context Protocol servers for sessions, by name."""
    budget: Budget = Field(default_factory=Budget)
    """The budget of the run, for all sessions together."""
    prices: dict[NotEmpty, Price] = Field(default_factory=dict)
    """Prices per million tokens by model, for CLIs that report no cost; they override the built-in prices."""
    worktrees: WorktreeSettings = Field(default_factory=WorktreeSettings)
    """The pool of worktrees for sessions and checks."""
    coordination: CoordinationSettings = Field(default_factory=CoordinationSettings)
    """The coordination of the processes of one run."""
    merge: MergeSettings = Field(default_factory=MergeSettings)
    """How built tasks are checked before they land."""


class ResolvedSettings(RunSettings):
    """The settings of a run that its resolved config and its document share."""

    repo: str
    """The repository: an absolute path, or a URL as written."""
    is_url: bool
    """Whether `repo` is a URL."""
    base: str
    """The branch that tasks start from."""
    target: str | None
    """The branch that tasks land on; None: the run chooses it."""
    sandbox: SandboxSettings = Field(default_factory=SandboxSettings)
    """The sandbox of sessions and checks."""
    adapters: dict[str, AdapterConfig]
    """The adapters by name."""
    sinks: dict[str, SinkConfig] = Field(default_factory=dict)
    """Sinks that receive events, by name."""
    trackers: dict[str, TrackerConfig] = Field(default_factory=dict)
    """Sources of additional tasks when the run is created, by name."""
    pull_requests: PullRequestConfig | None = None
    """How tasks land by pull requests; None: they land on the target directly."""
    workflows: dict[str, Annotated[tuple[Phase, ...], Field(strict=False)]] = Field(default_factory=dict)
    """Phases by workflow name, including the workflows of tasks that plans create."""
    overrides: Strings = ()
    """The fields that the command line overrode."""
