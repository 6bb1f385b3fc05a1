"""Collect an agent's work from its worktree as one commit.

The files in the checkout are the result. We stage them in our repository with our index, so that none of the agent's
filters or hooks run. The agent's commits on its branch are kept as history if they descend from its base; each object
is read, hashed and checked again before import. Commits on other branches, tags, stashes and a detached HEAD are
preserved under refs/salvage. None of these lets secrets or huge files through (`repo.intake.inspection`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import anyio
import anyio.to_thread

from orchestrator.domain.wording import join_names
from orchestrator.errors import GitError, is_resource_exhaustion
from orchestrator.repo.git.command import GITLINK_MODE, FileChange, Git, is_object_id, printable_name
from orchestrator.repo.git.reading import list_refs
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.intake.quarantine import Quarantine
from orchestrator.repo.intake.session_commits import SessionCommits
from orchestrator.repo.intake.session_refs import SessionRefs, read_session_refs
from orchestrator.repo.intake.staging import StagingArea, make_readable, stage_files
from orchestrator.repo.worktrees.files.change_detection import TreeDiff
from orchestrator.repo.worktrees.files.file_trees import is_folder
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.system.failpoints import failpoint

_MAX_SALVAGED = 50


@dataclass(frozen=True, slots=True)
class CollectionResult:
    """The work collected from a worktree.

    `commit`: the commit with the changes, or None without changes. `refused`: the reason why it can't be landed, or
    None. `complete`: whether the trusted repository has all allowed work; if not, the worktree is the only copy of the
    rest. `left_out`: the paths of secrets and huge files excluded from the commit; a retry won't help. `salvaged`: the
    refs created for commits that are not on any branch. `notes`: the parts of the worktree that were not collected,
    with reasons. `discarded`: the paths that a session without write permission changed; nothing else of it is kept.
    """

    commit: str | None
    refused: str | None = None
    complete: bool = True
    left_out: tuple[str, ...] = ()
    salvaged: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    discarded: tuple[str, ...] = ()


async def collect_work(
    git: Git, worktree: Worktree, base: str, message: str, *, rules: IntakeRules, diff: TreeDiff | None = None
) -> CollectionResult:
    """Commit the worktree's changes since `base` to the attempt's branch.

    No session process may be running. `git` runs in the trusted repository. `diff`, the changes since the slot was
    assigned, limits the files that are read. Safe to repeat: a second call commits the same content again.
    """
    try:
        return await _collect_all(git, worktree, base, message, rules, diff)
    finally:
        # The folder also contains rejected objects.
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(partial(shutil.rmtree, worktree.import_folder, ignore_errors=True))


async def _collect_all(
    git: Git, worktree: Worktree, base: str, message: str, rules: IntakeRules, diff: TreeDiff | None
) -> CollectionResult:
    unread, refs = await anyio.to_thread.run_sync(_open, worktree, diff)
    history = SessionCommits(git, worktree, base, rules)
    if any(target != base for _, target in _candidates(refs, worktree.branch)):
        await history.open()
    tip, dropped = await _own_commits(history, refs)
    files = await _collect_files(history, tip, refs.head, message, diff, unread)
    salvaged, notes = await _salvage(history, refs, files.commit or base)
    return CollectionResult(
        files.commit,
        files.refused,
        complete=files.complete and not dropped and not notes,
        left_out=files.left_out,
        salvaged=salvaged,
        notes=(*dropped, *notes),
    )


def _open(worktree: Worktree, diff: TreeDiff | None) -> tuple[list[str] | None, SessionRefs]:
    """Make a session's folders readable; return the exceptions and the refs. Blocks.

    The exceptions are None without a checkout.
    """
    unread = make_readable(worktree.git_dir) if is_folder(worktree.git_dir) else []
    refs = read_session_refs(worktree.git_dir)
    return (unread + make_readable(worktree.tree, diff) if is_folder(worktree.tree) else None), refs


async def _own_commits(history: SessionCommits, refs: SessionRefs) -> tuple[str, tuple[str, ...]]:
    """Return the agent's last commit to keep as history, else the base and a reason."""
    tip = refs.refs.get(f"refs/heads/{history.worktree.branch}", history.base)
    if tip == history.base:
        return history.base, ()
    reason = await history.import_commits(tip, history.base, descends=True)
    if reason is None:
        return tip, ()
    return history.base, (f"its own commits were not kept as history: {reason}",)


async def _collect_files(
    history: SessionCommits,
    tip: str,
    head: str | None,
    message: str,
    diff: TreeDiff | None,
    unread: Sequence[str] | None,
) -> CollectionResult:
    git, worktree, base = history.git, history.worktree, history.base
    staged = await _stage(history, diff, unread)
    refused, left_out = staged.refused, staged.left_out
    if tip == base and not staged.changes:
        return CollectionResult(None, refused, complete=refused is None, left_out=left_out)
    tree = await git.line("write-tree", env={"GIT_INDEX_FILE": str(worktree.index)})
    base_tree = tip_tree = None  # without commits, only changed files are collected
    if tip != base:
        tip_tree, base_tree = (await git.line("rev-parse", f"{tip}^{{tree}}", f"{base}^{{tree}}")).split()
        if tree == base_tree and head != f"ref: refs/heads/{worktree.branch}":
            # The agent switched to the base or elsewhere: its work is on its branch.
            tree = tip_tree
    own = tip
    if tree != tip_tree:
        tip = await git.line("commit-tree", tree, "-p", tip, input_=message.encode())
    if tree == base_tree and not (refused and tip != base):
        return CollectionResult(None, refused, complete=refused is None, left_out=left_out)
    await git("update-ref", f"refs/heads/{worktree.branch}", tip)
    failpoint("work.committed")
    changes = staged.changes if own == base else await git.changes(base, tip)
    return CollectionResult(
        tip, refused or _describe_nested_repository(changes), complete=refused is None, left_out=left_out
    )


@dataclass(frozen=True, slots=True)
class _Staged:
    """The reasons for unstaged files, the rejected paths, and the staged changes."""

    refused: str | None
    left_out: tuple[str, ...] = ()
    changes: Sequence[FileChange] = ()


async def _stage(history: SessionCommits, diff: TreeDiff | None, unread: Sequence[str] | None) -> _Staged:
    """Stage all allowed files of the checkout; the folders `unread` can't be opened."""
    worktree = history.worktree
    if unread is None:
        return _Staged("its worktree was removed or replaced")
    quarantine = Quarantine(worktree.import_folder / "files", worktree.hub.objects)
    slot, git = worktree.slot, history.git
    if slot is not None and slot.is_sparse:
        # Files outside the sparse folders may differ from the commit: let git see and compare them.
        git, diff = replace(git, flags=(*git.flags, "-c", "core.sparseCheckout=true")), None
    staging = StagingArea(worktree.tree, worktree.index, quarantine, diff)
    staged = await stage_files(git, staging, history.base, history.rules)
    await anyio.to_thread.run_sync(quarantine.admit_objects, staged.refused_objects)
    failpoint("work.staged")
    reasons = []
    if staged.refused:
        named = [f"{printable_name(path)!r}: {reason}" for path, reason in sorted(staged.refused.items())]
        reasons.append(f"left out of its commit: {join_names(named, 10, '; ')}")
    problem = staged.problem or (f"{printable_name(unread[0])[-100:]!r} can't be opened" if unread else None)
    if problem is not None:
        reasons.append(f"some files could not be staged ({problem}); they are in {worktree.tree}")
    return _Staged("; ".join(reasons) or None, tuple(sorted(map(printable_name, staged.refused))), staged.changes)


def _describe_nested_repository(changes: Iterable[FileChange]) -> str | None:
    for change in changes:
        if change.new_mode == GITLINK_MODE:
            return f"{change.path!r} is a nested git repository: remove its `.git` to land it"
    return None


async def _salvage(history: SessionCommits, refs: SessionRefs, tip: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Preserve commits that are in neither base nor `tip`; return refs and failures."""
    worktree = history.worktree
    before: dict[str, str] | None = None
    created: dict[str, str] = {}
    notes = [] if refs.complete else ["too many refs: only some were read"]
    for name, target in _candidates(refs, worktree.branch):
        if target in {history.base, tip}:
            continue
        try:
            commit = await history.resolve_commit(target)
            if commit is None or commit in created or not await history.is_unreachable_from(commit, history.base, tip):
                continue
        except GitError as error:  # it refers to missing objects: nothing can be preserved
            if is_resource_exhaustion(error):
                raise
            continue
        if len(created) == _MAX_SALVAGED:
            notes.append(f"too many refs: only {_MAX_SALVAGED} were salvaged")
            break
        safe = history.rules.redactor.text(name)
        ref = _free_ref(salvage_ref_name(worktree.run, worktree.task, worktree.attempt, safe), created)
        if before is None:
            # The refs created by an earlier, interrupted call.
            folder = f"refs/salvage/{worktree.run}/{worktree.task}.{worktree.attempt}/"
            before = await list_refs(history.git, folder)
        if before.get(ref) != commit:
            if reason := await history.import_commits(commit, history.base, tip):
                notes.append(f"{printable_name(name)!r} was not salvaged: {reason}")
                continue
            await history.git("update-ref", ref, commit)
        created[commit] = ref
    return tuple(created.values()), tuple(notes)


def _candidates(refs: SessionRefs, branch: str) -> Iterator[tuple[str, str]]:
    if refs.head is not None and is_object_id(refs.head):
        yield "HEAD", refs.head
    for ref, target in sorted(refs.refs.items()):
        is_own = ref == f"refs/heads/{branch}"
        yield "branch" if is_own else ref.removeprefix("refs/").removeprefix("heads/"), target


def salvage_ref_name(run: str, task: str, attempt: int, name: str) -> str:
    """Return the ref for an attempt's commits that are not on a branch."""
    safe = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:64] or "ref"
    return f"refs/salvage/{run}/{task}.{attempt}/{safe}"


def _free_ref(ref: str, created: Mapping[str, str]) -> str:
    taken = set(created.values())
    names = (ref if number == 1 else f"{ref}-{number}" for number in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)
