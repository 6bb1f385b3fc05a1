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
from orchestrator.protocols import Adapter, Said, SessionEvent, Store, UsedTool
from orchestrator.repo.git.runner import Git
from orchestrator.repo.intake.diffs import count_commits, count_live, live_diff
from orchestrator.repo.intake.inspection import Admission
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.entries import Entries
from orchestrator.sessions.output.files import log_file, read_tail
from orchestrator.sessions.output.follow import Follower
from orchestrator.sessions.output.transcript import MOST_EVENTS

#: Characters of a difference, of what a log said last, and of a plan that are told.
LONGEST_DIFF, LONGEST_LOG, LONGEST_PLAN = 64_000, 8_000, 4_000

#: A line of a list of steps: numbered, or with a box or a mark for what is done.
_STEP: Final = re.compile(r"\s*(?:[0-9]{1,2}[.)]|[-*] \[[ xX]\]|[☐☑✓✔•])\s+\S")
_FEWEST_STEPS: Final = 2


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where a session is at work, and what is needed to read it."""

    worktree: Worktree
    base: str
    """The commit that its work differs from."""
    adapter: Adapter
    logs: Path
    """The folder of its run's output."""
    admit: Admission
    """What of its files may be shown."""


@dataclass(frozen=True, slots=True)
class Stats:
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
    """Cut to `LONGEST_DIFF` characters, which its last line then says. Secrets and huge files are left out."""
    log: str
    """What it said and did last, as a person would read it; at most `LONGEST_LOG` characters."""
    stats: Stats
    handoffs: tuple[str, ...] = ()
    """What it has given to later phases; there are none yet."""

    def to_json(self) -> dict[str, Any]:
        """Return the object that programs get."""
        return {**asdict(self), "handoffs": list(self.handoffs)}


async def session_files(store: Store, session: SessionName, redactor: Redactor) -> tuple[Worktree, Admission]:
    """Return where an attempt works, by the record of its run, and what of it may be shown."""
    run, spec = await read_run(store, session.run), await read_spec(store, session.run, session.task)
    from orchestrator.config.model import WorktreesConfig  # noqa: PLC0415  only live work needs it

    given = WorktreesConfig.model_validate(run.worktrees)
    admit = Admission(redactor, spec.max_file, withheld=given.copied + given.linked)
    return Worktree(Hub(Path(run.hub)), *session), admit


async def find_workplace(
    store: Store, adapters: Mapping[str, Adapter], logs: Path, redactor: Redactor, session: SessionName
) -> Workplace:
    """Return where an attempt works, whichever process of this machine runs it; `logs` has a folder for each run.

    RefusedError where there is no such attempt.
    """
    attempts = (await read_task(store, session.run, session.task)).attempts
    found = next((one for one in attempts if one.number == session.attempt), None)
    if found is None:
        raise RefusedError(f"there is no attempt {session.attempt} at task {session.task!r}", "wait until it starts")
    worktree, admit = await session_files(store, session, redactor)
    return Workplace(worktree, found.base, adapters[found.adapter], logs / session.run, admit)


async def details(git: Git, at: Workplace, redactor: Redactor) -> SessionDetails:
    """Return what a session has done so far; `git` runs in the trusted repository.

    Nothing of the session is touched. RefusedError where it has no worktree yet, or none any more.
    """
    worktree = at.worktree
    changes = await count_live(git, worktree, at.base, admit=at.admit)
    diff = (await live_diff(git, worktree, at.base, admit=at.admit)).decode(errors="replace")
    commits = await count_commits(git, worktree, at.base)
    plan, log = await _said(at)
    return SessionDetails(
        task=worktree.task,
        attempt=worktree.attempt,
        plan=None if plan is None else redactor.text(plan)[:LONGEST_PLAN],
        diff=_cut(redactor.text(diff)),
        log=redactor.text(log)[-LONGEST_LOG:],
        stats=Stats(commits, changes.files, changes.added, changes.removed),
    )


def plan_in(events: Iterable[SessionEvent]) -> str | None:
    """Return what was said last that is a list of steps, or was told to a tool for plans."""
    plan = None
    for event in events:
        match event:
            case UsedTool(name, detail) if detail and re.search(r"plan|todo", name, re.IGNORECASE):
                plan = detail
            case Said(text, part=False) if sum(map(bool, map(_STEP.match, text.splitlines()))) >= _FEWEST_STEPS:
                plan = text.strip()
    return plan


def readable(events: Iterable[SessionEvent]) -> str:
    """Return what a session said and did, as a person would read it."""
    entries = Entries()
    return "".join(f"{one.line}\n" for one in (*entries.take(events), *entries.end()))


async def _said(at: Workplace) -> tuple[str | None, str]:
    """Return a session's plan and its last words; those of a program whose lines mean nothing are what it printed."""
    worktree = at.worktree
    file, errors = (log_file(at.logs, worktree.task, worktree.attempt, name) for name in ("stdout", "stderr"))
    events = await anyio.to_thread.run_sync(_events, Follower(at.adapter, file), abandon_on_cancel=True)
    return plan_in(events), readable(events) or await read_tail(file, LONGEST_LOG) or await read_tail(
        errors, LONGEST_LOG
    )


def _events(follower: Follower) -> Sequence[SessionEvent]:
    found = deque[SessionEvent](maxlen=MOST_EVENTS)
    while (part := follower.read()) is not None:
        found.extend(part)
    return found


def _cut(diff: str) -> str:
    if len(diff) <= LONGEST_DIFF:
        return diff
    kept = diff[:LONGEST_DIFF].rpartition("\n")[0]
    return f"{kept}\n# {len(diff) - len(kept)} more characters are left out\n"
