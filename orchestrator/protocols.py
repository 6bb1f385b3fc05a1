"""The contracts of what a plugin can add, complete enough to implement from this file alone.

A plugin registers (`orchestrator.hookspecs`) types under names; a YAML file calls for them by `use: NAME` and gives
their options, which a pydantic model of theirs checks.

adapter   one way to run a CLI. It never starts a process: it answers with data.   AdapterType, Adapter
sink      gets to know what happens, to tell somebody else.                        SinkType, Sink
tracker   a list of tasks kept elsewhere: gives them, and is told what became.     TrackerType, Tracker
store     where all state lives; it knows one way to change anything: `commit`.    StoreType, Store

`orchestrator.testing` has a suite of tests for each, which an implementation passes to be one.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, Protocol

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo

from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.runs.outcome import Failed
from orchestrator.system.clock import Clock

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

#: How many versions of a document a store keeps at hand, whatever becomes of its log.
VERSIONS_KEPT: Final = 10


#: Bytes of a document that are worth a warning: each of its versions takes as much in the log.
LARGE_DOCUMENT_BYTES: Final = 1_000_000


def _absolute(path: Path, info: ValidationInfo) -> Path:
    if not path.name or "\0" in str(path):
        raise ValueError("this path names no file: write one, relative to this file or absolute")
    folder: Path = (info.context or {}).get("folder", Path())
    return (folder / path.expanduser()).absolute()


#: A path among a plugin's options: relative ones start from the YAML file's folder, `~` is the home; it gets there
#: absolute.
PathOption = Annotated[Path, Field(strict=False), AfterValidator(_absolute)]


class Key(NamedTuple):
    """The name of a document: its kind (`run`, `task`, …) and its id within the kind."""

    kind: str
    id: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.id}"


class Document(NamedTuple):
    """A document as read: `encoded` is its value as JSON in UTF-8; `version` counts from 1.

    `damaged` is true when a later version existed but its bytes on disk are unreadable: `value` is then an
    older one, and whoever reads it must not act on it as if it were current.
    """

    key: Key
    version: int
    encoded: bytes
    position: int
    """Of the commit that wrote this version."""
    damaged: bool = False
    time: float = 0.0
    """When it was written: wall-clock seconds of the store's clock."""
    by: str = ""
    """The process that wrote it, as `user@host:pid`."""
    expires: float | None = None
    """From when on it is as if it were not there; None: never."""

    @property
    def value(self) -> JsonObject:
        """The value, decoded anew at each look: the reader's own copy."""
        value: JsonObject = json.loads(self.encoded)
        return value

    def to_json(self) -> JsonObject:
        """Return the object that programs get."""
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
    """One document's change. `expected` is the version that was read (0: there is none); `None` deletes.

    With `ttl`, the document is after so many seconds as if it were not there, unless it is written again before.
    """

    key: Key
    expected: int
    value: JsonObject | None
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class Guard:
    """A condition of a commit: the lease document at `key` still carries `epoch` (its field of that name)."""

    key: Key
    epoch: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, recorded with the change that it belongs to."""

    type: str
    data: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Commit:
    """One atomic change: every write and event happens if all versions and guards hold, else none does.

    One that is not `durable` survives the end of every process, but perhaps not the end of the machine's power: for
    what is soon written again, such as heartbeats.
    """

    writes: Sequence[Write] = ()
    events: Sequence[Event] = ()
    guards: Sequence[Guard] = ()
    durable: bool = True


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """A commit as the log holds it: its position (from 1, without gaps), wall time in seconds, and content.

    `unreadable` names the documents whose new values are lost to damage; they are missing in `documents`.
    A deleted document has the value `None`.
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
    """One version of a document as its history has it.

    `value` is None where this version is the document's deletion, and where it is `damaged`. `events` are those of the
    commit that wrote it: what kind of change it was.
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
    """All documents as of a commit; one that had expired by then is not among them."""

    position: int
    time: float
    """Of that commit, in wall-clock seconds; 0 at position 0."""
    documents: Mapping[Key, Document]


@dataclass(frozen=True, slots=True)
class Damage:
    """A place in the log that can't be trusted: where, the documents hit (None: unknown), what was done."""

    path: Path
    offset: int
    keys: Sequence[Key] | None
    what: str

    def describe(self) -> str:
        """Return all that in words."""
        hit = "anything older may be hit" if self.keys is None else ", ".join(map(str, self.keys)) or "nothing lost"
        return f"{self.path}, byte {self.offset}: {self.what} ({hit})"


@dataclass(frozen=True, slots=True)
class CompactionResult:
    """What came of a compaction: how many bytes the log took before and takes after it.

    `first` is the position of the oldest state that can be told after it.
    """

    before: int
    after: int
    first: int


@dataclass(frozen=True, slots=True)
class VerificationReport:
    """What a look at all that a store holds has found: up to which position, how many bytes, and what is wrong."""

    position: int
    bytes: int
    damage: Sequence[Damage] = ()
    damaged: Sequence[Key] = ()
    """Documents of which a newer version was there than can be read."""
    mismatched: Sequence[Key] = ()
    """Documents that are told otherwise than the log says: a fault of this program or of the machine's memory."""
    unreadable: Mapping[Key, str] = field(default_factory=dict)
    """Documents of council's own whose value is none of their kind, and why; a store leaves this empty."""

    @property
    def is_valid(self) -> bool:
        """Whether there is nothing to worry about."""
        return not (self.damage or self.damaged or self.mismatched or self.unreadable)


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """How much a store holds as of `position`; sizes are in bytes."""

    position: int
    first: int
    """The position of the oldest state that can be told."""
    documents: int
    bytes: int
    """Of all documents."""
    log_bytes: int
    """Of the log, as it takes them on disk."""
    expired: Sequence[Key] = ()
    """Documents whose time is over, and that nobody has deleted or written since."""
    large: Sequence[tuple[Key, int]] = ()
    """Documents of more than LARGE_DOCUMENT bytes with their sizes, the largest first."""


class DumpedDocument(NamedTuple):
    """A document's new version in a commit that is copied."""

    key: Key
    version: int
    encoded: bytes | None
    """Its value as JSON in UTF-8, on one line; None: it was deleted. What was loaded is dumped as the same bytes."""
    expires: float | None = None
    """From when on it is as if it were not there; None: never."""
    previous: int = 0
    """The position of the version before, by which its history goes back; 0: there is none, or it is not known."""


@dataclass(frozen=True, slots=True)
class DumpedCommit:
    """A commit as it is copied from store to store: all that is told of it anywhere follows from this."""

    position: int
    time: float
    """Wall-clock seconds of the clock of the store where it was made."""
    by: str
    """The process that committed, as `user@host:pid`."""
    documents: Sequence[DumpedDocument] = ()
    events: Sequence[Event] = ()


@dataclass(frozen=True, slots=True)
class Dump:
    """A whole log as of a position: what another store needs to be the same as this one."""

    position: int
    """Of the newest commit; 0: there is none."""
    first: int
    """Of the oldest state that can be told: of the commits up to there, only what `compact` left of them is here."""
    commits: AsyncGenerator[DumpedCommit]
    """In the order of their positions; they can be gone through once, while the dump is open."""


class Store(Protocol):
    """Where all state lives. Every implementation passes `orchestrator.testing.store_contract`."""

    async def commit(self, commit: Commit) -> int:
        """Apply `commit` as a whole, durably, and return its position in the log.

        Raises VersionConflict, LeaseLost or InvalidDocument with nothing changed; StoreUnavailable when it
        can't be made durable, with nothing changed. A deleted document's next version goes on counting, so
        that a stale reader's expected version can't fit by accident; its `expected` is 0 again. The same holds for one
        that has expired, and a lease that has expired guards nothing.
        Cancelling the caller does not cut a commit in half: it is awaited to its end.
        """

    async def get(self, key: Key) -> Document | None:
        """Return the newest version of a document, or None; commits of other processes are seen."""

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """Return the documents of a kind whose id begins with `prefix`, by id."""

    async def position(self) -> int:
        """Return the position of the newest commit, 0 for an empty store."""

    def watch(self, after: int = 0) -> AsyncGenerator[CommitRecord]:
        """Yield every record behind position `after`, then each new one as any process commits it.

        Raises HistoryGone where the log does not go back so far.
        """

    async def history(self, key: Key, limit: int = VERSIONS_KEPT) -> Sequence[DocumentVersion]:
        """Return the newest versions of a document, that of its deletion too, the newest first: at most `limit`.

        The last `VERSIONS_KEPT` versions are always there, older ones as long as the log goes back to them.
        """

    async def at(self, position: int) -> StateSnapshot:
        """Return the state right after the commit at a position.

        Raises HistoryGone where the log does not go back so far, RefusedError for a position that is yet to come.
        """

    async def compact(self, older_than: float, largest: int) -> CompactionResult:
        """Let go of the past: of old commits only the last `VERSIONS_KEPT` versions of each document are left.

        That is of those from before `older_than` (wall-clock seconds), and of as many more as it takes to have no more
        than `largest` bytes of log; the newest may stay whole. The documents are what they were. Safe beside others
        that read and commit; who watches and has yet to see what is gone gets HistoryGone.
        """

    async def statistics(self) -> StoreStatistics:
        """Return how much the store holds, what of it has expired, and what is large."""

    async def verify(self) -> VerificationReport:
        """Read all that the store holds anew, and compare it with what it tells."""

    async def repair(self) -> VerificationReport:
        """Settle for what can be read, and return what `verify` finds then.

        Each damaged document's newest value that is known becomes its next version, for as long as it had; one of
        which none is known is deleted. That is one commit, with an event `state.repaired` for each that names it and
        the version that was `lost`. What was deleted stays so, and its versions never go back. Without damage nothing
        happens.
        """

    def dump(self) -> AbstractAsyncContextManager[Dump]:
        """Take the whole log as it is now, for the body of an `async with`; others read and commit meanwhile.

        It takes the memory of a few commits, however long the log is. RefusedError where `verify` finds anything, or
        damage comes up on the way: what is copied is never older than it should be.
        """

    async def load(self, dump: Dump) -> None:
        """Become what was dumped: positions, times, versions and all.

        All or nothing: whatever happens on the way, be it an error that `dump.commits` raises or the end of the
        process, the store is empty then, and can be loaded again. RefusedError where it is not empty, because somebody
        has committed or loaded, and where the commits are not those that the dump promises.
        """

    @property
    def damage(self) -> Sequence[Damage]:
        """What was found unreadable since the store was opened."""


class StoreType(Protocol):
    """What a plugin registers under the scheme of a URL: how to open a store there."""

    def __call__(self, url: str, clock: Clock, /) -> AbstractAsyncContextManager[Store]:
        """Open the store at `url` for the body of an `async with`; `clock` tells the time of its records."""


@dataclass(frozen=True, slots=True)
class Program:
    """A program that an adapter runs, and how to find out what there is of it. All commands are arguments only."""

    name: str
    """What is looked for on PATH, or an absolute path."""
    install: str = "install it, or correct the adapter"
    """What to do where it is missing."""
    version: Sequence[str] = ()
    """Arguments that have it print its version; none: it can't be asked."""
    known: str = ""
    """The versions that the adapter is made for, as in `>=2.0,<3` (PEP 440, version specifiers); of others it warns."""
    ready: Sequence[str] = ()
    """Arguments of a quick command that ends with 0 if it can be used: logged in, its server there; none: unknown.

    Where it does not, the last line that it prints may say why.
    """
    keys: Sequence[str] = ()
    """Names of variables with a key; one that is set stands for a login, and `ready` is not asked."""
    log_in: str = ""
    """What to do where it is not ready."""


class Capability(StrEnum):
    """What of a request an adapter can pass on to its program; it is asked for nothing else."""

    RESUME = "resume"  #: it goes on with an earlier conversation (`SessionRequest.resume`)
    #: It answers in words instead of changing files (`SessionRequest.read_only`). Not for a CLI that loses its shell by
    #: that: a reviewer runs tests, and its changes are discarded.
    READ_ONLY = "read_only"
    INSTRUCTIONS = "instructions"  #: it takes them apart from the prompt; else they are put before it
    MCP = "mcp"  #: it uses servers of the Model Context Protocol (`SessionRequest.mcp_servers`)
    COST_LIMIT = "cost_limit"  #: it ends by itself when it has cost so much (`SessionRequest.max_cost`)
    PRE_EDIT = "pre_edit"  #: it runs a command before it edits a file, which may deny that (`SessionRequest.pre_edit`)


@dataclass(frozen=True, slots=True)
class McpServer:
    """A server of the Model Context Protocol: either a command that speaks on standard input and output, or a URL.

    `env` names variables that are handed on to the command, and that the program is given for that.
    """

    name: str
    argv: Sequence[str] = ()
    env: Sequence[str] = ()
    url: str | None = None


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """What an adapter is asked to run: ids, the prompt both as text and as a 0600 file, and the worktree.

    `home` is a folder that the task's sessions with this adapter have to themselves, one after the other; it is there
    where the command says so (`SessionCommand.home`). `resume` is the program's own id of the conversation to go on with: one
    that it had in this worktree and this home. What follows is asked for only of adapters that can (`Capability`).
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
    """What it is told apart from the prompt, as a part of what it is told first."""
    mcp_servers: Sequence[McpServer] = ()
    max_cost: float | None = None
    """US dollars."""
    pre_edit: Sequence[str] = ()
    """A command to run before each edit of a file: it reads a JSON object from standard input with `hook_event_name`,
    `cwd` and `tool_input`, which names the file (`file_path`, `path` and the like, or an `apply_patch`). It prints
    nothing where that may be done; else a JSON object with the decision and the reason, in the form of Claude Code's
    hook `PreToolUse`, or, where the event is `BeforeTool`, in that of Gemini CLI. It always ends with 0."""


@dataclass(frozen=True, slots=True)
class SettingsOverlay:
    """A JSON object of the user's, in the file `of` (absolute or from `~`, which may be missing), with `over` over it.

    Objects in both are merged, key by key; of all else what is in `over` counts. So is `added` then, but its lists go
    after those that are there.
    """

    of: str
    over: JsonObject
    added: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionHome:
    """What a session finds in the home of the request, and may change there.

    `files` are texts by their names in the home, and `settings` JSON; both are written anew for each session. `links`
    lead from names in the home to the user's own files and folders, absolute or from `~`, as far as those exist; they
    can be read, and those that `renewed` names can be written, such as a login that is renewed in use.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    renewed: Sequence[str] = ()
    settings: Mapping[str, SettingsOverlay] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionCommand:
    """A program to run in the worktree.

    `stdin` is a file to read from (None: /dev/null). `env` is set as given, `pass_env` names variables that
    are handed on where they are set; beside a small base set the program sees nothing else. `readable` are files
    and folders (absolute) that it must be able to read even if they lie in what the fence hides. `leavings` are
    patterns (gitignore(5)) of what the program leaves in the worktree for its own use, such as a cache: new files
    that match are no part of its work. `home` is what it finds in the home of the request (None: it uses none).
    `interrupt` is whether it is to be interrupted (SIGINT) before it is
    terminated, because it then tidies up: its child processes, its last words. Only the process that `argv` starts is
    interrupted; where that is a wrapper, it has to pass the signal on.
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
    """The agent's words, as a person would read them.

    `part`: they come as they are made, and go on with the part before without anything in between.
    """

    text: str
    part: bool = False


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The agent used a tool: `detail` is one line for people, `paths` are the files it named, as it named them.

    `call` is the program's own id of this call, by which `ToolResult` names it; None where the program gives none.
    """

    name: str
    detail: str = ""
    paths: Sequence[str] = ()
    call: str | None = None


@dataclass(frozen=True, slots=True)
class ToolResult:
    """A tool call ended: `failed` is None if it succeeded, else one line that says why (it may be empty)."""

    call: str
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class UsageReport:
    """What was used up since the last `UsageReport`, or with `in_all` since the program started.

    Tokens, and US dollars (None: not known). Of the input's tokens `cached_tokens` were read from a cache. What is told
    of one `call` of the model again and again, more each time, counts once. With `of_conversation` what earlier
    sessions of the same conversation used up is among it.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None
    is_cumulative: bool = False
    cached_tokens: int = 0
    model: str | None = None
    """By its name, for its price where the cost is not known."""
    call: str | None = None
    includes_resumed: bool = False
    priced_tokens: int = 0
    """How many tokens `cost` covers, for a CLI whose versions differ in whether it includes that of earlier sessions of
    the conversation: it does where it covers their tokens, too. 0: the cost covers what `of_conversation` says.
    """


@dataclass(frozen=True, slots=True)
class ConversationStarted:
    """The CLI's own id of the conversation, by which it can go on with it."""

    session: str


@dataclass(frozen=True, slots=True)
class CliWarning:
    """Something that a person may want to know, and that is no failure."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolDenied:
    """The CLI denied its model a tool, or its own sandbox made that fail.

    `detail` is one line for people, and `remedy` what allows the tool. Several reports of one `call` are one denial.
    """

    tool: str
    detail: str = ""
    remedy: str = ""
    call: str | None = None

    @property
    def text(self) -> str:
        """The tool and what it was to do, as in `Bash(git diff)`."""
        return f"{self.tool}({self.detail})" if self.detail else self.tool


@dataclass(frozen=True, slots=True)
class FinalResult:
    """The CLI's own word about its end: the result's text, and what failed (None: nothing, it says).

    The last one counts: a program that fails, tries again and succeeds concludes twice.
    """

    text: str = ""
    failed: Failed | None = None


SessionEvent = (
    AgentMessage | ToolCall | ToolResult | UsageReport | ConversationStarted | CliWarning | ToolDenied | FinalResult
)


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """How a program ended: its exit code or signal, when (wall-clock seconds), and the end of what it printed.

    The texts hold at most the last 64 KiB of each stream; bytes that are not UTF-8 are replaced. `events` are the
    last thousand that the adapter's `parse` returned for what it printed to standard output.
    """

    exit: int | None
    signal: int | None
    time: float
    stdout: str
    stderr: str
    events: Sequence[SessionEvent] = ()


class Adapter(Protocol):
    """One way to run a CLI, made from the options of one entry under `adapters:` in the YAML file.

    It keeps no state: one instance serves many sessions at once, and the same question has the same answer.
    """

    def capabilities(self) -> frozenset[Capability]:
        """Return what it can be asked for beside the prompt."""

    def programs(self) -> Sequence[Program]:
        """Return the programs that must be there before a run starts."""

    def command(self, request: SessionRequest) -> SessionCommand:
        """Return what to run for this request; never starts anything itself.

        Also called once for each task while a file is loaded, with paths that don't exist: a RefusedError then
        becomes a problem at the task's line.
        """

    def parse(self, line: str) -> Sequence[SessionEvent]:
        """Return what a line that the program printed to standard output means; nothing where it means nothing.

        The line has no line break and at most 1 MiB (longer ones are left out). Anything may stand in it, also half
        of what it should be: never raises.
        """

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return what a session's words say about why it failed, or None if they say nothing.

        Heard only where the program ended with an error, or well but with everything as it was, or, whatever it has
        changed by then, well but with `failed` in its last `FinalResult` or with a verdict of `unfinished`: without what
        it prints whenever it comes to its end. Its word counts against it, never for it.
        Where the last `FinalResult` failed, the verdict is never None. The failure's class
        (`orchestrator.domain.runs.failures`) decides what follows: RATE_LIMITED parks the adapter (`until`: wall-clock
        seconds, if known) and AUTH stops it, both without counting the attempt; the `reason` of AUTH says how to
        log in.
        """


class AdapterType(Protocol):
    """What a plugin registers under a name: the options it takes, and how to make an adapter from them."""

    @property
    def Options(self) -> type[BaseModel]:
        """The model of the entry's own keys; strict, with unknown keys forbidden."""

    def __call__(self, options: Any, /) -> Adapter:
        """Make an adapter from a validated instance of `Options`."""


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """An event as the log has it: the position of its commit, and when that was (wall-clock seconds)."""

    position: int
    time: float
    event: Event


class Sink(Protocol):
    """Gets to know what happens in a run, to tell somebody else."""

    async def send(self, events: Sequence[RecordedEvent]) -> None:
        """Take the next events, at least one, in order.

        What raises, or takes longer than thirty seconds, is cancelled and tried again with a sink that is opened anew,
        later and later: each event comes at least once, perhaps again after a restart. The run does not wait for it;
        but it is awaited on the run's own event loop, which nothing here may block.
        """


class SinkType(Protocol):
    """What a plugin registers under a name: the options it takes, and how to open a sink with them."""

    @property
    def Options(self) -> type[BaseModel]:
        """The model of the entry's own keys; strict, with unknown keys forbidden."""

    def __call__(self, options: Any, /) -> AbstractAsyncContextManager[Sink]:
        """Open a sink from a validated instance of `Options`, once there is something to send, until the run's end."""


@dataclass(frozen=True, slots=True)
class TrackedTask:
    """A task of a tracker: an id that is valid in a YAML file and stays the same, what to do, what it needs."""

    id: str
    prompt: str
    needs: Sequence[str] = ()


class Tracker(Sink, Protocol):
    """A list of tasks that is kept elsewhere: a run takes them from there, and its events tell what became of them."""

    async def tasks(self) -> Sequence[TrackedTask]:
        """Return the tasks that are open."""


class TrackerType(Protocol):
    """What a plugin registers under a name: the options it takes, and how to open a tracker with them."""

    @property
    def Options(self) -> type[BaseModel]:
        """The model of the entry's own keys; strict, with unknown keys forbidden."""

    def __call__(self, options: Any, /) -> AbstractAsyncContextManager[Tracker]:
        """Open a tracker from a validated instance of `Options`."""
