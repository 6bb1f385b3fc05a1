"""Read the progress of a running session from files that it is still writing."""

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
from orchestrator.protocols import Adapter, AgentMessage, AgentPlan, SessionEvent, Store, ToolCall
from orchestrator.repo.git.command import Git
from orchestrator.repo.intake.diffs import count_session_changes, count_session_commits, diff_session
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.worktrees.hub import find_hub
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.entries import OutputEntryBuilder
from orchestrator.sessions.output.follow import OutputFollower
from orchestrator.sessions.output.log_files import log_path, read_tail
from orchestrator.sessions.output.transcript import MAX_EVENTS

#: The maximum length of a returned diff, log and plan, in characters.
MAX_DIFF_LENGTH, MAX_LOG_LENGTH, MAX_PLAN_LENGTH = 64_000, 8_000, 4_000

#: A line in a list of steps: numbered, or with a checkbox or a check mark.
_STEP: Final = re.compile(r"\s*(?:[0-9]{1,2}[.)]|[-*] \[[ xX]\]|[☐☑✓✔•])\s+\S")
_MIN_PLAN_STEPS: Final = 2


@dataclass(frozen=True, slots=True)
class SessionWorkspace:
    """The worktree of a session, and the data for reading its work."""

    worktree: Worktree
    base: str
    """The commit that its work is compared with."""
    adapter: Adapter
    logs: Path
    """The folder with the logs of its run."""
    rules: IntakeRules
    """The rules that decide which of its files may be shown."""


@dataclass(frozen=True, slots=True)
class ChangeStats:
    """The number of commits, and of lines changed since the start of a session."""

    commits: int
    files: int
    added: int
    """Lines."""
    removed: int


@dataclass(frozen=True, slots=True)
class SessionDetails:
    """The progress of a session."""

    task: str
    attempt: int
    plan: str | None
    """Its last message that is a list of steps; None if there is none."""
    diff: str
    """At most `MAX_DIFF_LENGTH` characters, with a note if truncated. Secrets and huge files are omitted."""
    log: str
    """The end of its log as readable text, at most `MAX_LOG_LENGTH` characters."""
    stats: ChangeStats
    handoffs: tuple[str, ...] = ()
    """Its handoffs to later phases; always empty for now."""

    def to_json(self) -> dict[str, Any]:
        """Return the object for `--json`."""
        return {**asdict(self), "handoffs": list(self.handoffs)}


async def find_session_files(
    store: Store, session: SessionName, redactor: Redactor, environ: Mapping[str, str]
) -> tuple[Worktree, IntakeRules]:
    """Return the recorded worktree of an attempt, and the rules for showing its files."""
    run, spec = await read_run(store, session.run), await read_spec(store, session.run, session.task)

    config = run.worktrees
    rules = IntakeRules(redactor, spec.max_file, withheld=config.copied + config.linked)
    return Worktree(find_hub(run, environ), *session), rules


async def find_workspace(
    store: Store,
    adapters: Mapping[str, Adapter],
    logs: Path,
    redactor: Redactor,
    environ: Mapping[str, str],
    session: SessionName,
) -> SessionWorkspace:
    """Return an attempt's workspace on this machine; `logs` has a folder per run.

    Raises RefusedError if there is no such attempt.
    """
    attempts = (await read_task(store, session.run, session.task)).attempts
    attempt = next((attempt for attempt in attempts if attempt.number == session.attempt), None)
    if attempt is None:
        raise RefusedError(f"attempt {session.attempt} of task {session.task!r} not found", "wait until it starts")
    worktree, rules = await find_session_files(store, session, redactor, environ)
    return SessionWorkspace(worktree, attempt.base, adapters[attempt.adapter], logs / session.run, rules)


async def read_session_details(git: Git, workspace: SessionWorkspace, redactor: Redactor) -> SessionDetails:
    """Return the progress of a session; `git` runs in the trusted repository.

    Read-only. Raises RefusedError if the session has no worktree yet, or no longer has one.
    """
    worktree, base, rules = workspace.worktree, workspace.base, workspace.rules
    changes = await count_session_changes(git, worktree, base, rules=rules)
    diff = (await diff_session(git, worktree, base, rules=rules)).decode(errors="replace")
    commits = await count_session_commits(git, worktree, base)
    plan, log = await _read_plan_and_log(workspace)
    return SessionDetails(
        task=worktree.task,
        attempt=worktree.attempt,
        plan=None if plan is None else redactor.text(plan)[:MAX_PLAN_LENGTH],
        diff=_truncate_diff(redactor.text(diff)),
        log=redactor.text(log)[-MAX_LOG_LENGTH:],
        stats=ChangeStats(commits, changes.files, changes.added, changes.removed),
    )


def find_plan(events: Iterable[SessionEvent]) -> str | None:
    """Return the last plan: one that the CLI reports, a list in a message, or a call of a planning tool."""
    plan = None
    for event in events:
        match event:
            case AgentPlan(text) if text.strip():
                plan = text.strip()
            case ToolCall(name, detail) if detail and re.search(r"plan|todo", name, re.IGNORECASE):
                plan = detail
            case AgentMessage(text, part=False) if (
                sum(map(bool, map(_STEP.match, text.splitlines()))) >= _MIN_PLAN_STEPS
            ):
                plan = text.strip()
    return plan


def format_events(events: Iterable[SessionEvent]) -> str:
    """Format a session's events as readable text."""
    entries = OutputEntryBuilder()
    return "".join(f"{one.line}\n" for one in (*entries.add(events), *entries.end()))


async def _read_plan_and_log(workspace: SessionWorkspace) -> tuple[str | None, str]:
    """Return a session's plan and the end of its log, raw if the adapter parses none."""
    worktree = workspace.worktree
    stdout, stderr = (log_path(workspace.logs, worktree.task, worktree.attempt, name) for name in ("stdout", "stderr"))
    follower = OutputFollower(workspace.adapter, stdout)
    events = await anyio.to_thread.run_sync(_read_events, follower, abandon_on_cancel=True)
    log = format_events(events) or await read_tail(stdout, MAX_LOG_LENGTH) or await read_tail(stderr, MAX_LOG_LENGTH)
    return find_plan(events), log


def _read_events(follower: OutputFollower) -> Sequence[SessionEvent]:
    events = deque[SessionEvent](maxlen=MAX_EVENTS)
    while (part := follower.read()) is not None:
        events.extend(part)
    return events


def _truncate_diff(diff: str) -> str:
    if len(diff) <= MAX_DIFF_LENGTH:
        return diff
    head = diff[:MAX_DIFF_LENGTH].rpartition("\n")[0]
    return f"{head}\n# {len(diff) - len(head)} more characters omitted\n"
