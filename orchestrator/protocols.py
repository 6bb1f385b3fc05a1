"""The contracts of what a plugin can add, complete enough to implement from this file alone.

An adapter never starts a process: it answers with data. A store knows one way to change anything: `commit`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel

from orchestrator.domain.outcome import Failed

JsonObject = dict[str, Any]


class Key(NamedTuple):
    """The name of a document: its kind (`run`, `task`, …) and its id within the kind."""

    kind: str
    id: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.id}"


@dataclass(frozen=True, slots=True)
class Document:
    """A document as read: `value` is the reader's own copy; `version` counts from 1.

    `damaged` is true when a later version existed but its bytes on disk are unreadable: `value` is then an
    older one, and whoever reads it must not act on it as if it were current.
    """

    key: Key
    version: int
    value: JsonObject
    position: int
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class Write:
    """One document's change. `expected` is the version that was read (0: there is none); `None` deletes."""

    key: Key
    expected: int
    value: JsonObject | None


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
    """One atomic change: every write and event happens if all versions and guards hold, else none does."""

    writes: Sequence[Write] = ()
    events: Sequence[Event] = ()
    guards: Sequence[Guard] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """A commit as the log holds it: its position (from 1, without gaps), wall time in seconds, and content.

    `unreadable` names the documents whose new values are lost to damage; they are missing in `documents`.
    A deleted document has the value `None`.
    """

    position: int
    time: float
    documents: Mapping[Key, tuple[int, JsonObject | None]]
    events: Sequence[Event]
    unreadable: Sequence[Key] = ()


@dataclass(frozen=True, slots=True)
class Damage:
    """A place in the log that can't be trusted: where, the documents hit (None: unknown), what was done."""

    path: Path
    offset: int
    keys: Sequence[Key] | None
    what: str


class Store(Protocol):
    """Where all state lives. Every implementation passes `orchestrator.testing.store_contract`."""

    async def commit(self, commit: Commit) -> int:
        """Apply `commit` as a whole, durably, and return its position in the log.

        Raises VersionConflict, LeaseLost or InvalidDocument with nothing changed; StoreUnavailable when it
        can't be made durable, with nothing changed. A deleted document's next version goes on counting, so
        that a stale reader's expected version can't fit by accident; its `expected` is 0 again.
        Cancelling the caller does not cut a commit in half: it is awaited to its end.
        """

    async def get(self, key: Key) -> Document | None:
        """Return the newest version of a document, or None; commits of other processes are seen."""

    async def list(self, kind: str, prefix: str = "") -> Sequence[Document]:
        """Return the documents of a kind whose id begins with `prefix`, by id."""

    async def position(self) -> int:
        """Return the position of the newest commit, 0 for an empty store."""

    def follow(self, after: int = 0) -> AsyncGenerator[Record]:
        """Yield every record behind position `after`, then each new one as any process commits it."""

    @property
    def damage(self) -> Sequence[Damage]:
        """What was found unreadable since the store was opened."""


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """What an adapter is asked to run: ids, the prompt both as text and as a 0600 file, and the worktree."""

    run: str
    task: str
    attempt: int
    prompt: str
    prompt_file: Path
    worktree: Path


@dataclass(frozen=True, slots=True)
class Command:
    """A program to run in the worktree.

    `stdin` is a file to read from (None: /dev/null). `env` is set as given, `pass_env` names variables that
    are handed on where they are set; beside a small base set the program sees nothing else.
    """

    argv: Sequence[str]
    stdin: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    pass_env: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """How a program ended: its exit code or signal, when (wall-clock seconds), and the end of what it printed.

    The texts hold at most the last 64 KiB of each stream; bytes that are not UTF-8 are replaced.
    """

    exit: int | None
    signal: int | None
    time: float
    stdout: str
    stderr: str


class Adapter(Protocol):
    """One way to run a CLI, made from the options of one entry under `adapters:` in the YAML file."""

    def command(self, request: SessionRequest) -> Command:
        """Return what to run for this request; never starts anything itself.

        Also called once for each task while a file is loaded, with paths that don't exist: a RefusedError then
        becomes a problem at the task's line.
        """

    def programs(self) -> Sequence[str]:
        """Return the names of programs that must be found on PATH before a run starts."""

    def verdict(self, end: SessionEnd) -> Failed | None:
        """Return what a session's words say about why it failed, or None if they say nothing.

        Asked only where the program ended with an error, or well but with everything as it was: its word counts
        against it, never for it. The failure's class (`orchestrator.domain.failures`) decides what follows:
        RATE_LIMITED parks the adapter (`until`: wall-clock seconds, if known) and AUTH stops it, both without
        counting the attempt; the `reason` of AUTH says how to log in.
        """


class AdapterType(Protocol):
    """What a plugin registers under a name: the options it takes, and how to make an adapter from them."""

    @property
    def Options(self) -> type[BaseModel]:  # noqa: N802  a class, in the adapter's body or beside it
        """The model of the entry's own keys; strict, with unknown keys forbidden."""

    def __call__(self, options: Any, /) -> Adapter:
        """Make an adapter from a validated instance of `Options`."""
