"""The contracts of plugins, complete enough to implement a plugin from this file.

A plugin registers types under names (`orchestrator.hookspecs`). A YAML file selects a type with `use: NAME` and sets
its options, which a pydantic model of the type validates.

adapter   describes how to run a CLI, as data; it never starts a process.     AdapterType, Adapter
sink      receives the events of a run, to notify another system.             SinkType, Sink
tracker   provides tasks from an external list, and shows their states there. TrackerType, Tracker
forge     opens and reads pull requests, by which tasks land.                 ForgeType, Forge
store     stores all state, which only `commit` changes.                      StoreType, Store

`orchestrator.testing` has a test suite for each contract that every implementation must pass.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, Protocol, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo

from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.errors import RefusedError
from orchestrator.system.clock import Clock

if TYPE_CHECKING:
    from orchestrator.domain.events.base import TypedEvent

__all__ = [
    "LARGE_DOCUMENT_BYTES",
    "VERSIONS_KEPT",
    "Adapter",
    "AdapterType",
    "AgentMessage",
    "AgentPlan",
    "Capability",
    "CiFailure",
    "CliWarning",
    "Commit",
    "CommitRecord",
    "CompactionResult",
    "ConversationStarted",
    "Damage",
    "Document",
    "DocumentVersion",
    "Dump",
    "DumpedCommit",
    "DumpedDocument",
    "Event",
    "Failed",
    "FailureClass",
    "FinalResult",
    "Forge",
    "ForgeType",
    "Guard",
    "JsonObject",
    "Key",
    "McpServer",
    "NewPullRequest",
    "PathOption",
    "PluginType",
    "ProfileFormat",
    "Program",
    "PullRequest",
    "RecordedEvent",
    "RequestedAction",
    "ReviewFinding",
    "SessionCommand",
    "SessionEnd",
    "SessionEvent",
    "SessionHome",
    "SessionRequest",
    "SettingsOverlay",
    "Sink",
    "SinkType",
    "StarterValue",
    "StateSnapshot",
    "Store",
    "StoreStatistics",
    "StoreType",
    "SyncResult",
    "ToolCall",
    "ToolResult",
    "TrackedState",
    "TrackedTask",
    "Tracker",
    "TrackerRequest",
    "TrackerType",
    "UsageReport",
    "VerificationReport",
    "Write",
]

JsonObject = dict[str, Any]

#: The number of versions of a document that a store keeps, even if it compacts its log.
VERSIONS_KEPT: Final = 10


#: The document size in bytes that causes a warning, because each version takes this much space in the log.
LARGE_DOCUMENT_BYTES: Final = 1_000_000


def _absolute(path: Path, info: ValidationInfo) -> Path:
    if not path.name or "\0" in str(path):
        raise ValueError("this is not a file path: write an absolute path, or one relative to this file")
    folder: Path = (info.context or {}).get("folder", Path())
    return (folder / path.expanduser()).absolute()


#: A path in a plugin's options. The plugin receives an absolute path: relative paths start at the YAML file's folder,
# and `~` is the home.
PathOption = Annotated[Path, Field(strict=False), AfterValidator(_absolute)]


class StarterValue(NamedTuple):
    """Annotates an option of an adapter that `council init` writes to a new file, with this value and a comment."""

    value: str
    comment: str


class Key(NamedTuple):
    """The name of a document: its kind (`run`, `task`, …) and its id within the kind."""

    kind: str
    id: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.id}"


class Document(NamedTuple):
    """A document as read: `encoded` is UTF-8 JSON, `version` counts from 1.

    `damaged` is true if a later version exists but is unreadable on disk: `value` is then an older value, and readers
    must not treat it as current.
    """

    key: Key
    version: int
    encoded: bytes
    position: int
    """The position of the commit that wrote this version."""
    damaged: bool = False
    time: float = 0.0
    """When this version was written (wall-clock seconds of the store's clock)."""
    writer: str = ""
    """The process that wrote this version, as `user@host:pid`."""
    expires: float | None = None
    """When the document expires and then counts as missing (wall-clock seconds, or None for never)."""

    @property
    def value(self) -> JsonObject:
        """The value. Each access decodes a new copy, owned by the reader."""
        value: JsonObject = json.loads(self.encoded)
        return value

    def to_json(self) -> JsonObject:
        """Return the document as it appears in JSON output."""
        return {
            "key": str(self.key),
            "version": self.version,
            "position": self.position,
            "time": self.time,
            "writer": self.writer,
            "expires": self.expires,
            "damaged": self.damaged,
            "value": self.value,
        }


@dataclass(frozen=True, slots=True)
class Write:
    """A change to one document.

    `expected` is the version that was read (0 if none); the value None deletes. With `ttl`, the document expires after
    that many seconds unless it is written again.
    """

    key: Key
    expected: int
    value: JsonObject | None
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class Guard:
    """A condition of a commit: the lease document at `key` still has this `epoch`."""

    key: Key
    epoch: int


@dataclass(frozen=True, slots=True)
class Event:
    """An event, recorded in the same commit as the change that it describes."""

    type: str
    data: JsonObject = field(default_factory=dict)

    @classmethod
    def of(cls, event: TypedEvent) -> Event:
        """Return the record of one of our events (`orchestrator.domain.events`)."""
        event.check_context()
        return cls(event.type, event.data())


@dataclass(frozen=True, slots=True)
class Commit:
    """An atomic change: all writes and events, if all versions and guards match.

    A commit that is not `durable` survives the death of all processes, but possibly not a power failure. Use this for
    documents that are soon rewritten, such as heartbeats.
    """

    writes: Sequence[Write] = ()
    events: Sequence[Event] = ()
    guards: Sequence[Guard] = ()
    durable: bool = True
    id: str = field(default_factory=lambda: token_hex(16), kw_only=True, compare=False, repr=False)
    """Unique: a store on a server applies a commit once, even if it is sent again because a reply was lost."""


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """A commit from the log: position (from 1, gapless), time, and contents.

    Times are wall-clock seconds. `unreadable` lists the documents whose new values were lost to damage; they are
    missing from `documents`. A deleted document has the value None.
    """

    position: int
    time: float
    documents: Mapping[Key, tuple[int, JsonObject | None]]
    events: Sequence[Event]
    unreadable: Sequence[Key] = ()
    writer: str = ""
    """The process that committed, as `user@host:pid`."""


@dataclass(frozen=True, slots=True)
class DocumentVersion:
    """One version in the history of a document.

    `value` is None if this version is `damaged` or the document's deletion. `events` are those of the commit that wrote
    it, and show the kind of change.
    """

    version: int
    position: int
    time: float
    writer: str
    value: JsonObject | None
    events: Sequence[Event] = ()
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class StateSnapshot:
    """All documents as of a commit, except those that had expired by then."""

    position: int
    time: float
    """The commit's time in wall-clock seconds; 0 at position 0."""
    documents: Mapping[Key, Document]


@dataclass(frozen=True, slots=True)
class Damage:
    """A damaged part of the log: location, affected documents, and handling.

    Documents are None if unknown. `offset` is in bytes, or None if the store has no offsets.
    """

    path: Path
    offset: int | None
    keys: Sequence[Key] | None
    message: str

    def describe(self) -> str:
        """Return a one-line description."""
        affected = ", ".join(map(str, self.keys)) or "nothing lost" if self.keys is not None else "unknown documents"
        return f"{self.location}: {self.message} ({affected})"

    @property
    def location(self) -> str:
        """The file or key, with the offset if known."""
        return str(self.path) if self.offset is None else f"{self.path}, byte {self.offset}"


@dataclass(frozen=True, slots=True)
class CompactionResult:
    """The outcome of a compaction: the size of the log in bytes before and after.

    `first` is the position of the oldest state that the log can still reproduce.
    """

    before: int
    after: int
    first: int


@dataclass(frozen=True, slots=True)
class VerificationReport:
    """The result of a verification: position, size in bytes, and all errors."""

    position: int
    bytes: int
    damage: Sequence[Damage] = ()
    damaged: Sequence[Key] = ()
    """Documents whose newest version can't be read."""
    mismatched: Sequence[Key] = ()
    """Documents whose value in the store differs from the log, because of a bug or faulty memory."""
    unreadable: Mapping[Key, str] = field(default_factory=dict)
    """Council documents with the wrong shape for their kind, and the reason. Stores leave this empty."""

    @property
    def is_valid(self) -> bool:
        """Whether there are no errors."""
        return not (self.damage or self.damaged or self.mismatched or self.unreadable)


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """The connections of this process to a store's server, except those that only wait for changes."""

    size: int
    max_size: int
    in_use: int
    waiting: int
    """The calls that wait for a connection."""


@dataclass(frozen=True, slots=True)
class ReplicaStatistics:
    """A replica of a store's server, as seen by the primary."""

    name: str
    state: str
    """In the server's own words, such as `streaming` or `online`."""
    is_synchronous: bool
    """Whether durable commits wait for it."""
    lag_bytes: int | None = None
    """How much of the primary's log it has not confirmed yet; None if unknown."""
    lag_seconds: float | None = None
    """The age of its last confirmation (Redis), or its delay (PostgreSQL); None if unknown."""


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """The server of a store."""

    version: str
    """Its name and version."""
    connections: int
    """The connections of all programs."""
    max_connections: int
    pool: PoolStatistics
    replicas: Sequence[ReplicaStatistics] = ()
    problem: str = ""
    """Why the server may lose commits or not accept them; empty if it does neither."""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """The size of a store as of `position`; sizes are in bytes."""

    position: int
    first: int
    """The position of the oldest state that the log can reproduce."""
    documents: int
    bytes: int
    """The size of all documents."""
    log_bytes: int
    """The size of the log on disk."""
    expired: Sequence[Key] = ()
    """Documents that have expired and have not been deleted or rewritten since."""
    large: Sequence[tuple[Key, int]] = ()
    """Documents larger than LARGE_DOCUMENT_BYTES with their sizes, largest first."""
    server: ServerStatistics | None = None
    """The server; None for a store without one."""


class DumpedDocument(NamedTuple):
    """A document's new version in a dumped commit."""

    key: Key
    version: int
    encoded: bytes | None
    """The value as UTF-8 JSON on one line, or None if deleted. Loading and dumping preserve the bytes."""
    expires: float | None = None
    """When the document expires (wall-clock seconds, or None for never)."""
    previous: int = 0
    """The position of the previous version, which links the document's history; 0 if none or unknown."""


@dataclass(frozen=True, slots=True)
class DumpedCommit:
    """A commit as copied between stores, from which all its views can be derived."""

    position: int
    time: float
    """Wall-clock seconds of the original store's clock."""
    writer: str
    """The process that committed, as `user@host:pid`."""
    documents: Sequence[DumpedDocument] = ()
    events: Sequence[Event] = ()


@dataclass(frozen=True, slots=True)
class Dump:
    """A whole log as of a position, sufficient for an identical copy."""

    position: int
    """The position of the newest commit; 0 if there is none."""
    first: int
    """The position of the oldest state that can be reproduced. Earlier commits are included as `compact` left them."""
    commits: AsyncGenerator[DumpedCommit]
    """The commits ordered by position. Can be iterated once, while the dump is open."""


class Store(Protocol):
    """The storage of all state; must pass `orchestrator.testing.store_contract`."""

    def local_paths(self) -> Sequence[Path]:
        """Return local paths with the data; empty if remote or in memory.

        The paths are absolute and exist. They are hidden from sessions. A store without local paths is treated as
        remote and possibly unreachable at times.
        """

    async def commit(self, commit: Commit) -> int:
        """Apply `commit` atomically and durably, and return its position in the log.

        Raises VersionConflict, LeaseLost or InvalidDocument, or StoreUnavailable if the commit can't be made durable;
        then nothing is changed. A deleted document's `expected` is 0 again, but its version numbers continue, so that
        the expected version of a stale reader can't match by accident. The same applies to an expired document; guards
        of an expired lease fail. If the caller is cancelled, the commit still completes before this returns.
        """

    async def get(self, key: Key) -> Document | None:
        """Return the newest version of a document, by any process, or None."""

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """Return the documents of a kind whose id begins with `prefix`, sorted by id."""

    async def position(self) -> int:
        """Return the position of the newest commit; 0 for an empty store."""

    def watch(self, after: int = 0) -> AsyncGenerator[CommitRecord]:
        """Yield every record after position `after`, then each new record of any process.

        Raises HistoryCompacted if the log does not go back that far.
        """

    async def history(self, key: Key, limit: int = VERSIONS_KEPT) -> Sequence[DocumentVersion]:
        """Return up to `limit` versions of a document, newest first, with deletions.

        The last `VERSIONS_KEPT` versions are always available, older ones as long as the log goes back to them.
        """

    async def at(self, position: int) -> StateSnapshot:
        """Return the state right after the commit at a position.

        Raises HistoryCompacted if the log does not go back that far, and RefusedError for a future position.
        """

    async def compact(self, older_than: float, largest: int) -> CompactionResult:
        """Prune old commits, but not the last `VERSIONS_KEPT` versions of each document.

        Old commits are those before `older_than` (wall-clock seconds), and as many more as needed to reduce the log to
        `largest` bytes; the newest commits may stay complete. Documents do not change. Safe while other processes read
        and commit; a watcher that has not yet read the pruned commits gets HistoryCompacted.
        """

    async def statistics(self) -> StoreStatistics:
        """Return the store's size, and its expired and large documents."""

    async def verify(self) -> VerificationReport:
        """Reread the whole log, and compare it with the documents that the store returns."""

    async def repair(self) -> VerificationReport:
        """Restore the readable state, and return the resulting report of `verify`.

        The newest readable value of each damaged document becomes its next version, with the same remaining time until
        expiry; a document without a readable value is deleted. This is one commit with an event `state.repaired` for
        each document, which contains its key and the `lost` version. Deleted documents stay deleted, and versions never
        decrease. Without damage, this does nothing.
        """

    def dump(self) -> AbstractAsyncContextManager[Dump]:
        """Dump the whole log for an `async with` block, concurrently with other processes.

        Uses the memory of a few commits, regardless of the log's length. Raises RefusedError if `verify` finds an
        error, or if damage is found while the commits are read, so that a copy is never outdated.
        """

    async def load(self, dump: Dump) -> None:
        """Become an identical copy of a dump, with its positions, times and versions.

        This is atomic: after an error from `dump.commits`, or if the process is killed, the store is empty and can be
        loaded again. Raises RefusedError if the store is not empty, because of an earlier commit or load, or if the
        commits don't match the dump's positions.
        """

    @property
    def damage(self) -> Sequence[Damage]:
        """The damage found since the store was opened."""


class StoreType(Protocol):
    """The type that a plugin registers for the stores of a URL scheme."""

    def __call__(self, url: str, clock: Clock, /) -> AbstractAsyncContextManager[Store]:
        """Open the store at `url` for an `async with` block; `clock` provides its times."""


@dataclass(frozen=True, slots=True)
class Program:
    """A program that an adapter runs, and how to check its installation.

    Commands are given as arguments without the program.
    """

    name: str
    """The program's name on PATH, or an absolute path."""
    install: str = "install it, or correct the adapter"
    """The remedy if the program is missing."""
    version: Sequence[str] = ()
    """The arguments that print the version; empty if there is no such option."""
    supported: str = ""
    """The supported versions, such as `>=2.0,<3` (PEP 440 version specifiers). Other versions cause a warning."""
    ready: Sequence[str] = ()
    """The arguments of a quick command that exits with 0 if the program is ready.

    Ready means logged in, server reachable and so on. Empty if unknown. If the command fails, the last line of its
    output may be shown as the reason.
    """
    keys: Sequence[str] = ()
    """Environment variables with an API key. If one is set, it replaces a login, and `ready` is not run."""
    log_in: str = ""
    """The remedy if the program is not ready."""
    verified: Sequence[str] | None = None
    """The versions that the adapter was run with; empty if it was written from documentation only, None if unknown."""
    edits: bool = True
    """Whether the program can change files; one that only answers is never chosen by default."""


class Capability(StrEnum):
    """A part of a request that an adapter supports; others are never requested."""

    RESUME = "resume"  #: resumes an earlier conversation (`SessionRequest.resume`)
    #: Answers without changing files (`SessionRequest.read_only`). Not for a CLI that disables its shell in this mode:
    # reviewers run tests, and their changes are discarded anyway.
    READ_ONLY = "read_only"
    INSTRUCTIONS = "instructions"  #: takes them separately from the prompt; otherwise they are prepended to it
    MCP = "mcp"  #: uses servers of the Model Context Protocol (`SessionRequest.mcp_servers`)
    COST_LIMIT = "cost_limit"  #: stops at a cost limit (`SessionRequest.max_cost`)
    PRE_EDIT = "pre_edit"  #: runs a command before each edit that may deny the edit (`SessionRequest.pre_edit`)
    #: Runs a command after each tool call, whose output the agent reads (`SessionRequest.post_tool`).
    POST_TOOL = "post_tool"
    #: Runs a command when the agent is about to end, which may make it continue (`SessionRequest.stop_gate`).
    STOP_GATE = "stop_gate"
    ATTACH = "attach"  #: opens an earlier conversation in a terminal (`SessionRequest.interactive`); needs RESUME


@dataclass(frozen=True, slots=True)
class McpServer:
    """A Model Context Protocol server: a command with standard I/O, or a URL.

    `env` lists environment variables to pass to the command; the program also receives them, in order to pass them on.
    """

    name: str
    argv: Sequence[str] = ()
    env: Sequence[str] = ()
    url: str | None = None


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """The ids, prompt and worktree of a session for an adapter to run.

    The prompt is both text and a file with mode 0600. `home` is a private folder for this task's successive sessions
    with this adapter; it exists if the command uses it (`SessionCommand.home`). `resume` is the program's id of the
    conversation to resume, which took place in this worktree and home. The fields from `resume` on are set only for
    adapters with the corresponding `Capability`.
    """

    run: str
    task: str
    attempt: int
    prompt: str
    prompt_file: Path
    worktree: Path
    home: Path
    resume: str | None = None
    interactive: bool = False
    """Whether to open the conversation `resume` for a user, in a terminal, instead of sending the prompt."""
    read_only: bool = False
    instructions: str | None = None
    """Instructions in addition to the prompt, for the program's system prompt."""
    mcp_servers: Sequence[McpServer] = ()
    max_cost: float | None = None
    """US dollars."""
    pre_edit: Sequence[str] = ()
    """A command to run before each file edit.

    It reads a JSON object from standard input with `hook_event_name`, `cwd` and `tool_input`, which contains the file
    path (`file_path`, `path` or similar, or an `apply_patch`). It prints nothing if the edit is allowed; otherwise a
    JSON object with the decision and the reason, in the format of Claude Code's `PreToolUse` hook or, if the event is
    `BeforeTool`, of Gemini CLI. It always exits with 0.
    """
    post_tool: Sequence[str] = ()
    """A command to run after each tool call.

    It reads a JSON object from standard input with `hook_event_name`, `cwd` and, for calls of a subagent, `agent_id`.
    It usually prints nothing; otherwise a JSON object with text for the agent, in the format of Claude Code's
    `PostToolUse` hook. It always exits with 0.
    """
    stop_gate: Sequence[str] = ()
    """A command to run whenever the agent is about to end; it may take an hour.

    It reads a JSON object from standard input. It prints nothing if the agent may end; otherwise a JSON object with
    `decision` (`block`) and a `reason` for the agent, as the hooks `Stop` of Claude Code and `AfterAgent` of Gemini CLI
    do. It always exits with 0, and lets the agent end after a few times.
    """


@dataclass(frozen=True, slots=True)
class SettingsOverlay:
    """The user's JSON settings in `file`, overridden by `overrides`.

    The path is absolute or from `~`; the file may be missing. Objects are merged key by key; for other values,
    `overrides` takes precedence. `added` is merged in the same way, but its lists are appended to existing lists.
    """

    file: str
    overrides: JsonObject
    added: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionHome:
    """The contents of a session's home, which the session may change.

    `files` maps names in the home to text, and `settings` to JSON; both are rewritten for each session. `links` maps
    names in the home to existing files and folders of the user, absolute or from `~`. The session can read these, and
    can write those in `renewed`, such as a login that is refreshed in use. `folders` maps the variables that relocate
    a folder of the user to its default path from `~`: an account in another folder has its links and settings there.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    renewed: Sequence[str] = ()
    settings: Mapping[str, SettingsOverlay] = field(default_factory=dict)
    folders: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionCommand:
    """A program to run in the worktree.

    `stdin` is a file to read from (None means /dev/null). `env` is set as given, `pass_env` lists variables that are
    passed on if set, and `renamed_env` maps further ones to the names of the user's variables with their values; apart
    from a small base set, the program gets no other variables. `readable` lists files and folders (absolute) that
    must be readable even if the sandbox hides their location. `scratch_patterns` (gitignore(5)) match the program's own
    files in the worktree, such as a cache: new files that match are not part of its work. `home` is the contents of its
    home, or None if it has none. With `interrupt`, the program gets SIGINT before it is terminated, to clean up its
    child processes and finish its output. Only the process that `argv` starts is interrupted; a wrapper has to forward
    the signal.
    """

    argv: Sequence[str]
    stdin: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    pass_env: Sequence[str] = ()
    renamed_env: Mapping[str, str] = field(default_factory=dict)
    readable: Sequence[Path] = ()
    scratch_patterns: Sequence[str] = ()
    home: SessionHome | None = None
    interrupt: bool = False


@dataclass(frozen=True, slots=True)
class AgentMessage:
    """Text from the agent, for users to read.

    `part`: the text is streamed and continues the previous part without a separator.
    """

    text: str
    part: bool = False


@dataclass(frozen=True, slots=True)
class AgentPlan:
    """The agent's list of steps, which replaces its earlier ones.

    The text has a step per line: `[x]` if it is done, `[>]` if it is in progress, otherwise `[ ]`, and its words.
    """

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call by the agent.

    `detail` is one line for users, `paths` are files as the agent spelled them. `call` is the program's id of this
    call, which `ToolResult` refers to; None if it has no ids. Later reports of the same call add to it.
    """

    name: str
    detail: str = ""
    paths: Sequence[str] = ()
    call: str | None = None
    diff: str = ""
    """The lines that an edit changes, each after `+`, `-` or a space; a few thousand characters at most."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The end of a tool call.

    `failed` is None on success, otherwise a one-line reason (may be empty). `output` is what the tool returned, a few
    thousand characters at most.
    """

    call: str
    failed: str | None = None
    output: str = ""


@dataclass(frozen=True, slots=True)
class UsageReport:
    """Usage since the last report or, with `is_cumulative`, since the program started.

    Usage is in tokens and US dollars (None if unknown). `cached_tokens` of the input tokens were read from a cache.
    Repeated reports of the same model `call`, with increasing numbers, count once. With `includes_resumed` the numbers
    include the usage of earlier sessions of the same conversation.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None
    is_cumulative: bool = False
    cached_tokens: int = 0
    model: str | None = None
    """The model's name, used to look up its price if the cost is unknown."""
    call: str | None = None
    includes_resumed: bool = False
    is_estimate: bool = False
    """Whether the CLI estimates the numbers instead of reporting those of the model's provider."""
    priced_tokens: int = 0
    """The number of tokens that `cost` covers.

    For a CLI of which only some versions include the cost of the conversation's earlier sessions: their cost is
    included if their tokens are. With 0, the cost covers the same sessions as the tokens (`includes_resumed`).
    """


@dataclass(frozen=True, slots=True)
class ConversationStarted:
    """The CLI's id of the conversation, for resuming it."""

    session: str


@dataclass(frozen=True, slots=True)
class CliWarning:
    """A message from the CLI that matters to the user but is not a failure."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolDenied:
    """The CLI denied its model a tool, or the CLI's own sandbox made the tool fail.

    `detail` is one line for users; `remedy` is how to allow the tool. Several reports of the same `call` are one
    denial.
    """

    tool: str
    detail: str = ""
    remedy: str = ""
    call: str | None = None

    @property
    def text(self) -> str:
        """The tool and its arguments, such as `Bash(git diff)`."""
        return f"{self.tool}({self.detail})" if self.detail else self.tool


@dataclass(frozen=True, slots=True)
class FinalResult:
    """The CLI's final result: its text, and the failure (None if it reports success).

    The last result counts: a program that fails, retries and succeeds reports two.
    """

    text: str = ""
    failed: Failed | None = None


SessionEvent = (
    AgentMessage
    | AgentPlan
    | ToolCall
    | ToolResult
    | UsageReport
    | ConversationStarted
    | CliWarning
    | ToolDenied
    | FinalResult
)


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """The end of a program: exit code or signal, time, and the tail of its output.

    The time is in wall-clock seconds. The texts are at most the last 64 KiB of each stream, with invalid UTF-8
    replaced. `events` are the last thousand events that the adapter's `parse` returned for standard output.
    """

    exit: int | None
    signal: int | None
    time: float
    stdout: str
    stderr: str
    events: Sequence[SessionEvent] = ()


class Adapter(Protocol):
    """Describes how to run a CLI, by the options of an entry under `adapters:`.

    Adapters are stateless: one instance serves many concurrent sessions, and equal arguments return equal results.
    """

    def capabilities(self) -> frozenset[Capability]:
        """Return the supported parts of a request, in addition to the prompt."""

    def programs(self) -> Sequence[Program]:
        """Return the programs that must be installed before a run starts."""

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return the command for a request. Must not start a process.

        Also called once per task while a file is loaded, with paths that don't exist; a RefusedError is then reported
        as a problem at the task's line.
        """

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return the events in a line of standard output, if any. Must not raise errors.

        The line has no line break and at most 1 MiB (longer lines are skipped). It may have any content, such as
        truncated JSON.
        """

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return the failure of a session according to its output, or None.

        Used only if the program exited with an error, or successfully but without changes, with `failed` in its last
        `FinalResult`, or with the verdict `unfinished`, because the output that ends every complete session is missing.
        A verdict can fail a session but never pass it. If the last `FinalResult` failed, the verdict must not be None.

        The failure's class (`orchestrator.domain.settings.failures`) decides the consequence: RATE_LIMITED starts a
        cooldown of the adapter (`until`: wall-clock seconds, if known) and AUTH disables the adapter, both without
        counting the attempt; the `reason` of AUTH must explain how to log in.
        """


Made_co = TypeVar("Made_co", covariant=True)


class PluginType(Protocol[Made_co]):
    """The registered type of a plugin: validates options, and creates objects."""

    @property
    def Options(self) -> type[BaseModel]:  # noqa: N802  a class, in the body of the type or outside
        """The model of the entry's own keys: strict, with unknown keys forbidden."""

    def __call__(self, options: Any, /) -> Made_co:
        """Create the object from a validated instance of `Options`."""


AdapterType = PluginType[Adapter]


@dataclass(frozen=True, slots=True)
class ProfileFormat:
    """A format of YAML files that describe adapters, one per file, named after the file.

    `Model` validates a file, and `make` returns the adapter type of a name and an instance of it. `folder` has the
    profiles of the plugin.
    """

    Model: type[BaseModel]
    make: Callable[[str, Any], AdapterType]
    folder: Path


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """An event in the log, with its commit's position and time (wall-clock seconds)."""

    position: int
    time: float
    event: Event


class Sink(Protocol):
    """Receives the events of a run, to notify another system."""

    async def send(self, events: Sequence[RecordedEvent]) -> None:
        """Deliver the next events, at least one, in order.

        If this raises an error or takes longer than 30 seconds (then it is cancelled), a new sink is opened and
        receives the same events, after increasing pauses. Delivery is at least once; events may be repeated after a
        restart. The run does not wait for the delivery. This is called on the run's event loop, so it must not block.
        """


#: Opens a sink, which stays open from the first event until the run's end.
SinkType = PluginType[AbstractAsyncContextManager[Sink]]


@dataclass(frozen=True, slots=True)
class TrackedTask:
    """A tracker's task: its id, its prompt, and the ids of required tasks.

    The id is stable, and valid in a YAML file. The other fields mean the same as in a file; for None and empty ones,
    the defaults of the file apply.
    """

    id: str
    prompt: str
    needs: Sequence[str] = ()
    priority: int | None = None
    owns: Sequence[str] = ()
    adapter: str | None = None
    workflow: str | None = None
    past_requests: Sequence[str] = ()
    """The ids of the requests that the list has already: they were meant for an earlier run."""


@dataclass(frozen=True, slots=True)
class TrackedState:
    """The state of a tracker's task in a run, for the people who read the list."""

    run: str
    task: JsonObject
    """The fields of the task, as in `council status --json`."""
    label: str
    """Its status as text for people."""
    has_ended: bool
    """Whether no attempt follows unless a user asks for one."""
    is_done: bool
    """Whether it has ended successfully."""
    owner: str | None = None
    """The process that executes it; None: none does."""
    heartbeat: float | None = None
    """The time of the owner's last sign of life (wall-clock seconds)."""
    epoch: int = 0
    """The number of its claims; a later claim has a higher epoch."""
    retries: int = 0
    """Its failed claims before this one."""
    target: str = ""
    """The branch on which it lands."""
    next_command: str | None = None
    """The command that a user runs next for the whole run, such as to merge the target; None: there is none."""

    @property
    def id(self) -> str:
        """The id of the task."""
        return str(self.task["id"])


RequestedAction = Literal["retry", "cancel", "ignore", "approve", "reject"]


@dataclass(frozen=True, slots=True)
class TrackerRequest:
    """An action that a person requests in the list, such as by a comment."""

    id: str
    """The name of the request, unique in the list: each is performed once."""
    task: str
    action: RequestedAction
    note: str | None = None
    """The reason, or the comment on an approval or rejection."""


@dataclass(frozen=True, slots=True)
class SyncResult:
    """What a tracker found in the list while it showed the states of tasks."""

    requests: Sequence[TrackerRequest] = ()
    conflicts: Sequence[str] = ()
    """The tasks whose state it did not show, because another run that is alive claims them in the list."""
    abandoned: Sequence[str] = ()
    """The tasks that another run claimed in the list, and neither ended nor claims any more."""
    problem: RefusedError | None = None
    """Why it could not show all states, although it found the requests; it is called again."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """The current texts of tasks, with which their prompts begin. A text that someone with write access has changed is
    sent to the sessions of its task; leave out all others."""


class Tracker(Protocol):
    """An external task list, which provides tasks, shows their states, and passes on what people request."""

    async def tasks(self) -> Sequence[TrackedTask]:
        """Return the open tasks; raise RefusedError if the list can't be read."""

    async def sync(self, states: Sequence[TrackedState]) -> SyncResult:
        """Show the states of all tasks of this tracker in a run; return what people requested.

        This is called when a run starts, when a task changes, every `sync_interval`, and when the run ends. Unchanged
        states change nothing. If it raises an error or takes longer than 30 seconds (then it is cancelled), a new
        tracker is opened and called again, after increasing pauses. It is called on the run's event loop, so it must
        not block.
        """


TrackerType = PluginType[AbstractAsyncContextManager[Tracker]]


@dataclass(frozen=True, slots=True)
class CiFailure:
    """A check of the forge that failed on the newest commit of a pull request."""

    name: str
    output: str = ""
    """The end of its output, or its summary."""


@dataclass(frozen=True, slots=True)
class ReviewFinding:
    """A comment of a review, by someone with write access."""

    id: str
    """Unique in the repository, and unchanged by edits."""
    author: str
    text: str
    path: str | None = None
    line: int | None = None

    @property
    def place(self) -> str:
        """The author, and the file and the line if it is about one."""
        where = "" if self.path is None else f" on {self.path}" + ("" if self.line is None else f":{self.line}")
        return f"{self.author}{where}"


@dataclass(frozen=True, slots=True)
class PullRequest:
    """A pull request, as the forge shows it."""

    number: int
    url: str
    state: Literal["open", "merged", "closed"]
    head: str
    """The newest commit of its branch."""
    merged_as: str | None = None
    """The commit on the target that merged it: a merge, a squashed or the last rebased commit."""
    ci: Literal["pending", "passed", "failed"] = "pending"
    """The state of all checks of the forge together: `failed` once none is running."""
    failures: Sequence[CiFailure] = ()
    findings: Sequence[ReviewFinding] = ()
    """Requested changes and unresolved comments on lines, oldest first."""
    has_conflict: bool = False
    """Whether it has merge conflicts with its target."""


@dataclass(frozen=True, slots=True)
class NewPullRequest:
    """A pull request to open for a branch that was pushed."""

    branch: str
    target: str
    title: str
    body: str
    draft: bool = False
    labels: Sequence[str] = ()
    reviewers: Sequence[str] = ()


class Forge(Protocol):
    """A server with a repository, whose pull requests are merged by people, or by its own rules.

    Errors are RefusedError with their remedy. The calls of one connection do not overlap; each takes at most 30
    seconds (then it is cancelled).
    """

    async def find(self, branch: str) -> PullRequest | None:
        """Return the newest pull request of a branch of this repository, in any state; None if there is none."""

    async def open(self, wanted: NewPullRequest) -> PullRequest:
        """Open a pull request. The caller has found no open one; it calls `find` again if this raises an error."""

    async def read(self, number: int) -> PullRequest:
        """Return a pull request with the results of checks and reviews; unchanged ones cost little."""

    async def merge_when_ready(self, number: int) -> None:
        """Let the forge merge a pull request as soon as its rules allow it; the call may be repeated."""


#: Opens a connection to a forge.
ForgeType = PluginType[AbstractAsyncContextManager[Forge]]
