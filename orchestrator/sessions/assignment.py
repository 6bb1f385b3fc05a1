"""The work of a session, and the resources that all sessions of a run share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.domain.runs.outcome import SessionLimits
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.settings.run_settings import PathAccess
from orchestrator.protocols import Adapter, Capability, McpServer
from orchestrator.repo.git.command import Git
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox
from orchestrator.sessions.setup.worktree_setup import WorktreeSetup
from orchestrator.sessions.socket.listener import SessionApi
from orchestrator.sessions.terminal import UserTerminal
from orchestrator.system.clock import Clock


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that a CLI can resume: its id, and the folder where it is valid."""

    id: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Assignment:
    """The work of a session; its changes are compared with the commit `base`.

    `start` is the first commit of the worktree if it is not the base; `context` follows the prompt. If possible, the
    session resumes an `earlier_conversation` with only the `follow_up` as its prompt. Unless `writes` is set, its
    changes are discarded. `task_prompt` is the prompt of the task, `phase` the name of the workflow's phase.
    """

    worktree: Worktree
    base: str
    start: str | None
    prompt: str
    context: str | None
    adapter: Adapter
    adapter_name: str
    reach: PathAccess
    limits: SessionLimits
    max_file: int
    instructions: str | None = None
    mcp_servers: tuple[McpServer, ...] = ()
    max_cost: float | None = None
    earlier_conversation: Conversation | None = None
    follow_up: str | None = None
    task_prompt: str = ""
    phase: str | None = None
    writes: bool = True
    terminal: UserTerminal | None = None
    """The terminal of a user who attaches to the earlier conversation; the program gets no prompt."""

    @property
    def text(self) -> str:
        """The whole prompt of the program."""
        if self.earlier_conversation is not None and self.follow_up is not None:
            return self.follow_up
        before = self.instructions if Capability.INSTRUCTIONS not in self.adapter.capabilities() else None
        return "\n\n".join(part for part in (before, self.prompt, self.context) if part is not None)


@dataclass(frozen=True, slots=True)
class SessionResources:
    """Resources shared by all sessions of a run."""

    git: Git
    sandbox: RunSandbox
    redactor: Redactor
    logs: Path
    environ: Mapping[str, str]
    clock: Clock
    worktree_setup: WorktreeSetup
    session_service: SessionApi | None = None
    """Answers session requests; None means that sessions have no session socket."""
    has_server: bool = True
    """Whether sessions get the MCP server of the session API if their CLI supports it."""

    def intake_rules(self, max_file: int, unignored: Iterable[str] = ()) -> IntakeRules:
        """Return the rules for committed files; git does not ignore files in `unignored`."""
        return IntakeRules(self.redactor, max_file, withheld=(*self.worktree_setup.provisions.paths, *unignored))
