"""Find preserved work, and apply it, create a branch from it, or drop it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.domain.wording import find_similar, join_names
from orchestrator.errors import GitError, RefusedError, to_unusable_error
from orchestrator.repo.git.command import GITLINK_MODE, Git, parse_raw_diff, printable_name
from orchestrator.repo.git.reading import list_refs
from orchestrator.repo.git.unsupported_files import find_embedded_repository
from orchestrator.repo.landing.merge_commits import temporary_folder
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.repo.source.user_checkouts import find_repository
from orchestrator.repo.source.user_programs import find_path_controlling_git, find_unsafe_filter, read_git_config

_WORK, _SALVAGE = "refs/heads/council/", "refs/salvage/"
#: The maximum number of names in a remedy.
_MOST_NAMED = 10
_REMEDY = "add `--branch BRANCH` to create a branch instead, then merge it"


@dataclass(frozen=True, slots=True)
class UnmergedWork:
    """A ref that preserves a task's work.

    `part` is the attempt number or `conflict` for a branch, `<attempt>/<name>` for other salvaged commits.
    """

    ref: str
    run: str
    task: str
    part: str
    commit: str

    @property
    def name(self) -> str:
        """The name shown to users, such as `build/1`, `build/conflict`, `build/1/stash`.

        Unique within a run: no component contains a slash, and only salvaged commits have three components.
        """
        return f"{self.task}/{self.part}"


async def list_unmerged_work(git: Git, run: str | None = None) -> list[UnmergedWork]:
    """Return all preserved work of a run, or of all runs, sorted by run and name."""
    inside = f"{run}/" if run else ""
    refs = await list_refs(git, f"{_WORK}{inside}", f"{_SALVAGE}{inside}")
    parsed = (_parse_ref(ref, commit) for ref, commit in refs.items())
    return sorted((work for work in parsed if work is not None), key=lambda work: (work.run, work.task, work.part))


def _parse_ref(ref: str, commit: str) -> UnmergedWork | None:
    is_salvaged = ref.startswith(_SALVAGE)
    parts = ref.removeprefix(_SALVAGE if is_salvaged else _WORK).split("/")
    if len(parts) != 3:
        return None
    run, task, part = parts
    if is_salvaged:
        task, _, attempt = task.rpartition(".")
        part = f"{attempt}/{part}"
    return UnmergedWork(ref, run, task, part, commit)


def find_unmerged_work(preserved: Sequence[UnmergedWork], name: str, worktrees: Sequence[str] = ()) -> UnmergedWork:
    """Return the work named `<task>/<part>` or `<run>/<task>/<part>`.

    Raises RefusedError, with similar names, also of `worktrees`, if there is none.
    """
    matches = [work for work in preserved if work.name == name]
    matches = matches or [work for work in preserved if f"{work.run}/{work.name}" == name]
    if len(matches) == 1:
        return matches[0]
    full = [f"{work.run}/{work.name}" for work in matches]
    if full:
        raise RefusedError(f"{name!r} exists in several runs", f"choose one of {', '.join(full)}")
    names = sorted({*worktrees, *(work.name for work in preserved)})
    near = [known for known in names if known.startswith(f"{name}/")] or find_similar(name, names, 3)
    remedy = f"choose one of {join_names(near or names, _MOST_NAMED)}" if names else "this run has no preserved work"
    remedy += "; for another run add --run RUN"
    raise RefusedError(f"preserved work {name!r} not found", remedy)


async def apply_to_checkout(git: Git, users: Git, checkout: Path, base: str, commit: str) -> tuple[str, ...]:
    """Apply a change to the user's files, uncommitted; return the changed paths.

    All or nothing: the change from `base` to `commit` is first merged with the checkout's commit. Raises RefusedError
    if the result does not apply to the current files. The index does not change. `git` runs in the trusted repository,
    `users` with the user's configuration.
    """
    if any(GITLINK_MODE in {change.old_mode, change.new_mode} for change in await git.changes(base, commit)):
        raise RefusedError("the change includes a nested repository, which can't be applied to files", _REMEDY)
    with temporary_folder(git) as folder:
        env = {"GIT_OBJECT_DIRECTORY": folder, **await _alternate_objects_env(git, users, checkout)}
        patch, paths = await _make_patch(git, users, checkout, (base, commit), env)
        await _refuse_user_programs(git, users, checkout, base, commit)
    try:
        for mode in ("--check",), ():
            if patch:
                await users("apply", "--whitespace=nowarn", *mode, "-", cwd=checkout, input_=patch)
    except GitError as error:
        raise to_unusable_error(error, f"it does not apply to the files in {checkout}", _REMEDY) from None
    return paths


async def _refuse_user_programs(git: Git, users: Git, checkout: Path, base: str, commit: str) -> None:
    """Raise RefusedError if a change would make the user's git run an agent's program."""
    repository, configuration = await find_repository(checkout, users), await read_git_config(users, checkout)
    remedy = "review it with `council salvage show NAME`, then add `--branch BRANCH` and merge that branch manually"
    if (unsafe := await find_unsafe_filter(repository, checkout, configuration)) is not None:
        raise RefusedError(*unsafe)
    paths = [change.path for change in await git.changes(base, commit)]
    if (path := await find_path_controlling_git(repository, users, checkout, configuration, paths)) is not None:
        raise RefusedError(f"it changes {printable_name(path)}, which controls the programs that your git runs", remedy)
    if (folder := await find_embedded_repository(git, base, commit)) is not None:
        raise RefusedError(f"git would treat {printable_name(folder)} as a separate repository", remedy)


async def _alternate_objects_env(git: Git, users: Git, checkout: Path) -> dict[str, str]:
    printed = await users("rev-parse", "--path-format=absolute", "--git-path", "objects", cwd=checkout)
    theirs = printed.stdout.decode(errors="surrogateescape").rstrip("\n")
    quoted = theirs.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return {"GIT_ALTERNATE_OBJECT_DIRECTORIES": f'{git.git_dir}/objects:"{quoted}"'}


async def _make_patch(
    git: Git, users: Git, checkout: Path, move: tuple[str, str], env: dict[str, str]
) -> tuple[bytes, tuple[str, ...]]:
    """Return the change as a patch for the checkout's commit, and its paths.

    Raises RefusedError on a conflict.
    """
    base, commit = move
    printed = await users("rev-parse", "--verify", "--quiet", "HEAD^{commit}", cwd=checkout, ok=(0, 1, 128))
    head = printed.stdout.decode().strip()
    if not head:
        raise RefusedError(f"{checkout} has no commits yet", _REMEDY)

    async def commit_tree(of: str, *parents: str) -> str:
        return await git.line("commit-tree", f"{of}^{{tree}}", *parents, env=env, input_=b"side\n")

    # The change is the difference between its two commits, independent of their histories.
    start = await commit_tree(base)
    ours, theirs = await commit_tree(head, "-p", start), await commit_tree(commit, "-p", start)
    tree, conflicts = await git.merge_tree(ours, theirs, env=env)
    if conflicts:
        raise RefusedError(f"it conflicts with {checkout} in {', '.join(map(repr, conflicts))}", _REMEDY)
    options = ("-r", "--patch", "--binary", "--full-index", "--no-renames", "--no-ext-diff", "--no-textconv")
    patch = (await git("diff-tree", *options, ours, tree, env=env)).stdout
    raw = await git("diff-tree", "-r", "--raw", "-z", "--no-renames", ours, tree, env=env)
    return patch, tuple(printable_name(change.path) for change in parse_raw_diff(raw.stdout))


async def create_branch(source: UpstreamRepository, commit: str, branch: str) -> None:
    """Create a branch in the user's repository at one of our commits.

    Raises RefusedError if the branch exists or its name is invalid.
    """
    remedy = "choose another name"
    checked = await source.git("check-ref-format", f"refs/heads/{branch}", ok=(0, 1))
    if checked.returncode or branch.startswith("-") or branch == "HEAD":
        raise RefusedError(f"{branch!r} is not a valid branch name", remedy)
    if await source.tip(branch) is not None:
        raise RefusedError(f"branch {branch!r} already exists", remedy)
    pushed = await source.push(commit, branch, None, ())
    if not pushed.moved:
        raise RefusedError(f"can't create branch {branch!r}: {pushed.reason}", remedy)


async def delete_refs(git: Git, preserved: Iterable[UnmergedWork]) -> None:
    """Delete these refs, all or none. Raises RefusedError if one has changed."""
    lines = "".join(f"delete {work.ref}\0{work.commit}\0" for work in preserved)
    try:
        await git("update-ref", "-z", "--stdin", input_=lines.encode())
    except GitError as error:
        raise to_unusable_error(error, "the work has changed", "list it again and choose from the new list") from None
