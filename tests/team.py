"""Concurrent sessions of one process on one repository: real worktrees, store, locks and session API."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from adapters.claude_code import ClaudeCodeAdapter, ClaudeCodeOptions
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.sessions.contexts import SessionContext
from orchestrator.engine.session_api.contexts import SessionContexts
from orchestrator.engine.session_api.details import SessionWorkspace
from orchestrator.engine.session_api.locks import SessionLocks
from orchestrator.engine.session_api.notes import NoteStore
from orchestrator.engine.session_api.service import SessionService
from orchestrator.errors import RefusedError
from orchestrator.locking.file_locks import FileLocks
from orchestrator.locking.ownership import OwnershipRegistry, claim_key, ownership_scope
from orchestrator.protocols import Commit, Guard, JsonObject, Store, Write
from orchestrator.repo.git.change_counts import Changes, count
from orchestrator.repo.intake.collect import CollectionResult, collect_work
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.checkouts import HeldSlot
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.log_files import log_path
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import Clock, SystemClock
from tests.conftest import Repository
from tests.hub_fixture import HubFixture

#: A secret of the machine under test.
SECRET = "hunter2hunter2"
#: Folders of a run.
RUN = "run1"


@dataclass
class SessionTeam:
    """The sessions of one process; several teams on one store and folder act as several processes."""

    store: Store
    yard: HubFixture
    pool: SlotPool
    base: str
    folder: Path
    """For logs and locks."""
    environ: Mapping[str, str]
    name: str = "o1"
    clock: Clock = field(default_factory=SystemClock)
    lock_timeout: float = 5.0
    claims: dict[SessionName, Guard] = field(default_factory=dict)
    checkouts: dict[SessionName, tuple[Worktree, HeldSlot]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Create the session API."""
        scope, redactor = ownership_scope(str(self.yard.top), "main"), Redactor([SECRET])
        self.registry = OwnershipRegistry(self.store, self.clock, scope)
        self.files = FileLocks(self.folder / "locks", self.clock)
        self.memory = NoteStore(self.store, self.clock, scope, redactor)
        self.contexts = SessionContexts(
            self.store, self.clock, scope, redactor, orchestrator=self.name, claim=self.claims.get
        )
        locks = SessionLocks(self.contexts, self.files, self.registry, self.lock_timeout)
        self.session_service = SessionService(
            *(self.contexts, self.memory, locks, self.yard.git, self._elsewhere), anyio.CapacityLimiter(4)
        )

    async def join(self, task: str, attempt: int = 1, *, owns: Sequence[str] = ()) -> SessionName:
        """Start a session in its own worktree, under a claim, with its task's paths."""
        session = SessionName(RUN, task, attempt)
        worktree = self.yard.worktree(task, attempt)
        checkout = await self.pool.acquire(self.base, worktree.root)
        self.checkouts[session] = await worktrees.create_worktree(worktree, checkout, "prompt"), checkout
        await self.claim(session)
        assert await self.registry.acquire(session, owns, orchestrator=self.name, claim=self.claims[session]) is None
        await self.session_service.enter(session, "fixer", self.workplace(session))
        return session

    async def claim(self, session: SessionName) -> None:
        """Claim a task, unless an earlier session here has the claim."""
        key = claim_key(session)
        held = next((guard for guard in self.claims.values() if guard.key == key), None)
        if held is None:
            found = await self.store.get(key)
            version = found.version if found else 0
            await self.store.commit(Commit([Write(key, version, {"epoch": version + 1, "released": None})]))
            held = Guard(key, version + 1)
        self.claims[session] = held

    def workplace(self, session: SessionName) -> SessionWorkspace:
        """Return the working folder of a session."""
        worktree = self.yard.worktree(session.task, session.attempt)
        adapter = ClaudeCodeAdapter(ClaudeCodeOptions())
        self.folder.joinpath("logs").mkdir(exist_ok=True)
        return SessionWorkspace(
            worktree, self.base, adapter, self.folder / "logs", IntakeRules(Redactor([SECRET]), 100_000)
        )

    async def _elsewhere(self, session: SessionName) -> SessionWorkspace:
        return self.workplace(session)

    def tree(self, session: SessionName) -> Path:
        """Return a session's worktree."""
        return self.checkouts[session][0].tree

    def write(self, session: SessionName, name: str, text: str) -> None:
        """Change a file like the session's program."""
        path = self.tree(session) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def git(self, session: SessionName, *arguments: str) -> None:
        identity = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in
                    (("NAME", "Agent"), ("EMAIL", "agent@example.org"))}  # fmt: skip
        environ = {**self.environ, **identity}
        subprocess.run(["git", *arguments], cwd=self.tree(session), env=environ, check=True, capture_output=True)

    def says(self, session: SessionName, *content: Mapping[str, Any]) -> None:
        """Print an answer in the session like its CLI."""
        line = json.dumps({"type": "assistant", "message": {"content": content}})
        with log_path(self.folder / "logs", session.task, session.attempt, "stdout").open("a") as log:
            log.write(f"{line}\n")

    async def collect(self, session: SessionName) -> CollectionResult:
        """Commit the changes of a session."""
        rules = self.workplace(session).rules
        return await collect_work(self.yard.git, self.checkouts[session][0], self.base, "work", rules=rules)

    async def changes(self, collected: CollectionResult) -> Changes:
        """Return the size of its changes."""
        assert collected.commit is not None
        return await count(self.yard.git, self.base, collected.commit)

    async def end(self, session: SessionName) -> None:
        """End a session and the ownership of its task, and clean its slot."""
        await self.session_service.leave(session)
        if (owned := await self.store.get(self.registry.key(session))) is not None:
            await self.store.commit(Commit([Write(owned.key, owned.version, None)]))
        await self.yard.end(self.pool, *self.checkouts.pop(session))

    async def ask(self, session: SessionName, command: str, **arguments: Any) -> JsonObject:
        """Send a request of a session to the API."""
        return await self.session_service.handle(session, command, arguments)

    async def refused(self, session: SessionName, command: str, **arguments: Any) -> str:
        """Send a request that must be rejected; return the message."""
        try:
            found = await self.ask(session, command, **arguments)
        except RefusedError as error:
            return str(error)
        raise AssertionError(f"not refused: {found}")

    async def context(self, session: SessionName) -> SessionContext:
        """Return the context of a session."""
        return next(one for one in await self.contexts.all() if one.session == session)

    async def owned(self) -> dict[str, tuple[str, ...]]:
        """Return the registered paths of each session."""
        return {f"{one.session.task}.{one.session.attempt}": one.patterns
                for one in await self.registry.holdings() if one.patterns}  # fmt: skip


@asynccontextmanager
async def open_team(repository: Repository, folder: Path) -> AsyncIterator[SessionTeam]:
    """Open a team for a repository with a file store; `folder` has its other files."""
    place = folder / "team"
    place.mkdir()
    yard = await HubFixture.of(repository.top, Path(repository.environ["COUNCIL_HOME"]), repository.environ)
    base = await yard.fetch()
    async with FileStore.open(place / "state", SystemClock()) as store, yard.open() as pool:
        yield SessionTeam(store, yard, pool, base, place, repository.environ)
