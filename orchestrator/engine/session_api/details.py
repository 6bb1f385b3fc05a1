"""What a session has done so far, for whoever asks while it is at work: read from files that it goes on writing."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.security.secrets import Redactor
from orchestrator.engine.state.records import read_run, read_spec, read_task
from orchestrator.errors import RefusedError
from orchestrator.protocols import Adapter, AgentMessage, SessionEvent, Store, ToolCall
from orchestrator.repo.git.command import Git
from orchestrator.repo.intake.diffs import count_session_changes, count_session_commits, diff_session
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.entries import OutputEntryBuilder
from orchestrator.sessions.output.follow import OutputFollower
from orchestrator.sessions.output.log_files import log_path, read_tail
from orchestrator.sessions.output.transcript import MAX_EVENTS

#: Characters of a difference, of what a log said last, and of a plan that are told.
MAX_DIFF_LENGTH, MAX_LOG_LENGTH, MAX_PLAN_LENGTH = 64_000, 8_000, 4_000

#: A line of a list of steps: numbered, or with a box or a mark for what is done.
_STEP: Final = re.compile(r"\s*(?:[0-9]{1,2}[.)]|[-*] \[[ xX]\]|[☐☑✓✔•])\s+\S")
_MIN_PLAN_STEPS: Final = 2


@dataclass(frozen=True, slots=True)
class SessionWorkspace:
    """Where a session is at work, and what is needed to read it."""

    worktree: Worktree
    base: str
    """The commit that its work differs from."""
    adapter: Adapter
    logs: Path
    """The folder of its run's output."""
    admit: IntakeRules
    """What of its files may be shown."""


@dataclass(frozen=True, slots=True)
class ChangeStats:
    """How much a session has done so far: its own commits, and what its files differ from where it began."""

    commits: int
    files: int
    added: int
    """Lines."""
    removed: int


@dataclass(frozen=True, slots=True)
class SessionDetails:
    """What a session has done so far."""

    task: str
    attempt: int
    plan: str | None
    """What it said last that is a list of steps; None where it said no such thing."""
    diff: str
    """Cut to `MAX_DIFF_LENGTH` characters, which its last line then says. Secrets and huge files are left out."""
    log: str
    """What it said and did last, as a person would read it; at most `MAX_LOG_LENGTH` characters."""
    stats: ChangeStats
    handoffs: tuple[str, ...] = ()
    """What it has given to later phases; there are none yet."""

    def to_json(self) -> dict[str, Any]:
        """Return the object that programs get."""
        return {**asdict(self), "handoffs": list(self.handoffs)}


async def find_session_files(store: Store, session: SessionName, redactor: Redactor) -> tuple[Worktree, IntakeRules]:
    """Return where an attempt works, by the record of its run, and what of it may be shown."""
    run, spec = await read_run(store, session.run), await read_spec(store, session.run, session.task)
    from orchestrator.config.model import WorktreesConfig

    given = WorktreesConfig.model_validate(run.worktrees)
    admit = IntakeRules(redactor, spec.max_file, withheld=given.copied + given.linked)
    return Worktree(Hub(Path(run.hub)), *session), admit


async def find_workspace(
    store: Store, adapters: Mapping[str, Adapter], logs: Path, redactor: Redactor, session: SessionName
) -> SessionWorkspace:
    """Return where an attempt works, whichever process of this machine runs it; `logs` has a folder for each run.

    RefusedError where there is no such attempt.
    """
    attempts = (await read_task(store, session.run, session.task)).attempts
    found = next((one for one in attempts if one.number == session.attempt), None)
    if found is None:
        raise RefusedError(f"there is no attempt {session.attempt} at task {session.task!r}", "wait until it starts")
    worktree, admit = await find_session_files(store, session, redactor)
    return SessionWorkspace(worktree, found.base, adapters[found.adapter], logs / session.run, admit)


async def read_session_details(git: Git, at: SessionWorkspace, redactor: Redactor) -> SessionDetails:
    """Return what a session has done so far; `git` runs in the trusted repository.

    Nothing of the session is touched. RefusedError where it has no worktree yet, or none any more.
    """
    worktree = at.worktree
    changes = await count_session_changes(git, worktree, at.base, admit=at.admit)
    diff = (await diff_session(git, worktree, at.base, admit=at.admit)).decode(errors="replace")
    commits = await count_session_commits(git, worktree, at.base)
    plan, log = await _read_plan_and_log(at)
    return SessionDetails(
        task=worktree.task,
        attempt=worktree.attempt,
        plan=None if plan is None else redactor.text(plan)[:MAX_PLAN_LENGTH],
        diff=_truncate_diff(redactor.text(diff)),
        log=redactor.text(log)[-MAX_LOG_LENGTH:],
        stats=ChangeStats(commits, changes.files, changes.added, changes.removed),
    )


def find_plan(events: Iterable[SessionEvent]) -> str | None:
    """Return what was said last that is a list of steps, or was told to a tool for plans."""
    plan = None
    for event in events:
        match event:
            case ToolCall(name, detail) if detail and re.search(r"plan|todo", name, re.IGNORECASE):
                plan = detail
            case AgentMessage(text, part=False) if (
                sum(map(bool, map(_STEP.match, text.splitlines()))) >= _MIN_PLAN_STEPS
            ):
                plan = text.strip()
    return plan


def format_events(events: Iterable[SessionEvent]) -> str:
    """Return what a session said and did, as a person would read it."""
    entries = OutputEntryBuilder()
    return "".join(f"{one.line}\n" for one in (*entries.add(events), *entries.end()))


async def _read_plan_and_log(at: SessionWorkspace) -> tuple[str | None, str]:
    """Return a session's plan and its last words; those of a program whose lines mean nothing are what it printed."""
    worktree = at.worktree
    file, errors = (log_path(at.logs, worktree.task, worktree.attempt, name) for name in ("stdout", "stderr"))
    events = await anyio.to_thread.run_sync(_events, OutputFollower(at.adapter, file), abandon_on_cancel=True)
    return find_plan(events), format_events(events) or await read_tail(file, MAX_LOG_LENGTH) or await read_tail(
        errors, MAX_LOG_LENGTH
    )


def _events(follower: OutputFollower) -> Sequence[SessionEvent]:
    found = deque[SessionEvent](maxlen=MAX_EVENTS)
    while (part := follower.read()) is not None:
        found.extend(part)
    return found


def _truncate_diff(diff: str) -> str:
    if len(diff) <= MAX_DIFF_LENGTH:
        return diff
    kept = diff[:MAX_DIFF_LENGTH].rpartition("\n")[0]
    return f"{kept}\n# {len(diff) - len(kept)} more characters are left out\n"
