"""One session: a worktree, a CLI in it, and what came of it as facts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.domain.outcome import Exit, Failed, Outcome, judge
from orchestrator.errors import GitError, SessionError
from orchestrator.failpoints import failpoint
from orchestrator.process import kill_marked
from orchestrator.protocols import Adapter, Command, SessionRequest
from orchestrator.repo import worktrees
from orchestrator.repo.collect import Collected, collect
from orchestrator.repo.git import Git
from orchestrator.repo.worktrees import Worktree
from orchestrator.sessions.supervised import SupervisedCommand, run_supervised

#: What every program needs to work at all; whatever else a session sees is named in its adapter's `env`.
BASE_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR")

OUTPUT_CAP = 16 * 2**20  # bytes kept of each stream from its beginning; its end is kept as well
STOP_GRACE = 5.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True, slots=True)
class Finished:
    """How a session ended, and the branch that holds what it left, if it left anything.

    `collected` is false where its files could not be read into a commit: they are all there is, and must stay.
    """

    outcome: Outcome
    branch: str | None = None
    collected: bool = True


@dataclass(slots=True)
class Session:
    """Everything that one session is made from; `timeout` in seconds of wall clock."""

    git: Git
    worktree: Worktree
    base: str
    prompt: str
    adapter: Adapter
    timeout: float
    logs: Path
    environ: Mapping[str, str]
    _running: anyio.CancelScope = field(default_factory=anyio.CancelScope, init=False)

    def stop(self) -> None:
        """End the CLI and all that it started; `run` then collects what it left and says so."""
        self._running.cancel()

    async def run(self) -> Finished:
        """Create the worktree, run the CLI in it, collect what it left. The worktree is the caller's to remove."""
        try:
            await worktrees.create(self.git, self.worktree, self.base, self.prompt)
            exit_ = await self._supervise()
        except (GitError, OSError) as error:
            return Finished(Failed("transient", f"the session could not be set up: {error}"))
        except SessionError as error:
            await anyio.to_thread.run_sync(kill_marked, self.worktree.marker)
            # What no supervisor vouches for may still live and write: what is there can only be kept.
            return Finished(Failed("transient", str(error)), collected=False)
        failpoint("session.ended")
        try:
            left = await collect(self.git, self.worktree, self.base, commit_message(self.worktree, self.prompt))
        except (GitError, OSError) as error:
            reason = f"what it left in {self.worktree.tree} could not be collected: {error}"
            return Finished(Failed("transient", reason), collected=False)
        branch = self.worktree.branch if left.commit else None
        return Finished(judge(exit_, left.commit, left.refused, self.timeout), branch, collected=left.complete)

    async def _supervise(self) -> Exit:
        with self._running:
            ended = await run_supervised(self._supervised(), on_spawned=lambda: failpoint("session.spawned"))
            return Exit(ended.ended_by, ended.exit, ended.signal, ended.spawn_error)
        return Exit("stop", None, None, None)

    def _supervised(self) -> SupervisedCommand:
        place = self.worktree
        request = SessionRequest(
            run=place.run,
            task=place.task,
            attempt=place.attempt,
            prompt=self.prompt,
            prompt_file=place.prompt_file,
            worktree=place.tree,
        )
        command = self.adapter.command(request)
        name = f"{place.task}.{place.attempt}"
        return SupervisedCommand(
            argv=command.argv,
            env=session_environment(command, request, self.environ),
            cwd=place.tree,
            stdin=command.stdin,
            stdout=self.logs / f"{name}.stdout",
            stderr=self.logs / f"{name}.stderr",
            cap=OUTPUT_CAP,
            timeout=self.timeout,
            grace=STOP_GRACE,
            lock=place.lock,
        )


async def salvage(git: Git, worktree: Worktree, base: str, prompt: str) -> Collected:
    """Collect what a cut-off session left.

    The caller has waited until nothing of the session lives, and holds proof that no git command of ours does.
    """
    if not worktrees.unlock(worktree):
        return Collected(None)  # the checkout was never finished: no CLI has run in it
    return await collect(git, worktree, base, commit_message(worktree, prompt))


def commit_message(worktree: Worktree, prompt: str) -> str:
    """Return the message of the commit that holds an attempt's work: the task, and its prompt's first line."""
    first = next((line.strip() for line in prompt.splitlines() if line.strip()), "")
    subject = "".join(char for char in f"{worktree.task}: {first}" if char.isprintable())
    return f"{subject if len(subject) <= 72 else subject[:71] + '…'}\n\nCouncil-Attempt: {worktree.attempt}\n"


def session_environment(command: Command, request: SessionRequest, environ: Mapping[str, str]) -> dict[str, str]:
    """Return all that the CLI sees of the environment."""
    names = (*BASE_ENVIRONMENT, *command.pass_env)
    return {
        "PATH": os.defpath,
        **{name: environ[name] for name in names if name in environ},
        # A CLI whose `.git` is gone must not find a repository further up.
        "GIT_CEILING_DIRECTORIES": str(request.worktree.parent),
        **command.env,
        "COUNCIL_RUN": request.run,
        "COUNCIL_TASK": request.task,
        "COUNCIL_ATTEMPT": str(request.attempt),
        "COUNCIL_PROMPT_FILE": str(request.prompt_file),
    }
