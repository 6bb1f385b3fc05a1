"""The contracts of plugins, complete enough to implement one from this file alone.

A plugin registers types under names (`orchestrator.hookspecs`). A YAML file selects a type with `use: NAME` and sets
its options, which a pydantic model of the type validates.

adapter   describes how to run a CLI, as data; it never starts a process.     AdapterType, Adapter
sink      takes the events of a run, to notify another system.                SinkType, Sink
tracker   provides tasks of an external list, and takes the run's events.     TrackerType, Tracker
store     stores all state; its only operation that changes it is `commit`.   StoreType, Store

`orchestrator.testing` has a test suite for each contract, which every implementation must pass.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, Protocol, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo

from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.system.clock import Clock

if TYPE_CHECKING:
    from orchestrator.domain.events.base import TypedEvent

__all__ = [
    "LARGE_DOCUMENT_BYTES",
    "VERSIONS_KEPT",
    "Adapter",
    "AdapterType",
    "AgentMessage",
    "Capability",
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
    "Guard",
    "JsonObject",
    "Key",
    "McpServer",
    "PathOption",
    "PluginType",
    "Program",
    "RecordedEvent",
    "SessionCommand",
    "SessionEnd",
    "SessionEvent",
    "SessionHome",
    "SessionRequest",
    "SettingsOverlay",
    "Sink",
    "SinkType",
    "StateSnapshot",
    "Store",
    "StoreStatistics",
    "StoreType",
    "ToolCall",
    "ToolResult",
    "TrackedTask",
    "Tracker",
    "TrackerType",
    "UsageReport",
    "VerificationReport",
    "Write",
]

JsonObject = dict[str, Any]

#: The number of versions of a document that a store keeps, even if it compacts its log.
VERSIONS_KEPT: Final = 10


#: The size of a document, in bytes, from which a warning is due: each version takes as much space in the log.
LARGE_DOCUMENT_BYTES: Final = 1_000_000


def _absolute(path: Path, info: ValidationInfo) -> Path:
    if not path.name or "\0" in str(path):
        raise ValueError("this path names no file: write one, relative to this file or absolute")
    folder: Path = (info.context or {}).get("folder", Path())
    return (folder / path.expanduser()).absolute()


#: A path in a plugin's options. The plugin gets an absolute path: relative ones start from the YAML file's folder, `~`
#: is the home.
PathOption = Annotated[Path, Field(strict=False), AfterValidator(_absolute)]


class Key(NamedTuple):
    """The name of a document: its kind (`run`, `task`, …) and its id within the kind."""

    kind: str
    id: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.id}"


class Document(NamedTuple):
    """A document as read: `encoded` is its value as JSON in UTF-8; `version` counts from 1.

    `damaged` is true if a later version existed but its bytes on disk are unreadable: `value` is then that of an older
    version, and readers must not treat it as current.
    """

    key: Key
    version: int
    encoded: bytes
    position: int
    """The position of the commit that wrote this version."""
    damaged: bool = False
    time: float = 0.0
    """When it was written: wall-clock seconds of the store's clock."""
    by: str = ""
    """The process that wrote it, as `user@host:pid`."""
    expires: float | None = None
    """When it expires (wall-clock seconds): from then on it counts as missing; None: never."""

    @property
    def value(self) -> JsonObject:
        """The value; each access decodes a new copy, which the reader owns."""
        value: JsonObject = json.loads(self.encoded)
        return value

    def to_json(self) -> JsonObject:
        """Return the document as it appears in JSON output."""
        return {
            "key": str(self.key),
            "version": self.version,
            "position": self.position,
            "time": self.time,
            "by": self.by,
            "expires": self.expires,
            "damaged": self.damaged,
            "value": self.value,
        }


@dataclass(frozen=True, slots=True)
class Write:
    """The change of one document. `expected` is the version that was read (0: none); the value None deletes.

    With `ttl`, the document expires after so many seconds, unless it is written again before.
    """

    key: Key
    expected: int
    value: JsonObject | None
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class Guard:
    """A condition of a commit: the field `epoch` of the lease document at `key` still has this value."""

    key: Key
    epoch: int


@dataclass(frozen=True, slots=True)
class Event:
    """An event, recorded in the same commit as the change that it describes."""

    type: str
    data: JsonObject = field(default_factory=dict)

    @classmethod
    def of(cls, event: TypedEvent) -> Event:
        """Return the record of an event of ours (`orchestrator.domain.events`)."""
        event.check_context()
        return cls(event.type, event.data())


@dataclass(frozen=True, slots=True)
class Commit:
    """One atomic change: all writes and events apply if all versions and guards match, else none does.

    A commit that is not `durable` survives the death of every process, but perhaps not a power failure. It is for
    documents that are soon written again, such as heartbeats.
    """

    writes: Sequence[Write] = ()
    events: Sequence[Event] = ()
    guards: Sequence[Guard] = ()
    durable: bool = True


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """A commit as read from the log: its position (from 1, without gaps), wall-clock time in seconds, and content.

    `unreadable` names the documents whose new values were lost to damage; they are missing in `documents`.
    A deleted document has the value None.
    """

    position: int
    time: float
    documents: Mapping[Key, tuple[int, JsonObject | None]]
    events: Sequence[Event]
    unreadable: Sequence[Key] = ()
    by: str = ""
    """The process that committed, as `user@host:pid`."""


@dataclass(frozen=True, slots=True)
class DocumentVersion:
    """One version in the history of a document.

    `value` is None if this version is the document's deletion, or `damaged`. `events` are those of the commit that
    wrote it, and show the kind of change.
    """

    version: int
    position: int
    time: float
    by: str
    value: JsonObject | None
    events: Sequence[Event] = ()
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class StateSnapshot:
    """All documents as of a commit, without those that had expired by then."""

    position: int
    time: float
    """The time of that commit, in wall-clock seconds; 0 at position 0."""
    documents: Mapping[Key, Document]


@dataclass(frozen=True, slots=True)
class Damage:
    """A damaged part of the log: its location, the affected documents (None: unknown), and the handling."""

    path: Path
    offset: int
    keys: Sequence[Key] | None
    what: str

    def describe(self) -> str:
        """Return a description in one line."""
        affected = ", ".join(map(str, self.keys)) or "nothing lost" if self.keys is not None else "unknown documents"
        return f"{self.path}, byte {self.offset}: {self.what} ({affected})"


@dataclass(frozen=True, slots=True)
class CompactionResult:
    """The outcome of a compaction: the size of the log in bytes before and after it.

    `first` is the position of the oldest state that the log can still reproduce.
    """

    before: int
    after: int
    first: int


@dataclass(frozen=True, slots=True)
class VerificationReport:
    """The outcome of a verification: the verified position, the size in bytes, and all errors."""

    position: int
    bytes: int
    damage: Sequence[Damage] = ()
    damaged: Sequence[Key] = ()
    """Documents whose newest version can't be read."""
    mismatched: Sequence[Key] = ()
    """Documents that the store returns with another value than the log has: a bug, or faulty memory."""
    unreadable: Mapping[Key, str] = field(default_factory=dict)
    """Documents of council's own with the wrong shape for their kind, and the reason; a store leaves this empty."""

    @property
    def is_valid(self) -> bool:
        """Whether no error was found."""
        return not (self.damage or self.damaged or self.mismatched or self.unreadable)


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
    """Documents that have expired and that were not deleted or written since."""
    large: Sequence[tuple[Key, int]] = ()
    """Documents of more than LARGE_DOCUMENT_BYTES with their sizes, the largest first."""


class DumpedDocument(NamedTuple):
    """The new version of a document in a dumped commit."""

    key: Key
    version: int
    encoded: bytes | None
    """The value as JSON in UTF-8, on one line; None: deleted. Loading and dumping preserve the bytes."""
    expires: float | None = None
    """When it expires (wall-clock seconds); None: never."""
    previous: int = 0
    """The position of the version before, which links the document's history; 0: none, or unknown."""


@dataclass(frozen=True, slots=True)
class DumpedCommit:
    """A commit as it is copied between stores; all views of it can be derived from this."""

    position: int
    time: float
    """Wall-clock seconds of the clock of the original store."""
    by: str
    """The process that committed, as `user@host:pid`."""
    documents: Sequence[DumpedDocument] = ()
    events: Sequence[Event] = ()


@dataclass(frozen=True, slots=True)
class Dump:
    """A whole log as of a position: all that another store needs to become an identical copy."""

    position: int
    """The position of the newest commit; 0: there is none."""
    first: int
    """The position of the oldest state that can be reproduced: earlier commits are here only as `compact` left them."""
    commits: AsyncGenerator[DumpedCommit]
    """The commits in the order of their positions; can be iterated once, while the dump is open."""


class Store(Protocol):
    """The storage of all state. Every implementation must pass `orchestrator.testing.store_contract`."""

    def local_paths(self) -> Sequence[Path]:
        """Return the files and folders on this machine that contain the data; empty if it is elsewhere or in memory.

        They are absolute and exist. They are hidden from sessions; and a store without any counts as remote, which may
        be unreachable for a while.
        """

    async def commit(self, commit: Commit) -> int:
        """Apply `commit` atomically and durably, and return its position in the log.

        Raises VersionConflict, LeaseLost or InvalidDocument, or StoreUnavailable if it can't be made durable; nothing
        is changed then. The version numbers of a deleted document continue, so that the expected version of a stale
        reader can't match by accident; its `expected` is 0 again. The same applies to an expired document, and the
        guards of an expired lease fail. If the caller is cancelled, the commit still completes before this returns.
        """

    async def get(self, key: Key) -> Document | None:
        """Return the newest version of a document, of any process, or None."""

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """Return the documents of a kind whose id begins with `prefix`, sorted by id."""

    async def position(self) -> int:
        """Return the position of the newest commit, 0 for an empty store."""

    def watch(self, after: int = 0) -> AsyncGenerator[CommitRecord]:
        """Yield every record after position `after`, then each new one of any process.

        Raises HistoryCompacted if the log does not go back that far.
        """

    async def history(self, key: Key, limit: int = VERSIONS_KEPT) -> Sequence[DocumentVersion]:
        """Return the newest versions of a document, deletions included, the newest first: at most `limit`.

        The last `VERSIONS_KEPT` versions are always available, older ones as long as the log goes back to them.
        """

    async def at(self, position: int) -> StateSnapshot:
        """Return the state right after the commit at a position.

        Raises HistoryCompacted if the log does not go back that far, RefusedError for a position in the future.
        """

    async def compact(self, older_than: float, largest: int) -> CompactionResult:
        """Prune old commits: keep only the last `VERSIONS_KEPT` versions of each document from them.

        Old commits are those from before `older_than` (wall-clock seconds), and as many more as it takes to reduce the
        log to `largest` bytes; the newest may stay complete. Documents do not change. Safe while other processes read
        and commit; a watcher that has not yet read the pruned commits gets HistoryCompacted.
        """

    async def statistics(self) -> StoreStatistics:
        """Return the size of the store, and its expired and large documents."""

    async def verify(self) -> VerificationReport:
        """Read the whole log again, and compare it with the documents that the store returns."""

    async def repair(self) -> VerificationReport:
        """Restore the readable state, and return the report of `verify` after that.

        The newest readable value of each damaged document becomes its next version, with the same remaining time until
        it expires; a document without a readable value is deleted. That is one commit, with an event `state.repaired`
        for each document, which has its key and the version that was `lost`. Deleted documents stay deleted, and
        versions never decrease. Without damage nothing happens.
        """

    def dump(self) -> AbstractAsyncContextManager[Dump]:
        """Dump the whole log as of now, for the body of an `async with`; other processes read and commit meanwhile.

        It needs the memory of a few commits, however long the log is. RefusedError if `verify` finds an error, or if
        damage is found while the commits are read: a copy is never older than it should be.
        """

    async def load(self, dump: Dump) -> None:
        """Become an identical copy of the dumped store, with the same positions, times and versions.

        Atomic: after an error of `dump.commits`, or if the process is killed, the store is empty and can be loaded
        again. RefusedError if the store is not empty, because of an earlier commit or load, or if the commits don't
        match the dump's positions.
        """

    @property
    def damage(self) -> Sequence[Damage]:
        """The damage found since the store was opened."""


class StoreType(Protocol):
    """The type that a plugin registers under a URL scheme: opens stores with that scheme."""

    def __call__(self, url: str, clock: Clock, /) -> AbstractAsyncContextManager[Store]:
        """Open the store at `url` for the body of an `async with`; `clock` is the source of its timestamps."""


@dataclass(frozen=True, slots=True)
class Program:
    """A program that an adapter runs, and how to check its installation. Commands are arguments only."""

    name: str
    """Its name on PATH, or an absolute path."""
    install: str = "install it, or correct the adapter"
    """The remedy if it is missing."""
    version: Sequence[str] = ()
    """Arguments that make it print its version; empty: it has no such option."""
    supported: str = ""
    """The supported versions, as in `>=2.0,<3` (PEP 440, version specifiers); other versions cause a warning."""
    ready: Sequence[str] = ()
    """Arguments of a quick command that exits with 0 if it can be used: logged in, server reachable; empty: unknown.

    If it fails, the last line of its output may be the reason.
    """
    keys: Sequence[str] = ()
    """Environment variables with an API key; if one is set, it replaces a login, and `ready` is not run."""
    log_in: str = ""
    """The remedy if it is not ready."""


class Capability(StrEnum):
    """A part of a request that an adapter supports; requests never use unsupported parts."""

    RESUME = "resume"  #: it continues an earlier conversation (`SessionRequest.resume`)
    #: It answers without changing files (`SessionRequest.read_only`). Not for a CLI whose shell is disabled by that: a
    #: reviewer runs tests, and its changes are discarded anyway.
    READ_ONLY = "read_only"
    INSTRUCTIONS = "instructions"  #: it takes them separately from the prompt; else they are prepended to it
    MCP = "mcp"  #: it uses servers of the Model Context Protocol (`SessionRequest.mcp_servers`)
    COST_LIMIT = "cost_limit"  #: it stops when it reaches a cost limit (`SessionRequest.max_cost`)
    PRE_EDIT = "pre_edit"  #: it runs a command before each edit, which may deny it (`SessionRequest.pre_edit`)


@dataclass(frozen=True, slots=True)
class McpServer:
    """A server of the Model Context Protocol: either a command that uses standard input and output, or a URL.

    `env` names environment variables to pass to the command; the program gets them, too, to pass them on.
    """

    name: str
    argv: Sequence[str] = ()
    env: Sequence[str] = ()
    url: str | None = None


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """The session that an adapter shall run: ids, the prompt both as text and as a 0600 file, and the worktree.

    `home` is a private folder for the sessions of this task with this adapter, one after the other; it exists if the
    command uses it (`SessionCommand.home`). `resume` is the program's own id of the conversation to continue, which it
    had in this worktree and this home. The fields from `resume` on are set only for adapters with the `Capability`.
    """

    run: str
    task: str
    attempt: int
    prompt: str
    prompt_file: Path
    worktree: Path
    home: Path
    resume: str | None = None
    read_only: bool = False
    instructions: str | None = None
    """Instructions in addition to the prompt, for the program's system prompt."""
    mcp_servers: Sequence[McpServer] = ()
    max_cost: float | None = None
    """US dollars."""
    pre_edit: Sequence[str] = ()
    """A command to run before each edit of a file. It reads a JSON object from standard input with `hook_event_name`,
    `cwd` and `tool_input`, which names the file (`file_path`, `path` and the like, or an `apply_patch`). It prints
    nothing if the edit is allowed; else a JSON object with the decision and the reason, in the format of Claude Code's
    hook `PreToolUse`, or, if the event is `BeforeTool`, in that of Gemini CLI. It always exits with 0."""


@dataclass(frozen=True, slots=True)
class SettingsOverlay:
    """The user's JSON settings in the file `of` (absolute or from `~`; may be missing), overridden by `over`.

    Objects in both are merged key by key; of other values that in `over` wins. `added` is merged in the same way, but
    its lists are appended to existing ones.
    """

    of: str
    over: JsonObject
    added: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionHome:
    """The content of a session's home (`SessionRequest.home`), which the session may change.

    `files` maps names in the home to texts, and `settings` to JSON; both are written again for each session. `links`
    maps names in the home to existing files and folders of the user, absolute or from `~`. They can be read, and those
    in `renewed` can be written, such as a login that is refreshed in use.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    renewed: Sequence[str] = ()
    settings: Mapping[str, SettingsOverlay] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionCommand:
    """A program to run in the worktree.

    `stdin` is a file to read from (None: /dev/null). `env` is set as given, `pass_env` names variables that are passed
    on if set; besides a small base set the program gets no other variables. `readable` are files and folders (absolute)
    that it must be able to read even if the sandbox hides their location. `scratch_patterns` (gitignore(5)) match the
    program's own files in the worktree, such as a cache: new files that match are not part of its work. `home` is the
    content of its home (None: it uses none). With `interrupt`, it gets SIGINT before it is terminated, to clean up its
    child processes and finish its output. Only the process that `argv` starts is interrupted; a wrapper has to forward
    the signal.
    """

    argv: Sequence[str]
    stdin: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    pass_env: Sequence[str] = ()
    readable: Sequence[Path] = ()
    scratch_patterns: Sequence[str] = ()
    home: SessionHome | None = None
    interrupt: bool = False


@dataclass(frozen=True, slots=True)
class AgentMessage:
    """Text of the agent, for people to read.

    `part`: the text is streamed, and continues the part before it without a separator.
    """

    text: str
    part: bool = False


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of the agent: `detail` is one line for people, `paths` are the files in the agent's own spelling.

    `call` is the program's own id of this call, which `ToolResult` refers to; None if it has no ids.
    """

    name: str
    detail: str = ""
    paths: Sequence[str] = ()
    call: str | None = None


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The end of a tool call: `failed` is None if it succeeded, else the reason in one line (may be empty)."""

    call: str
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class UsageReport:
    """Usage since the last `UsageReport`, or with `is_cumulative` since the program started.

    Tokens, and US dollars (None: unknown). `cached_tokens` of the input tokens were read from a cache. Repeated reports
    of one model `call`, with growing numbers, count once. With `includes_resumed` the numbers include the usage of
    earlier sessions of the same conversation.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None
    is_cumulative: bool = False
    cached_tokens: int = 0
    model: str | None = None
    """The name of the model, to look up its price if the cost is unknown."""
    call: str | None = None
    includes_resumed: bool = False
    priced_tokens: int = 0
    """The number of tokens that `cost` covers, for a CLI of which only some versions include the cost of earlier
    sessions of the conversation: it is included if their tokens are. 0: the cost covers what `includes_resumed` says.
    """


@dataclass(frozen=True, slots=True)
class ConversationStarted:
    """The CLI's own id of the conversation, to resume it."""

    session: str


@dataclass(frozen=True, slots=True)
class CliWarning:
    """A message of the CLI that matters to the user but is no failure."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolDenied:
    """The CLI denied its model a tool, or its own sandbox made the tool fail.

    `detail` is one line for people; `remedy` is how to allow the tool. Several reports of one `call` are one denial.
    """

    tool: str
    detail: str = ""
    remedy: str = ""
    call: str | None = None

    @property
    def text(self) -> str:
        """The tool and its arguments, as in `Bash(git diff)`."""
        return f"{self.tool}({self.detail})" if self.detail else self.tool


@dataclass(frozen=True, slots=True)
class FinalResult:
    """The CLI's own result: its text, and the failure (None: it reports success).

    The last one counts: a program that fails, tries again and succeeds reports two.
    """

    text: str = ""
    failed: Failed | None = None


SessionEvent = (
    AgentMessage | ToolCall | ToolResult | UsageReport | ConversationStarted | CliWarning | ToolDenied | FinalResult
)


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """The end of a program: its exit code or signal, the time (wall-clock seconds), and the tail of its output.

    The texts are at most the last 64 KiB of each stream; bytes that are not UTF-8 are replaced. `events` are the last
    thousand that the adapter's `parse` returned for standard output.
    """

    exit: int | None
    signal: int | None
    time: float
    stdout: str
    stderr: str
    events: Sequence[SessionEvent] = ()


class Adapter(Protocol):
    """Describes how to run a CLI; made from the options of one entry under `adapters:` in the YAML file.

    It is stateless: one instance serves many concurrent sessions, and equal arguments give equal results.
    """

    def capabilities(self) -> frozenset[Capability]:
        """Return the parts of a request that it supports in addition to the prompt."""

    def programs(self) -> Sequence[Program]:
        """Return the programs that must be installed before a run starts."""

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return the command for a request; never starts a process itself.

        Also called once for each task while a file is loaded, with paths that don't exist: a RefusedError is then
        reported as a problem at the task's line.
        """

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return the events in a line of the program's standard output; empty if it has none.

        The line has no line break and at most 1 MiB (longer lines are skipped). It may have any content, such as
        truncated JSON: never raises.
        """

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return why a session failed according to its output, or None if the output has no reason.

        Used only if the program exited with an error; or successfully but without changes; or successfully, with or
        without changes, but with `failed` in its last `FinalResult` or with a verdict of `unfinished`, because the
        output that every complete session ends with is missing. A verdict can fail a session, never pass it. If the
        last `FinalResult` failed, the verdict is never None.

        The failure's class (`orchestrator.domain.settings.failures`) decides the consequence: RATE_LIMITED starts a
        cooldown of the adapter (`until`: wall-clock seconds, if known) and AUTH disables it, both without counting the
        attempt; the `reason` of AUTH says how to log in.
        """


Made_co = TypeVar("Made_co", covariant=True)


class PluginType(Protocol[Made_co]):
    """The type that a plugin registers under a name: validates options, and makes an object with them."""

    @property
    def Options(self) -> type[BaseModel]:  # noqa: N802  a class, in the body of the type or next to it
        """The model of the entry's own keys; strict, with unknown keys forbidden."""

    def __call__(self, options: Any, /) -> Made_co:
        """Make the object from a validated instance of `Options`."""


AdapterType = PluginType[Adapter]


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """An event of the log, with the position and time (wall-clock seconds) of its commit."""

    position: int
    time: float
    event: Event


class Sink(Protocol):
    """Takes the events of a run, to notify another system."""

    async def send(self, events: Sequence[RecordedEvent]) -> None:
        """Take the next events, at least one, in order.

        If this raises, or takes longer than 30 seconds (it is cancelled then), a new sink is opened and gets the same
        events, after growing pauses. Delivery is at least once; events may be repeated after a restart. The run does
        not wait for it, but it is awaited on the run's own event loop, which it must not block.
        """


#: Opens a sink from the first event until the run's end.
SinkType = PluginType[AbstractAsyncContextManager[Sink]]


@dataclass(frozen=True, slots=True)
class TrackedTask:
    """A task of a tracker: a stable id that is valid in a YAML file, the prompt, and the ids of required tasks."""

    id: str
    prompt: str
    needs: Sequence[str] = ()


class Tracker(Sink, Protocol):
    """An external list of tasks: a run takes its tasks from it, and sends it the events about them."""

    async def tasks(self) -> Sequence[TrackedTask]:
        """Return the open tasks."""


TrackerType = PluginType[AbstractAsyncContextManager[Tracker]]
