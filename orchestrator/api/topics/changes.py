"""The topic `changes`: changes of tasks, and unmerged work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.api.topic import Topic
from orchestrator.api.topics.logs import find_attempt, no_attempt_error, read_named_task
from orchestrator.domain.events.tasks import salvage_worktree_name
from orchestrator.domain.runs.model import Attempt, RunDocument, TaskDocument
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.runs.statuses import FINAL_STATUSES, TaskStatus
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.engine.session_api.details import find_session_files
from orchestrator.engine.state.records import read_run, read_spec, read_task
from orchestrator.errors import RefusedError
from orchestrator.repo.git.change_counts import Changes, count
from orchestrator.repo.git.command import Git
from orchestrator.repo.git.reading import CommitSummary, read_commits
from orchestrator.repo.intake import diffs
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.landing import salvage
from orchestrator.repo.landing.merge_commits import RETRY_BASE_MESSAGE
from orchestrator.repo.landing.salvage import UnmergedWork
from orchestrator.repo.source.run_repository import find_run_repository
from orchestrator.repo.source.shared_work import SharedWork, TaskCommit
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.hub import find_hub, work_branch_name
from orchestrator.repo.worktrees.preserved import is_preserved
from orchestrator.repo.worktrees.slots import empty_trash
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.collection import format_work_subject


@dataclass(frozen=True, slots=True)
class PreservedWork:
    """Unmerged work: a ref of council's repository, or a worktree.

    A worktree is preserved if its changes could not be collected completely.
    """

    name: str
    run: str
    task: str
    status: str
    subject: str
    commit: str | None
    committed: int | None
    """Seconds since the epoch."""
    worktree: str | None
    """The folder of a worktree, once it has no git configuration by an agent; a worktree has no commit."""


class TaskChanges(Topic):
    """The changes of tasks, landed or preserved. Available as `council.changes`.

    `run` is a name that `council.runs.find` accepts.
    """

    async def diff(self, task: str, run: str | None = None, *, stat: bool = False) -> bytes:
        """Return the changes of a task as a git diff.

        Reads the worktree if the session is running or was interrupted.
        """
        name = await self._find(run)
        run_document, document = await read_named_task(self._context.store, name, task)
        git = await self._git_with_work(run_document, task, document)
        if document.status is TaskStatus.RUNNING and await self._has_worktree(name, task, document.attempt):
            return await self._live_diff(name, task, document.attempt, stat=stat)
        return await diffs.diff_commits(git, *await _diff_range(git, run_document, task, document), stat=stat)

    async def size(self, task: str, run: str | None = None) -> Changes:
        """Return the size of a task's changes, including those of a running session.

        Raises RefusedError if the task has none.
        """
        name = await self._find(run)
        run_document, document = await read_named_task(self._context.store, name, task)
        git = await self._git_with_work(run_document, task, document)
        if document.status is TaskStatus.RUNNING:
            worktree, rules = await self._session(name, task, document.attempt)
            return await diffs.count_session_changes(git, worktree, document.attempt.base, rules=rules)
        return await count(git, *await _diff_range(git, run_document, task, document))

    async def _git_with_work(self, run: RunDocument, task: str, document: TaskDocument) -> Git:
        """Return git in the trusted repository, which has the built work of a task, also of another machine."""
        environ = self._context.environ
        git = trusted_git(run, environ)
        built = [(phase.commit, phase.attempts[-1]) for phase in document.phases if phase.commit is not None]
        built += [] if document.commit is None else [(document.commit, document.building_attempt.number)]
        if run.hub is None and built:
            await self._index.hub(run)
            source = (await find_run_repository(run.repo, is_url=run.is_url, environ=environ)).source(git)
            commit, attempt = built[-1]
            ref = f"refs/heads/{work_branch_name(run.id, task, attempt)}"
            await SharedWork(source, git, run.id).fetch(TaskCommit(task, commit), ref)
        return git

    async def preserved(self, run: str | None = None) -> Sequence[PreservedWork]:
        """Return all preserved work of a run that is not on the target."""
        name = await self._find(run)
        git = await self._git(name)
        document = await read_run(self._context.store, name)
        listed = await salvage.list_unmerged_work(git, name)
        unmerged = [one for one in listed if not await self._is_on_target(git, document, one)]
        commits = await read_commits(git, [one.commit for one in unmerged])
        found = [await self._describe(one, commits[one.commit]) for one in unmerged]
        if await self._index.is_live(name):
            return found
        return [*found, *[await self._describe_worktree(one) for one in await self._leftover_worktrees(name)]]

    async def diff_preserved(self, name: str, run: str | None = None, *, stat: bool = False) -> bytes:
        """Return the changes of preserved work as a git diff."""
        run = await self._find(run)
        git = await self._git(run)
        if (worktree := await self._preserved_worktree(run, name)) is not None:
            run_document, document = await read_named_task(self._context.store, run, worktree.task)
            attempt = find_attempt(run_document, worktree.task, document, worktree.attempt)
            return await self._live_diff(run, worktree.task, attempt, stat=stat)
        found = await self._find_commit(git, run, name)
        return await diffs.diff_commits(git, await self._base(git, found), found.commit, stat=stat)

    async def apply(self, name: str, run: str | None = None, *, branch: str | None = None) -> Sequence[str]:
        """Apply preserved work to the checkout, uncommitted or as a new branch.

        Applies all of the work or none. Returns the changed paths, or the branch.
        """
        run = await self._find(run)
        git, document = await self._git(run), await read_run(self._context.store, run)
        if (worktree := await self._preserved_worktree(run, name)) is not None:
            folder = (await self._describe_worktree(worktree)).worktree
            remedy = f"`council resume {run}` saves it" if folder is None else f"copy files from {folder}"
            raise RefusedError(f"{name!r} is a worktree without a commit", remedy)
        found = await self._find_commit(git, run, name)
        environ = self._context.environ
        site = await find_run_repository(document.repo, is_url=document.is_url, environ=environ)
        if branch is not None:
            await salvage.create_branch(site.source(git), found.commit, branch)
            return (branch,)
        if site.repository is None or site.repository.top is None:
            raise RefusedError(f"{document.repo} has no checkout", "create a branch instead (--branch)")
        users = Git(None, as_user=True, environ=environ)
        base = await self._base(git, found)
        return await salvage.apply_to_checkout(git, users, site.repository.top, base, found.commit)

    async def drop(self, names: Sequence[str], run: str | None = None) -> None:
        """Delete preserved work.

        Raises RefusedError, with nothing deleted, if the run still needs any of it.
        """
        run = await self._find(run)
        git = await self._git(run)
        refs, folders = [], []
        listed = await salvage.list_unmerged_work(git, run)
        leftovers = {_name(one): one for one in await self._leftover_worktrees(run)}
        for name in names:
            worktree = leftovers.get(name)
            found = None if worktree else salvage.find_unmerged_work(listed, name, list(leftovers))
            task = worktree.task if worktree else found.task if found else ""
            document = await read_task(self._context.store, run, task)
            if document.status not in FINAL_STATUSES:
                raise RefusedError(f"{name!r} belongs to an unfinished task", "cancel the task first, or wait for it")
            folders += [worktree] if worktree else []
            refs += [found] if found else []
        await salvage.delete_refs(git, refs)
        for worktree in folders:
            await worktrees.remove_worktree(worktree)
            await empty_trash(worktree.hub, git.environ)

    async def _is_on_target(self, git: Git, run: RunDocument, found: UnmergedWork) -> bool:
        """Return True if the user's repository has the work on the run's target; False for a remote repository."""
        if run.is_url:
            return False
        is_attempt = found.part.partition("/")[0].isdecimal()
        # A conflict's commit has conflict markers, so the user merges its second parent in another way.
        commit = found.commit if is_attempt else await git.line("rev-parse", f"{found.commit}^2")
        users, target = Git(None, as_user=True, environ=self._context.environ), f"refs/heads/{run.target}"
        try:
            return await users.is_ancestor(commit, target, cwd=Path(run.repo), may_be_missing=True)
        except OSError:  # the repository is gone
            return False

    async def _find_commit(self, git: Git, run: str, name: str) -> UnmergedWork:
        """Return the work with a commit. Raises RefusedError, with similar names, if there is none."""
        worktrees = [_name(one) for one in await self._leftover_worktrees(run)]
        return salvage.find_unmerged_work(await salvage.list_unmerged_work(git, run), name, worktrees)

    async def _git(self, run: str) -> Git:
        return trusted_git(await read_run(self._context.store, run), self._context.environ)

    async def _live_diff(self, run: str, task: str, attempt: Attempt, *, stat: bool) -> bytes:
        worktree, rules = await self._session(run, task, attempt)
        git = await self._git(run)
        return await diffs.diff_session(git, worktree, attempt.base, rules=rules, stat=stat)

    async def _session(self, run: str, task: str, attempt: Attempt) -> tuple[Worktree, IntakeRules]:
        """Return the worktree of an attempt, and the rules for showing its files."""
        store, environ = self._context.store, self._context.environ
        session, redactor = SessionName(run, task, attempt.number), Redactor(secret_values(environ))
        return await find_session_files(store, session, redactor, environ)

    async def _describe(self, one: UnmergedWork, made: CommitSummary) -> PreservedWork:
        status = (await read_task(self._context.store, one.run, one.task)).status
        subject = made.subject
        if subject == RETRY_BASE_MESSAGE.strip():  # the attempt changed nothing
            spec = await read_spec(self._context.store, one.run, one.task)
            redactor = Redactor(secret_values(self._context.environ))
            subject = redactor.text(format_work_subject(one.task, spec.prompt))
        return PreservedWork(one.name, one.run, one.task, status, subject, one.commit, made.committed, None)

    async def _describe_worktree(self, one: Worktree) -> PreservedWork:
        document = await read_task(self._context.store, one.run, one.task)
        # In a worktree that was not preserved, git would run programs that the agent has configured.
        is_safe = await anyio.to_thread.run_sync(is_preserved, one)
        has_ended = (await read_run(self._context.store, one.run)).ended is not None
        subject = "a worktree that could not be collected completely"
        if not is_safe and has_ended:
            subject += ": git in it may run the agent's programs"
        elif not is_safe:
            subject = f"a worktree of an interrupted session: `council resume {one.run}` saves it"
        folder = str(one.tree) if is_safe or has_ended else None
        return PreservedWork(_name(one), one.run, one.task, document.status, subject, None, None, folder)

    async def _preserved_worktree(self, run: str, name: str) -> Worktree | None:
        return next((one for one in await self._leftover_worktrees(run) if _name(one) == name), None)

    async def _has_worktree(self, run: str, task: str, attempt: Attempt) -> bool:
        """Return True if an attempt has a worktree: it is running or was interrupted."""
        if await self._index.is_live(run):
            return True
        leftovers = await self._leftover_worktrees(run)
        return any((one.task, one.attempt) == (task, attempt.number) for one in leftovers)

    async def _leftover_worktrees(self, run: str) -> list[Worktree]:
        document = await read_run(self._context.store, run)
        hub = find_hub(document, self._context.environ)
        leftovers = await anyio.to_thread.run_sync(worktrees.list_worktrees, hub, run, document.tasks)
        return [one for one in leftovers if not one.is_check]

    async def _base(self, git: Git, found: UnmergedWork) -> str:
        document = await read_task(self._context.store, found.run, found.task)
        number = found.part.partition("/")[0]
        if not number.isdecimal():  # a merge of both sides of a conflict: its first parent is the target
            return await git.line("rev-parse", f"{found.commit}^1")
        return document.base_of(found.commit, document.attempts[int(number) - 1])


def trusted_git(run: RunDocument, environ: Mapping[str, str]) -> Git:
    """Return git in the trusted repository of a run.

    Raises RefusedError if the run was imported.
    """
    run.check_not_imported()
    return Git(find_hub(run, environ).trusted, environ=environ)


async def _diff_range(git: Git, run: RunDocument, task: str, document: TaskDocument) -> tuple[str, str]:
    """Return the base and the commit of a task's newest preserved work."""
    kept = [one for one in document.attempts if one.branch is not None]
    if not document.attempts:
        raise no_attempt_error(run, task, document)
    if not kept or (document.commit is None and not await git.has_branch(str(kept[-1].branch))):
        raise RefusedError(f"task {task!r} has no preserved changes", f"see `council logs {task} --run {run.id}`")
    return document.base_of(document.commit, kept[-1]), document.commit or f"refs/heads/{kept[-1].branch}"


def _name(worktree: Worktree) -> str:
    return salvage_worktree_name(worktree.task, worktree.attempt)
