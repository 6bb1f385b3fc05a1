"""Land finished work: advance the target branch atomically, merge by merge.

`prepare` merges without a checkout, the caller records the intent, and `move` pushes one or several consecutive merges
in one push with a lease. `recover` finishes or undoes an interrupted move. Each requires a `HeldMergeLease`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.domain.runs.model import PreparedMerge
from orchestrator.domain.wording import join_names
from orchestrator.errors import GitError, LockHeld, RefusedError, TargetMissing
from orchestrator.locking.merge_lease import HeldMergeLease
from orchestrator.locking.ownership import ownership_scope
from orchestrator.repo.git.command import Git, printable_name
from orchestrator.repo.git.unsupported_files import find_embedded_repository
from orchestrator.repo.landing.interrupted_push import remove_incoming_objects
from orchestrator.repo.landing.merge_commits import commit_conflict, commit_merge, with_merge_base
from orchestrator.repo.landing.structural_merge import MergeDriver, merge_structurally
from orchestrator.repo.landing.target_checkouts import TargetCheckouts
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.repo.source.user_checkouts import read_head_stats
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.system.failpoints import failpoint
from orchestrator.system.file_lock import FileLock
from orchestrator.system.slow_waits import warn_if_slow

#: Shows users the task of a landing. Only recorded merges count as landed: anyone can write a trailer.
TASK_TRAILER = "Council-Task"

#: Seconds to wait for a running push to the target, whose process may have exited.
_PUSH_TIMEOUT = 30.0
#: The holder of the landing lock, for messages.
_PUSH = "a push to the target"
#: Our own push, for messages.
OWN_PUSH_DESCRIPTION = f"{_PUSH} of this process (a repository hook may be delaying it)"
#: Seconds after which our running push is reported as slow.
_SLOW_PUSH = 10.0

#: Git's message for commits without a common ancestor, and the reason and remedy shown for the task.
_UNRELATED = "unrelated histories"
_REWRITTEN = (
    "the history of {branch!r} was rewritten and has no commit in common with this work: restore it (the run started "
    "at {start:.12}), or cancel the task and apply its work, which `council salvage list` names"
)

#: Up to this many landings, git finds a merge base faster than we can construct one.
_MAX_WALKED_LANDINGS = 200


@dataclass(frozen=True, slots=True)
class Landed:
    """The work is on the target, as this commit of its first-parent history."""

    commit: str


@dataclass(frozen=True, slots=True)
class NothingToLand:
    """The target already contains the change at this commit."""

    commit: str


@dataclass(frozen=True, slots=True)
class MergeConflict:
    """The work conflicts; `commit` has both parents, and conflict markers."""

    paths: tuple[str, ...]
    commit: str


@dataclass(frozen=True, slots=True)
class StaleTarget:
    """Another process moved the target first, or the push was killed: merge again."""


@dataclass(frozen=True, slots=True)
class DeferredLanding:
    """The target can't be moved now, for this reason; the work is preserved."""

    reason: str


def combine_merges(merges: Iterable[PreparedMerge]) -> PreparedMerge:
    """Return a single move that spans consecutive merges."""
    first, *others = merges
    return PreparedMerge(old=first.old, new=[first, *others][-1].new)


class Target:
    """The branch that a run lands on."""

    def __init__(
        self,
        hub: Hub,
        git: Git,
        source: UpstreamRepository,
        *,
        branch: str,
        start: str,
        ref: str,
        title: str | None = None,
        drivers: Sequence[MergeDriver] = (),
    ) -> None:
        """Create the target `branch` of `source`.

        Landings are looked up after the commit `start`, which is also the first commit of a new target. `ref` stores
        the fetched target in the trusted repository. `title` is the first line of merges (default: `Land <task>`).
        `drivers` are tried if git can't merge a file.
        """
        self.branch = branch
        self._hub, self._git, self._source = hub, git, source
        self._checkouts = None if source.repository is None else TargetCheckouts(source.repository, branch, git)
        self._scope = ownership_scope(source.location, branch)
        self._start, self._ref, self._title, self._drivers = start, ref, title, drivers
        self.known: str | None = None
        """The target's commit when last read or moved; None if there is no target."""
        self.must_exist = False
        """Whether the target has existed, even before the run. If so, its absence raises TargetMissing."""
        self._line: set[str] = set()
        """The commits of the target's first-parent history since the start."""
        self._trees: dict[str, str] = {}
        """The trees of merges made here."""
        self._contained: set[str] = set()

    async def tip(self) -> str:
        """Return the commit that new work starts from."""
        tip = await self._read_tip()
        if tip is None:
            return self._start
        return tip if tip == self.known else await self._source.fetch(self.branch, f"{self._ref}-tip")

    async def refresh(self, *, again: bool = False) -> str:
        """Read the target, from scratch if `again`; return the commit to merge onto."""
        tip = await self._read_tip()
        if tip is None:
            self.known, self._line, self._contained = None, set(), {self._start}
            return self._start
        if again or tip != self.known:
            tip = await self._source.fetch(self.branch, self._ref)
            self.known = None if again else self.known
            await self._read_line(tip)
            self.known = tip
        return tip

    async def _read_tip(self) -> str | None:
        """Return the target's commit, or None if new. Raises TargetMissing if deleted."""
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
        """Return the first of these merges on the target (last refresh), or None."""
        return next((merge for merge in intended if merge in self._line), None)

    async def contains(self, commit: str) -> bool:
        """Return whether the target contains a commit as of the last refresh."""
        if self.known is None:
            return False
        return commit in self._line or await self._git.is_ancestor(commit, self.known, may_be_missing=True)

    async def prepare(
        self,
        lease: HeldMergeLease,
        label: str,
        commit: str,
        base: str,
        after: PreparedMerge | None = None,
        intended: Sequence[str] = (),
        *,
        resolve: bool = False,
    ) -> PreparedMerge | Landed | NothingToLand | MergeConflict | DeferredLanding:
        """Merge `commit`, built on `base`, onto the target without updating the target.

        `intended` are earlier merges of the same work: returns Landed if the target has one of them. With `after`,
        merges onto `after` instead; the result is valid only if `after` also lands. `resolve` allows structural merge
        drivers.
        """
        self._check(lease)
        onto, old = (await self.refresh(), self.known) if after is None else (after.new, after.new)
        if (landed := self.find_landing(intended)) is not None:
            return Landed(landed)
        ours = await self._merge_base_hint(base, onto, commit)
        try:
            tree, paths = await self._git.merge_tree(ours, commit)
        except GitError as error:
            if _UNRELATED not in error.stderr:
                raise
            return DeferredLanding(_REWRITTEN.format(branch=self.branch, start=self._start))
        resolved_by, how = tuple[str, ...](), ""
        if paths:
            drivers = self._drivers if resolve else ()
            if (merged := await merge_structurally(self._git, drivers, ours, commit)) is None:
                return await self.preserve_conflict(label, commit, base, onto)
            tree, resolved_by = merged.tree, merged.drivers
            how = f"Conflicts merged by {join_names(resolved_by)}: {join_names(paths)}\n\n"
        if tree == (self._trees.get(onto) or await self._git.line("rev-parse", f"{onto}^{{tree}}")):
            return NothingToLand(onto)
        if (folder := await find_embedded_repository(self._git, onto, tree)) is not None:
            return DeferredLanding(
                f"git would treat {printable_name(folder)} as a separate repository: review and merge it manually"
            )
        title = self._title or f"Land {label.rpartition('/')[2]}"
        new = await commit_merge(self._git, tree, onto, commit, f"{title}\n\n{how}{TASK_TRAILER}: {label}\n")
        self._trees = {merge: known for merge, known in self._trees.items() if merge == onto} | {new: tree}
        failpoint("landing.merged")
        merge = PreparedMerge(old=old, new=new, resolved_by=resolved_by)
        # Check before recording the intent, so that no push starts that is bound to fail: then any changed files that
        # recovery finds after an interrupted landing did not change before it.
        obstacle = await self.find_obstacle(merge)
        return merge if obstacle is None else DeferredLanding(obstacle)

    async def preserve_conflict(self, label: str, commit: str, base: str, onto: str) -> MergeConflict:
        """Return the conflict of `commit`, built on `base`, with `onto`, as git alone merges them."""
        ours = await self._merge_base_hint(base, onto, commit)
        _, paths = await self._git.merge_tree(ours, commit)
        return MergeConflict(paths, await commit_conflict(self._git, (self.branch, ours), (label, commit), onto))

    async def _merge_base_hint(self, base: str, onto: str, commit: str) -> str:
        """Return a commit to merge onto that gives git the merge base at once; see `with_merge_base`."""
        if len(self._line) <= _MAX_WALKED_LANDINGS:
            return onto
        if base not in self._contained:
            if not await self._git.is_ancestor(base, onto):
                return onto
            self._contained.add(base)
        return await with_merge_base(self._git, base, onto, commit)

    async def move(
        self, lease: HeldMergeLease, merges: Sequence[PreparedMerge]
    ) -> Landed | StaleTarget | DeferredLanding:
        """Advance the target over consecutive merges, all or none.

        Each merge was prepared `after` the previous one. This is a single push, which succeeds only if no other process
        has moved the target. The push holds the landing file lock, so that even if this process is killed, the next
        process to land knows whether a push is running.
        """
        self._check(lease)
        try:
            async with self._landing_lock.hold(_PUSH_TIMEOUT, awaited=_PUSH) as lock:
                return await self._move(merges, lock.fd)
        except LockHeld as held:
            return DeferredLanding(str(_describe_busy_target(held)))

    async def _move(self, merges: Sequence[PreparedMerge], fd: int) -> Landed | StaleTarget | DeferredLanding:
        whole, checkouts = combine_merges(merges), self._checkouts
        move = whole.old, whole.new
        began, heads = time.time(), dict[Path, tuple[int, int]]()
        if checkouts is not None:
            heads = await anyio.to_thread.run_sync(read_head_stats, checkouts.repository)
        with warn_if_slow(lambda: OWN_PUSH_DESCRIPTION, _SLOW_PUSH):
            pushed = await self._source.push(whole.new, self.branch, whole.old, (fd,))
        failpoint("landing.pushed")
        tip = whole.new if pushed.moved and checkouts is None else await self._source.tip(self.branch)
        if tip != whole.new and checkouts is not None:
            # The checkout was clean just before, so changes in it are leftovers of a refused or killed push.
            await checkouts.recover(move, began, may_finish=False, was_killed=pushed.was_killed)
            tip = await self._source.tip(self.branch)
        if tip == whole.old:
            if (reason := await self.find_obstacle(whole)) is None and pushed.was_killed:
                return StaleTarget()
            why = pushed.reason or "it was moved back immediately, possibly by a repository hook"
            return DeferredLanding(reason or f"can't move the target: {why}")
        if tip != whole.new:
            await self.refresh()
            # Another process may already have moved the target further.
            return StaleTarget() if self.find_landing([whole.new]) is None else Landed(whole.new)
        if checkouts is not None:
            await checkouts.complete(move, began, heads, updated_checkout=pushed.updated_checkout)
        self.known = whole.new
        new = {merge.new for merge in merges}
        self._contained |= new
        self._line |= new
        return Landed(whole.new)

    async def find_obstacle(self, merge: PreparedMerge) -> str | None:
        """Return the obstacle to landing in the user's checkout, with a remedy, or None."""
        checkouts = self._checkouts
        if checkouts is None:
            return None
        if checkouts.unrecovered is not None:  # leftovers of a push, for example after a full disk
            move, since = checkouts.unrecovered
            try:
                async with self._landing_lock.hold(_PUSH_TIMEOUT, awaited=_PUSH):
                    await checkouts.recover(move, since, may_finish=False)
            except LockHeld as held:
                return str(_describe_busy_target(held))
        return await checkouts.find_obstacle(merge.old or self._start, merge.new)

    async def clean_up(self, since: float) -> None:
        """Remove leftovers of pushes killed after `since` in the user's repository."""
        if self._checkouts is not None:
            await anyio.to_thread.run_sync(remove_incoming_objects, self._checkouts.repository.git_dir, since)

    async def recover(
        self, lease: HeldMergeLease, merge: PreparedMerge, intended: Sequence[str]
    ) -> Landed | DeferredLanding | StaleTarget:
        """Finish or undo an interrupted move; StaleTarget means that it may be retried.

        The move happened if the target has one of the `intended` merges. Raises RefusedError while the push is running,
        because its result is still unknown.
        """
        self._check(lease)
        if self._checkouts is not None:
            self._checkouts.unrecovered = (merge.old, merge.new), merge.recorded
        try:
            async with self._landing_lock.hold(_PUSH_TIMEOUT, awaited=_PUSH):
                return await self._recover(merge, intended)
        except LockHeld as held:
            raise _describe_busy_target(held) from None

    async def _recover(self, merge: PreparedMerge, intended: Sequence[str]) -> Landed | DeferredLanding | StaleTarget:
        foreign: list[str] = []
        if self._checkouts is not None:
            foreign = await self._checkouts.recover((merge.old, merge.new), merge.recorded, may_finish=True)
        await self.refresh(again=True)
        if (landed := self.find_landing(intended)) is not None:
            return Landed(landed)
        if foreign:
            return DeferredLanding(f"files changed since an interrupted landing: {', '.join(foreign[:3])}")
        return StaleTarget()

    @property
    def _landing_lock(self) -> FileLock:
        return self._hub.landing_lock(self._source.location, self.branch)

    def _check(self, lease: HeldMergeLease) -> None:
        if lease.scope != self._scope:
            raise ValueError(f"the lease is not for {self.branch!r} of {self._source.location}")


def _describe_busy_target(held: LockHeld) -> RefusedError:
    return RefusedError(f"{held.holder} is moving the target", "wait for it, or kill it if it hangs")
