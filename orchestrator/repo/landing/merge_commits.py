"""Create commits for merging: merges, conflicts, merge bases, and bases for retries."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator.repo.git.command import Git
from orchestrator.repo.worktrees.hub import Hub

#: The message of a commit that another attempt starts from; `salvage list` shows the task for work that ends there.
RETRY_BASE_MESSAGE = "Work merged into the target, for the next attempt to fix\n"


@dataclass(frozen=True, slots=True)
class RebaseConflict:
    """The conflicting paths of a rebase, and the commit that the work conflicts with."""

    paths: tuple[str, ...]
    ours: str


async def commit_merge(git: Git, tree: str, first: str, second: str, message: str) -> str:
    """Return a commit with a tree and two parents."""
    return await git.line("commit-tree", tree, "-p", first, "-p", second, input_=message.encode())


async def with_merge_base(git: Git, base: str, onto: str, commit: str) -> str:
    """Return a commit with the tree of `onto` that gives git the merge base with `commit` at once.

    Otherwise git walks all landings since, so the cost of a run's merges is quadratic in their number; with few
    landings that is still faster. If `base` is part of the target and nothing built on it is, `base` is the merge base,
    and a commit directly on top of `base` makes git find it. (`merge-tree --merge-base` does the same, but requires git
    2.40.) If the target has some of that work, because the agent pulled or the user merged, only git can find the merge
    base: then this returns `onto`.
    """
    built = await git.line("rev-list", "--count", commit, f"^{base}")
    if built != await git.line("rev-list", "--count", commit, f"^{base}", f"^{onto}"):
        return onto
    return await git.line("commit-tree", f"{onto}^{{tree}}", "-p", base, input_=b"merge base\n")


async def create_retry_base(git: Git, merge: str, ref: str) -> str:
    """Return a commit with the tree of a merge that an agent will fix, kept by `ref`.

    Its first parent is the commit merged onto. Unlike the merge itself, it does not mark any task as landed.
    """
    parents = await git.line("rev-parse", f"{merge}^1", f"{merge}^2")
    tree = await git.line("rev-parse", f"{merge}^{{tree}}")
    first, second = parents.split()
    return await _keep_retry_base(git, tree, first, second, ref)


async def renew_retry_base(git: Git, work: str, onto: str, ref: str) -> str | tuple[str, ...]:
    """Rebuild a retry base on a newer target commit, or return the conflicting paths.

    The base is kept by `ref`.
    """
    if await git.line("rev-parse", f"{work}^1") == onto:
        return work
    tree, paths = await git.merge_tree(onto, work)
    return paths or await _keep_retry_base(git, tree, onto, work, ref)


async def stack_work(git: Git, onto: str, works: Mapping[str, str], ref: str) -> str | tuple[str, ...]:
    """Return a commit with the unlanded work of tasks merged onto `onto`, or the conflicting paths.

    The commit is kept by `ref`.
    """
    for task, work in works.items():
        tree, paths = await git.merge_tree(onto, work)
        if paths:
            return paths
        onto = await commit_merge(git, tree, onto, work, f"Unlanded work of {task}, for a task that needs it\n")
    await git("update-ref", ref, onto)
    return onto


async def rebase_work(git: Git, base: str, work: str, onto: str, ref: str) -> str | RebaseConflict:
    """Return the changes from `base` to `work` as one commit on `onto`, or the conflict.

    Unlike a merge, the commit does not have `base` in its history, which may never land. It is kept by `ref`.
    """
    ours = await git.line("commit-tree", f"{onto}^{{tree}}", "-p", base, input_=b"merge base\n")
    tree, paths = await git.merge_tree(ours, work)
    if paths:
        return RebaseConflict(paths, ours)
    message = (await git("log", "-1", "--format=%B", work)).stdout
    commit = await git.line("commit-tree", tree, "-p", onto, input_=message)
    await git("update-ref", ref, commit)
    return commit


async def _keep_retry_base(git: Git, tree: str, first: str, second: str, ref: str) -> str:
    commit = await commit_merge(git, tree, first, second, RETRY_BASE_MESSAGE)
    await git("update-ref", ref, commit)
    return commit


async def commit_conflict(git: Git, target: tuple[str, str], work: tuple[str, str], onto: str) -> str:
    """Return a commit with the conflicting merge of two named commits.

    Conflict markers show both names. The parents are `onto`, which has the tree of the target's commit, and the work.
    """
    # Git writes its arguments into the conflict markers. This repository has no remotes or tags; a name that git would
    # resolve differently is passed as a full ref.
    (branch, ours), (label, commit) = target, work
    sides = (branch, f"refs/remotes/{branch}", ours), (label, f"refs/tags/{label}", commit)
    for _, ref, value in sides:
        await git("update-ref", ref, value)
    mine, theirs = [
        name if await git.line("rev-parse", "--verify", f"{name}^{{commit}}") == value else ref
        for name, ref, value in sides
    ]
    tree, _ = await git.merge_tree(mine, theirs)
    for _, ref, _ in sides:
        await git("update-ref", "-d", ref)
    return await commit_merge(git, tree, onto, commit, f"{label.rpartition('/')[2]}: conflict with markers\n")


async def revert_paths(git: Git, commit: str, paths: Collection[str], message: str) -> str:
    """Return a commit like `commit`, but without its changes at `paths`."""
    first, *other_parents = (await git.line("rev-parse", f"{commit}^@")).split()
    changes = [change for change in await git.changes(first, commit) if change.path in paths]
    # Removals first: a file may replace a folder.
    removals_first = sorted(changes, key=lambda change: change.old_mode)
    entries = ((change.old_mode, change.old_id, change.path) for change in removals_first)
    tree = await replace_entries(git, commit, entries)
    parents = [word for parent in (first, *other_parents) for word in ("-p", parent)]
    return await git.line("commit-tree", tree, *parents, input_=message.encode())


def temporary_folder(git: Git) -> TemporaryDirectory[str]:
    """Return a temporary folder in the hub: `council clean` removes it if this process is killed."""
    assert git.git_dir is not None, "git runs in our repository"  # noqa: S101  (for the type checker)
    return TemporaryDirectory(prefix="merge-", dir=Hub(git.git_dir.parent).indexes)


async def replace_entries(git: Git, tree: str, entries: Iterable[tuple[str, str, str]]) -> str:
    """Return a tree like `tree`, but with these entries (mode, id and path), added in this order."""
    lines = "".join(f"{mode} {blob}\t{path}\0" for mode, blob, path in entries)
    with temporary_folder(git) as folder:
        env = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        await git("read-tree", tree, env=env)
        listed = lines.encode(errors="surrogateescape")
        await git("update-index", "--replace", "-z", "--index-info", env=env, input_=listed)
        return await git.line("write-tree", env=env)
