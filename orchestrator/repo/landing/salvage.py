"""Work that is kept in the trusted repository, and the ways out of there: a checkout, a branch, or none."""

from __future__ import annotations

import difflib
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.errors import GitError, RefusedError, to_unusable_error
from orchestrator.repo.git.command import GITLINK_MODE, Git, parse_raw_diff, printable_name
from orchestrator.repo.git.embedded_repositories import find_embedded_repository
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.repo.source.user_checkouts import find_repository
from orchestrator.repo.source.user_programs import find_path_controlling_git, find_unsafe_filter, read_git_config

_WORK, _SALVAGE = "refs/heads/council/", "refs/salvage/"
_REMEDY = "add `--branch BRANCH` to make a branch of it instead, and merge that"


@dataclass(frozen=True, slots=True)
class UnmergedWork:
    """A ref that keeps work of a task.

    `part` is the attempt's number or `conflict` for a branch, `<attempt>/<name>` for what was salvaged besides.
    `committed` is the committer's time in seconds since 1970.
    """

    ref: str
    run: str
    task: str
    part: str
    commit: str
    committed: int
    subject: str

    @property
    def name(self) -> str:
        """What a user calls it: `<task>/<part>`, as in `build/1`, `build/conflict`, `build/1/stash`.

        Unambiguous within a run: no part of it has a slash, and only what was salvaged has three.
        """
        return f"{self.task}/{self.part}"


async def list_unmerged_work(git: Git, run: str | None = None) -> list[UnmergedWork]:
    """Return all that is kept of a run, or of all runs, sorted by run and name."""
    inside = f"{run}/" if run else ""
    listed = await git(
        "for-each-ref", "--format=%(refname)%00%(objectname)%00%(committerdate:unix)%00%(subject)",
        f"{_WORK}{inside}", f"{_SALVAGE}{inside}",
    )  # fmt: skip
    rows = [row.split("\0", 3) for row in listed.stdout.decode(errors="replace").split("\n")[:-1]]
    found = (_parse_ref(*row) for row in rows)
    return sorted((one for one in found if one is not None), key=lambda one: (one.run, one.task, one.part))


def _parse_ref(ref: str, commit: str, committed: str, subject: str) -> UnmergedWork | None:
    salvaged = ref.startswith(_SALVAGE)
    parts = ref.removeprefix(_SALVAGE if salvaged else _WORK).split("/")
    if len(parts) != 3:
        return None
    run, task, part = parts
    if salvaged:
        task, _, attempt = task.rpartition(".")
        part = f"{attempt}/{part}"
    return UnmergedWork(ref, run, task, part, commit, int(committed or 0), subject)


def find_unmerged_work(kept: Sequence[UnmergedWork], name: str) -> UnmergedWork:
    """Return what a user means by `<task>/<part>` or `<run>/<task>/<part>`; RefusedError with what is near."""
    found = [one for one in kept if one.name == name] or [one for one in kept if f"{one.run}/{one.name}" == name]
    if len(found) == 1:
        return found[0]
    full = [f"{one.run}/{one.name}" for one in found]
    if full:
        raise RefusedError(f"{name!r} is in more than one run", f"say which: {', '.join(full)}")
    names = sorted({one.name for one in kept})
    near = [one for one in names if one.startswith(f"{name}/")] or difflib.get_close_matches(name, names)
    remedy = f"choose one of {', '.join(near or names[:10])}" if names else "nothing is preserved of this run"
    raise RefusedError(f"no work is kept as {name!r}", remedy)


async def apply_to_checkout(git: Git, users: Git, checkout: Path, base: str, commit: str) -> tuple[str, ...]:
    """Bring the change from `base` to `commit` into the user's files, uncommitted; return the paths that changed.

    All of it or nothing: the change is merged with the checkout's commit first, and the result is applied only if
    it fits the files as they are. Else RefusedError. The index stays as it is. `git` runs in the trusted
    repository, `users` at the user's side.
    """
    if any(GITLINK_MODE in {one.old_mode, one.new_mode} for one in await git.changes(base, commit)):
        raise RefusedError("the change is about a repository in the repository, which files can't hold", _REMEDY)
    scratch = await anyio.to_thread.run_sync(_scratch, git)
    try:
        env = {"GIT_OBJECT_DIRECTORY": str(scratch), **await _objects_of_both(git, users, checkout)}
        patch, paths = await _make_patch(git, users, checkout, (base, commit), env)
        await _refuse_user_programs(git, users, checkout, base, commit)
    finally:
        await anyio.to_thread.run_sync(lambda: shutil.rmtree(scratch, ignore_errors=True))
    try:
        for mode in ("--check",), ():
            if patch:
                await users("apply", "--whitespace=nowarn", *mode, "-", cwd=checkout, input_=patch)
    except GitError as error:
        raise to_unusable_error(error, f"it does not fit the files in {checkout}", _REMEDY) from None
    return paths


async def _refuse_user_programs(git: Git, users: Git, checkout: Path, base: str, commit: str) -> None:
    """Refuse (RefusedError) what would make the user's git run a program of an agent, as a landing does."""
    repository, configuration = await find_repository(checkout, users), await read_git_config(users, checkout)
    remedy = "look at it first: `council salvage show`; then `council salvage apply --branch` and merge it by hand"
    if (found := await find_unsafe_filter(repository, checkout, configuration)) is not None:
        raise RefusedError(*found)
    paths = [one.path for one in await git.changes(base, commit)]
    if (path := await find_path_controlling_git(repository, users, checkout, configuration, paths)) is not None:
        raise RefusedError(f"it changes {printable_name(path)}, which decides what your git runs", remedy)
    if (folder := await find_embedded_repository(git, base, commit)) is not None:
        raise RefusedError(f"git would take {printable_name(folder)} for a repository of its own", remedy)


def _scratch(git: Git) -> Path:
    return Path(tempfile.mkdtemp(prefix="objects.", dir=git.git_dir))


async def _objects_of_both(git: Git, users: Git, checkout: Path) -> dict[str, str]:
    asked = await users("rev-parse", "--path-format=absolute", "--git-path", "objects", cwd=checkout)
    theirs = asked.stdout.decode(errors="surrogateescape").rstrip("\n")
    quoted = theirs.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return {"GIT_ALTERNATE_OBJECT_DIRECTORIES": f'{git.git_dir}/objects:"{quoted}"'}


async def _make_patch(
    git: Git, users: Git, checkout: Path, move: tuple[str, str], env: dict[str, str]
) -> tuple[bytes, tuple[str, ...]]:
    """Return the change as a patch to the checkout's commit, and its paths; RefusedError if both change the same."""
    base, commit = move
    asked = await users("rev-parse", "--verify", "--quiet", "HEAD^{commit}", cwd=checkout, ok=(0, 1, 128))
    head = asked.stdout.decode().strip()
    if not head:
        raise RefusedError(f"{checkout} has no commit yet", _REMEDY)

    async def commit_tree(of: str, *parents: str) -> str:
        return await git.line("commit-tree", f"{of}^{{tree}}", *parents, env=env, input_=b"side\n")

    # Whatever their histories are, the change is what lies between its own two commits.
    start = await commit_tree(base)
    ours, theirs = await commit_tree(head, "-p", start), await commit_tree(commit, "-p", start)
    tree, conflicts = await git.merge_tree(ours, theirs, env=env)
    if conflicts:
        raise RefusedError(f"it conflicts with {checkout} in {', '.join(map(repr, conflicts))}", _REMEDY)
    options = ("-r", "--patch", "--binary", "--full-index", "--no-renames", "--no-ext-diff", "--no-textconv")
    patch = (await git("diff-tree", *options, ours, tree, env=env)).stdout
    raw = await git("diff-tree", "-r", "--raw", "-z", "--no-renames", ours, tree, env=env)
    return patch, tuple(printable_name(one.path) for one in parse_raw_diff(raw.stdout))


async def create_branch(source: UpstreamRepository, commit: str, branch: str) -> None:
    """Create a branch of the user's repository at a commit of ours; RefusedError if it exists or can't be one."""
    remedy = "choose another name"
    checked = await source.git("check-ref-format", f"refs/heads/{branch}", ok=(0, 1))
    if checked.returncode or branch.startswith("-") or branch == "HEAD":
        raise RefusedError(f"{branch!r} can't be the name of a branch", remedy)
    if await source.tip(branch) is not None:
        raise RefusedError(f"the branch {branch!r} exists", remedy)
    pushed = await source.push(commit, branch, None, ())
    if not pushed.moved:
        raise RefusedError(f"the branch {branch!r} can't be made: {pushed.reason}", remedy)


async def delete_refs(git: Git, kept: Iterable[UnmergedWork]) -> None:
    """Delete these refs, all or none; RefusedError if one of them is not what was listed any more."""
    lines = "".join(f"delete {one.ref}\0{one.commit}\0" for one in kept)
    try:
        await git("update-ref", "-z", "--stdin", input_=lines.encode())
    except GitError as error:
        raise to_unusable_error(error, "the work changed meanwhile", "list it and choose again") from None
