"""Landing: finished work moves the target branch, merge by merge, or not at all.

`prepare` merges without a checkout, the caller records the intent, `move` is one push with a lease, of one merge or of
several that follow each other. What was cut off in between is finished or undone by `settle`. Each of them demands a
`MergePermit`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import anyio.to_thread

from orchestrator.errors import LockHeld, RefusedError, TargetMissing
from orchestrator.locking.merge_permit import MergePermit
from orchestrator.locking.ownership import ownership_scope
from orchestrator.repo.git.command import FileChange, Git, printable_name, split_nul
from orchestrator.repo.git.embedded_repositories import find_embedded_repository
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.repo.source.user_checkouts import (
    LocalRepository,
    find_blocking_locks,
    find_checkout,
    find_locked_checkouts,
    interrupted_landing,
    left_checkouts,
    list_uncommitted_changes,
    read_head_stats,
    recover_push,
    remove_incoming_objects,
    update_switched_checkout,
)
from orchestrator.repo.source.user_programs import find_path_controlling_git, find_unsafe_filter, read_git_config
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.system.failpoints import failpoint
from orchestrator.system.file_lock import FileLock
from orchestrator.system.slow_waits import warn_if_slow

#: Shows people which task a landing is of. What counts as landed is decided by recorded merges: anyone can write it.
TASK_TRAILER = "Council-Task"

#: Seconds that whoever is moving the target gets to be done with it: a push, which a stopped process may have begun.
_PUSH_TIMEOUT = 30.0
#: What holds the landing lock, in words.
_PUSH = "a push to the target"
#: A push of ours, as it is reported.
OWN_PUSH_DESCRIPTION = f"{_PUSH} of this process, which a hook of the repository may delay"
#: Seconds after which a push of ours is reported that has not ended.
_SLOW_PUSH = 10.0

#: Up to so many landings git finds the base of a merge faster than we can tell it.
_FEW = 200


@dataclass(frozen=True, slots=True)
class PreparedMerge:
    """A merge commit that waits for the target to move from `old` (None: it does not exist) to `new`."""

    old: str | None
    new: str


@dataclass(frozen=True, slots=True)
class Landed:
    """The work is on the target, by this commit of its first-parent line."""

    commit: str


@dataclass(frozen=True, slots=True)
class NothingToLand:
    """The target, at this commit, holds the same change already: there is nothing to land."""

    commit: str


@dataclass(frozen=True, slots=True)
class MergeConflict:
    """The work does not merge; `commit` holds both sides as parents and the marked files as its tree."""

    paths: tuple[str, ...]
    commit: str


@dataclass(frozen=True, slots=True)
class StaleTarget:
    """Somebody else moved the target first, or the push was killed: merge again."""


@dataclass(frozen=True, slots=True)
class DeferredLanding:
    """The target can't be moved now, for this reason; the work keeps."""

    reason: str


def combine_merges(merges: Iterable[PreparedMerge]) -> PreparedMerge:
    """Return the move over merges that follow each other."""
    first, *others = merges
    return PreparedMerge(first.old, [first, *others][-1].new)


class Target:
    """The branch that a run lands on."""

    def __init__(
        self,
        hub: Hub,
        git: Git,
        source: UpstreamRepository,
        repository: LocalRepository | None,
        *,
        branch: str,
        start: str,
        ref: str,
        must_exist: bool = False,
        title: str | None = None,
    ) -> None:
        """Take the branch of `source` (`repository` is None where that is a URL).

        `start` is the commit behind which landings are looked for, and what the target begins at where it does
        not exist; `ref` keeps what was fetched of it in the trusted repository. With `must_exist` it
        existed before the run, and is not created. `title` is the first line of merge
        commits, `Land <task>` if it is None.
        """
        self.branch = branch
        self._hub, self._git, self._source, self._repository = hub, git, source, repository
        self._scope = ownership_scope(source.location, branch)
        self._start, self._ref, self._title = start, ref, title
        self.known: str | None = None
        """The commit that the target was at when it was last looked at or moved; None if it does not exist."""
        self.must_exist = must_exist
        """Whether the target existed once: TargetGone where it does not exist now."""
        self._line: set[str] = set()
        """The commits of the target's first-parent line since the start."""
        self._trees: dict[str, str] = {}
        """The trees of merges that were made here."""
        self._contained: set[str] = set()
        self._unsettled: tuple[PreparedMerge, float] | None = None
        """A push that was refused or killed, with when it began, of which the leftovers could not be removed yet."""

    async def tip(self) -> str:
        """Return the commit that work which builds on the target starts from."""
        tip = await self._look()
        if tip is None:
            return self._start
        return tip if tip == self.known else await self._source.fetch(self.branch, f"{self._ref}-tip")

    async def refresh(self, *, again: bool = False) -> str:
        """Look where the target is and what has landed on it, all of it `again`; return the commit to merge onto."""
        tip = await self._look()
        if tip is None:
            self.known, self._line, self._contained = None, set(), {self._start}
            return self._start
        if again or tip != self.known:
            tip = await self._source.fetch(self.branch, self._ref)
            self.known = None if again else self.known
            await self._read_line(tip)
            self.known = tip
        return tip

    async def _look(self) -> str | None:
        """Return the commit that the target is at, None if it never existed; TargetGone if it was deleted."""
        tip = await self._source.tip(self.branch)
        self.must_exist = self.must_exist or self.known is not None or tip is not None
        if tip is None and self.must_exist:
            raise TargetMissing(self.branch, self.known)
        return tip

    async def _read_line(self, tip: str) -> None:
        known = self.known
        if known is None or not await self._git.is_ancestor(known, tip, may_be_missing=True):
            known, self._line, self._contained = self._start, set(), set()
        self._line.update((await self._git.line("rev-list", "--first-parent", f"{known}..{tip}")).split())
        self._contained.add(tip)

    def find_landing(self, intended: Iterable[str]) -> str | None:
        """Return the first of some merges that the target has, as of the last look; None if it has none of them."""
        return next((one for one in intended if one in self._line), None)

    async def contains(self, commit: str) -> bool:
        """Whether a commit is part of the target, as of the last look."""
        if self.known is None:
            return False
        return await self._git.is_ancestor(commit, self.known, may_be_missing=True)

    async def prepare(
        self,
        permit: MergePermit,
        label: str,
        commit: str,
        base: str,
        after: PreparedMerge | None = None,
        intended: Sequence[str] = (),
    ) -> PreparedMerge | Landed | NothingToLand | MergeConflict | DeferredLanding:
        """Merge `commit`, which was built on `base`, onto the target as it is now; move nothing.

        `intended` are the merges that were made of it before: Landed if the target has one. With `after`, it is merged
        onto that: the result is valid only if `after` has landed, too.
        """
        self._check(permit)
        onto, old = (await self.refresh(), self.known) if after is None else (after.new, after.new)
        if (landed := self.find_landing(intended)) is not None:
            return Landed(landed)
        ours = await self._above(base, onto, commit)
        tree, paths = await self._git.merge_tree(ours, commit)
        if paths:
            return await self._conflict(label, ours, onto, commit, paths)
        if tree == (self._trees.get(onto) or await self._git.line("rev-parse", f"{onto}^{{tree}}")):
            return NothingToLand(onto)
        if (folder := await find_embedded_repository(self._git, onto, tree)) is not None:
            return DeferredLanding(
                f"git would take {printable_name(folder)} for a repository of its own: check it, and merge it by hand"
            )
        title = self._title or f"Land {label.rpartition('/')[2]}"
        new = await self._commit(tree, onto, commit, f"{title}\n\n{TASK_TRAILER}: {label}\n")
        self._trees = {key: of for key, of in self._trees.items() if key == onto} | {new: tree}
        failpoint("landing.merged")
        merge = PreparedMerge(old, new)
        # Looked at before anything is intended: a push that must fail is not even begun, so that what a cut-off
        # landing finds changed later was not changed before.
        obstacle = await self.find_obstacle(merge)
        return merge if obstacle is None else DeferredLanding(obstacle)

    async def create_retry_base(self, merge: PreparedMerge, ref: str) -> str:
        """Return a commit with the merged tree, kept by `ref`, from which an agent can go on to mend the merge.

        Its first parent is what was merged onto; unlike the merge itself it says of no task that it has landed.
        """
        parents = await self._git.line("rev-parse", f"{merge.new}^1", f"{merge.new}^2")
        tree = await self._git.line("rev-parse", f"{merge.new}^{{tree}}")
        first, second = parents.split()
        return await self._restart(tree, first, second, ref)

    async def renew_retry_base(self, work: str, onto: str, ref: str) -> str | None:
        """Return what `restart` made on a newer commit of the target, kept by `ref`; None where the two conflict."""
        if await self._git.line("rev-parse", f"{work}^1") == onto:
            return work
        tree, paths = await self._git.merge_tree(onto, work)
        return None if paths else await self._restart(tree, onto, work, ref)

    async def _restart(self, tree: str, first: str, second: str, ref: str) -> str:
        commit = await self._commit(tree, first, second, "Merge for another attempt\n")
        await self._git("update-ref", ref, commit)
        return commit

    async def _conflict(self, label: str, ours: str, onto: str, commit: str, paths: tuple[str, ...]) -> MergeConflict:
        # Once more by names: git writes what it was given into the markers.
        names = f"refs/target/{self.branch}", f"refs/work/{label}"
        for name, value in zip(names, (ours, commit), strict=True):
            await self._git("update-ref", name, value)
        tree, _ = await self._git.merge_tree(*names)
        for name in names:
            await self._git("update-ref", "-d", name)
        message = f"{label.rpartition('/')[2]}: both sides of a conflict, marked\n"
        return MergeConflict(paths, await self._commit(tree, onto, commit, message))

    async def _above(self, base: str, onto: str, commit: str) -> str:
        """Return a commit with the tree of `onto` from which the merge base with `commit` is found at once.

        Git would walk all that has landed since, so that a run's merges would cost the square of its length; while
        that is little, it is faster than to find out what follows. Where `base` is part of the target, and nothing
        of what was built on it is, it is the merge base: a commit right above it says so. (`merge-tree
        --merge-base`, which would do the same, came with git 2.40.) Where something of it is, by a pull of the
        agent's or a merge of the user's, only git can tell.
        """
        if len(self._line) <= _FEW:
            return onto
        if base not in self._contained:
            if not await self._git.is_ancestor(base, onto):
                return onto
            self._contained.add(base)
        built = await self._git.line("rev-list", "--count", commit, f"^{base}")
        if built != await self._git.line("rev-list", "--count", commit, f"^{base}", f"^{onto}"):
            return onto
        return await self._git.line("commit-tree", f"{onto}^{{tree}}", "-p", base, input_=b"merge base\n")

    async def _commit(self, tree: str, first: str, second: str, message: str) -> str:
        return await self._git.line("commit-tree", tree, "-p", first, "-p", second, input_=message.encode())

    async def move(
        self, permit: MergePermit, merges: Sequence[PreparedMerge]
    ) -> Landed | StaleTarget | DeferredLanding:
        """Move the target over the merges, each prepared `after` the one before it, all or none of them.

        It is one push that holds only if nobody else moved the target. The push holds the landing's file lock, so that
        whoever lands next knows that none is under way, even if we are killed.
        """
        self._check(permit)
        try:
            async with self._landing_lock.hold(_PUSH_TIMEOUT, awaited=_PUSH) as lock:
                return await self._move(merges, lock.fd)
        except LockHeld as held:
            return DeferredLanding(str(_describe_busy_target(held)))

    async def _move(self, merges: Sequence[PreparedMerge], fd: int) -> Landed | StaleTarget | DeferredLanding:
        whole = combine_merges(merges)
        began, heads = time.time(), dict[Path, tuple[int, int]]()
        if self._repository is not None:
            heads = await anyio.to_thread.run_sync(read_head_stats, self._repository)
        with warn_if_slow(lambda: OWN_PUSH_DESCRIPTION, _SLOW_PUSH):
            pushed = await self._source.push(whole.new, self.branch, whole.old, (fd,))
        failpoint("landing.pushed")
        tip = whole.new if pushed.moved and self._repository is None else await self._source.tip(self.branch)
        if tip != whole.new and self._repository is not None:
            # The checkout was clean a moment ago: the leftovers of a push that was refused or killed are known by that.
            is_killed = pushed.was_killed
            await self._settle_checkouts(self._repository, whole, began, may_finish=False, was_killed=is_killed)
            tip = await self._source.tip(self.branch)
        if tip == whole.old:
            if (reason := await self.find_obstacle(whole)) is None and pushed.was_killed:
                return StaleTarget()
            return DeferredLanding(reason or f"the target could not be moved: {pushed.reason}")
        if tip != whole.new:
            await self.refresh()
            # Others may have moved it on from there at once.
            return StaleTarget() if self.find_landing([whole.new]) is None else Landed(whole.new)
        if self._repository is not None:
            if await anyio.to_thread.run_sync(
                find_locked_checkouts, self._repository, self.branch
            ):  # a hook was killed
                await self._settle_checkouts(self._repository, whole, began, may_finish=True)
            if whole.old is not None and not pushed.updated_checkout:
                await update_switched_checkout(
                    self._repository, self.branch, (whole.old, whole.new), heads, self._users_git()
                )
        self.known = whole.new
        new = {merge.new for merge in merges}
        self._contained |= new
        self._line |= new
        return Landed(whole.new)

    async def find_obstacle(self, merge: PreparedMerge) -> str | None:
        """Return what of the user's stands in the way where the target is checked out."""
        if self._unsettled is not None and (reason := await self._settle_again(*self._unsettled)) is not None:
            return reason
        checkout = await self._checkout()
        if checkout is None:
            return None
        assert self._repository is not None, "what is checked out is on this machine"
        if (found := await anyio.to_thread.run_sync(interrupted_landing, self._repository, self.branch)) is not None:
            return found  # of another run
        # First of all, because to look for changes runs them, too.
        git = self._users_git()
        configuration = await read_git_config(git, checkout)
        if (filter_ := await find_unsafe_filter(self._repository, checkout, configuration)) is not None:
            return ": ".join(filter_)
        if changed := await list_uncommitted_changes(checkout, git):
            return f"the target's checkout has changes of your own ({', '.join(changed[:3])}): commit or stash them"
        changes = await self._git.changes(merge.old or self._start, merge.new)
        paths = [one.path for one in changes]
        if (path := await find_path_controlling_git(self._repository, git, checkout, configuration, paths)) is not None:
            return (
                f"it changes {printable_name(path)}, which decides what your git runs: check it, and merge it by hand"
            )
        if in_way := await self._in_way(checkout, changes):
            return f"files that git does not track are in the way ({', '.join(in_way[:3])}): move or commit them"
        return await self._locked(checkout)

    async def _settle_again(self, merge: PreparedMerge, since: float) -> str | None:
        """Remove what a push left, as on a disk that was full; return why that can't be done now."""
        assert self._repository is not None, "what was to be settled is on this machine"
        try:
            async with self._landing_lock.hold(_PUSH_TIMEOUT, awaited=_PUSH):
                await self._settle_checkouts(self._repository, merge, since, may_finish=False)
        except LockHeld as held:
            return str(_describe_busy_target(held))
        return None

    async def _in_way(self, checkout: Path, changes: Sequence[FileChange]) -> list[str]:
        """Return the files of the checkout, ignored ones too, that git would delete or overwrite for what is added."""
        added = [one.path for one in changes if not int(one.old_mode, 8)]
        gone = {one.path for one in changes if not int(one.new_mode, 8)}
        files, folders = await anyio.to_thread.run_sync(_find_existing, checkout, added, gone)
        if folders:
            literal = [f":(literal){name}" for name in folders]
            listed = await self._users_git()("ls-files", "--others", "-z", "--", *literal, cwd=checkout)
            files += map(printable_name, split_nul(listed.stdout))
        return files

    async def _locked(self, checkout: Path) -> str | None:
        assert self._repository is not None, "what is checked out is on this machine"
        locks = await find_blocking_locks(self._repository, checkout, self.branch, self._users_git())
        if not locks:
            return None
        named = ", ".join(map(str, locks))
        return f"the target is locked by another git command of yours; if none is at work, remove {named}"

    async def clean_up(self, since: float) -> None:
        """Remove what pushes have left in the user's repository that were killed after `since` (wall-clock seconds)."""
        if self._repository is not None:
            await anyio.to_thread.run_sync(remove_incoming_objects, self._repository.git_dir, since)

    async def settle(
        self, permit: MergePermit, merge: PreparedMerge, intended: Sequence[str], since: float
    ) -> Landed | DeferredLanding | StaleTarget:
        """Finish or undo an interrupted move; Stale means that it did not happen and may be tried again.

        It happened if the target has one of the `intended` merges. RefusedError while the push is still running:
        whether it happens, and what has to be undone, is not known until it ends.
        """
        self._check(permit)
        if self._repository is not None:
            self._unsettled = merge, since
        try:
            async with self._landing_lock.hold(_PUSH_TIMEOUT, awaited=_PUSH):
                return await self._settle(merge, intended, since)
        except LockHeld as held:
            raise _describe_busy_target(held) from None

    async def _settle(
        self, merge: PreparedMerge, intended: Sequence[str], since: float
    ) -> Landed | DeferredLanding | StaleTarget:
        foreign: list[str] = []
        if self._repository is not None:
            foreign = await self._settle_checkouts(self._repository, merge, since, may_finish=True)
        await self.refresh(again=True)
        if (landed := self.find_landing(intended)) is not None:
            return Landed(landed)
        if foreign:
            return DeferredLanding(
                f"an interrupted landing left files that were changed since: {', '.join(foreign[:3])}"
            )
        return StaleTarget()

    async def _settle_checkouts(
        self,
        repository: LocalRepository,
        merge: PreparedMerge,
        since: float,
        *,
        may_finish: bool,
        was_killed: bool = True,
    ) -> list[str]:
        """Settle the checkout of the target, and those that a push may have left and that are at something else now."""
        self._unsettled = merge, since
        others = await anyio.to_thread.run_sync(find_locked_checkouts, repository, self.branch)
        others += await anyio.to_thread.run_sync(left_checkouts, repository, self.branch, since)
        foreign: list[str] = []
        for checkout in dict.fromkeys([await self._checkout(), *others]):
            move, git = (merge.old, merge.new), self._users_git()
            try:
                foreign += await recover_push(
                    repository, checkout, self.branch, move, since, git, may_finish=may_finish, was_killed=was_killed
                )
            except OSError as error:  # as on a full disk
                what = f"an interrupted landing can't be undone in {checkout}: {error}"
                raise RefusedError(what, "fix that: the next landing tries again") from None
        self._unsettled = None
        return foreign

    async def _checkout(self) -> Path | None:
        if self._repository is None:
            return None
        return await find_checkout(self._repository, self.branch, self._users_git())

    def _users_git(self) -> Git:
        return Git(None, as_user=True, keep_fds=self._git.keep_fds, environ=self._git.environ)

    @property
    def _landing_lock(self) -> FileLock:
        return self._hub.landing_lock(self._source.location, self.branch)

    def _check(self, permit: MergePermit) -> None:
        if permit.scope != self._scope:
            raise ValueError(f"this is no permit to land on {self.branch!r} of {self._source.location}")


def _describe_busy_target(held: LockHeld) -> RefusedError:
    return RefusedError(f"the target is being moved by {held.holder}", "if that is not running any more, end it")


def _find_existing(top: Path, added: Iterable[str], gone: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the files where something is to be, or where a folder of it is to be, and the folders. Blocks."""
    files: dict[str, None] = {}
    folders: list[str] = []
    parents = {str(parent) for name in added for parent in PurePosixPath(name).parents} - {".", *gone}
    for name in added:
        path = top / name
        if path.is_dir() and not path.is_symlink():
            folders.append(name)
        elif os.path.lexists(path):
            files[printable_name(name)] = None
    for name in sorted(parents):
        path = top / name
        if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
            files[printable_name(name)] = None
    return list(files), folders
