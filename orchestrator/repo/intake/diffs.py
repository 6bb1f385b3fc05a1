"""Show changes between two commits or in a running session."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.errors import GitError, RefusedError
from orchestrator.repo.git.change_counts import COUNTS, PLAIN, Changes, count, parse_numstat
from orchestrator.repo.git.command import Git, printable_name, split_nul
from orchestrator.repo.git.reading import diff_trees
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.intake.quarantine import Quarantine
from orchestrator.repo.intake.session_commits import link_session_objects
from orchestrator.repo.intake.session_refs import read_session_refs
from orchestrator.repo.intake.staging import StagingArea, StagingResult, find_blocking_files, stage_files
from orchestrator.repo.worktrees.files.file_trees import is_folder
from orchestrator.repo.worktrees.worktrees import Worktree

#: In a prompt, a larger diff is reduced to counts.
_MAX_FILES = 200
_MAX_LINES = 3_000
#: The maximum number of a session's commits to count.
MAX_COMMITS = 10_000
#: Seconds for git to count them.
_COUNT_TIMEOUT = 30.0


async def diff_commits(git: Git, base: str, commit: str, *, stat: bool = False) -> bytes:
    """Return the diff of two commits as git prints it, with quoted file names."""
    return await diff_trees(git, base, commit, _options(stat=stat))


async def diff_commits_bounded(git: Git, base: str, commit: str) -> str:
    """Return the counts per file of a diff, then its lines unless there are too many."""
    changes = await count(git, base, commit)
    text = (await diff_commits(git, base, commit, stat=True)).decode(errors="replace")
    if changes.files > _MAX_FILES or changes.added + changes.removed > _MAX_LINES:
        return f"{text}\n(The diff is too long; its lines are left out.)\n"
    return f"{text}\n{(await diff_commits(git, base, commit)).decode(errors='replace')}"


async def diff_session(git: Git, worktree: Worktree, base: str, *, rules: IntakeRules, stat: bool = False) -> bytes:
    """Return the diff between a session's base and its current files.

    The session may be running. Leaves both indexes unchanged and keeps no objects. Secrets and huge files are omitted
    and listed before the diff in lines that begin with `#`. Raises RefusedError if there is no readable checkout.
    """
    async with _staged(git, worktree, base, rules) as (staging, staged):
        options = _options(stat=stat)
        done = await staging.confine(git)("diff-index", "--cached", *options, base, env=staging.env)
    lines = [f"# left out: {printable_name(path)!r}: {reason}\n" for path, reason in sorted(staged.refused.items())]
    if staged.problem is not None:
        lines.append(f"# some files can't be read: {staged.problem}\n")
    return "".join(lines).encode(errors="replace") + done.stdout


async def count_session_changes(git: Git, worktree: Worktree, base: str, *, rules: IntakeRules) -> Changes:
    """Count a session's changes so far, without secrets and huge files."""
    async with _staged(git, worktree, base, rules) as (staging, _):
        done = await staging.confine(git)("diff-index", "--cached", *COUNTS, base, env=staging.env)
    return parse_numstat(done.stdout.splitlines())


async def list_session_changes(git: Git, worktree: Worktree, base: str, *, rules: IntakeRules) -> list[str] | None:
    """Return the paths that a session has changed so far, without secrets and huge files; None if some are unreadable.

    Renamed files have both names.
    """
    async with _staged(git, worktree, base, rules) as (staging, staged):
        options = ("--cached", "--name-only", "-z", *PLAIN, "--no-renames")
        done = await staging.confine(git)("diff-index", *options, base, env=staging.env)
    return split_nul(done.stdout) if staged.problem is None else None


async def count_session_commits(git: Git, worktree: Worktree, base: str) -> int:
    """Return the number of commits on a session's branch; 0 if unreadable."""
    refs = await anyio.to_thread.run_sync(read_session_refs, worktree.git_dir)
    tip = refs.refs.get(f"refs/heads/{worktree.branch}", base)
    if tip == base:
        return 0
    folder = await anyio.to_thread.run_sync(_live_folder, worktree)
    try:
        await anyio.to_thread.run_sync(link_session_objects, worktree.git_dir, folder / "theirs")
        env = {"GIT_ALTERNATE_OBJECT_DIRECTORIES": str(folder / "theirs")}
        command = ("rev-list", "--count", f"--max-count={MAX_COMMITS}", tip, f"^{base}")
        confined = git.confined(readable=(worktree.hub.objects, worktree.git_dir, folder))
        return int((await confined(*command, env=env, limit=_COUNT_TIMEOUT)).stdout)
    except GitError:  # the session may be writing to them
        return 0
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))


@asynccontextmanager
async def _staged(
    git: Git, worktree: Worktree, base: str, rules: IntakeRules
) -> AsyncIterator[tuple[StagingArea, StagingResult]]:
    """Stage a session's files in a copy of our index for the `with` block."""
    folder = await anyio.to_thread.run_sync(_prepare, worktree)
    try:
        staging = StagingArea(worktree.tree, folder / "index", Quarantine(folder / "objects", worktree.hub.objects))
        yield staging, await stage_files(git, staging, base, rules)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))


def _options(*, stat: bool) -> list[str]:
    return [*PLAIN, "--color=never", "--stat=100" if stat else "--patch"]


def _prepare(worktree: Worktree) -> Path:
    """Copy our index of the checkout, so that git rereads only changed files."""
    name = f"{worktree.task}.{worktree.attempt}"
    remedy = "try again while the session is running, or after it has ended"
    if not worktree.index.exists() or not is_folder(worktree.tree):
        raise RefusedError(f"attempt {name} has no checkout", remedy)
    if pipe := next(find_blocking_files(worktree.tree), None):
        raise RefusedError(f"git can't read {printable_name(str(pipe))!r}: not a regular file", remedy)
    folder = _live_folder(worktree)
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        shutil.copyfile(worktree.index, folder / "index")
        undo.pop_all()
    return folder


def _live_folder(worktree: Worktree) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{worktree.index_folder.name}.live-", dir=worktree.hub.indexes))
