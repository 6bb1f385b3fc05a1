"""Find obstacles to a landing in the user's checkouts, and repair these afterwards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

import anyio.to_thread

from orchestrator.domain.wording import join_names
from orchestrator.errors import RefusedError
from orchestrator.repo.git.command import (
    MISSING_MODE,
    FileChange,
    Git,
    join_nul,
    parse_raw_diff,
    printable_name,
    split_nul,
)
from orchestrator.repo.landing.interrupted_push import (
    find_blocking_locks,
    recover_push,
    release_pack,
    update_switched_checkout,
)
from orchestrator.repo.landing.merge_commits import temporary_folder
from orchestrator.repo.source.user_checkouts import (
    LocalRepository,
    describe_interrupted_landing,
    describe_unfinished_operation,
    find_checkout,
    find_locked_checkouts,
    find_switched_checkouts,
    list_left_out,
    list_uncommitted_changes,
)
from orchestrator.repo.source.user_programs import find_path_controlling_git, find_unsafe_filter, read_git_config
from orchestrator.repo.worktrees.files.file_trees import is_folder

#: The tags of `git ls-files -v` for paths whose changes git does not report, with the options that end this.
_HIDING_FLAGS: Final = {
    "h": ("--no-assume-unchanged",),
    "S": ("--no-skip-worktree",),
    "s": ("--no-assume-unchanged", "--no-skip-worktree"),
}


@dataclass(slots=True)
class TargetCheckouts:
    """The checkouts of a branch; `trusted` runs git in the trusted repository."""

    repository: LocalRepository
    branch: str
    trusted: Git
    users: Git = field(init=False)
    """Git with the user's configuration."""
    unrecovered: tuple[tuple[str | None, str], float] | None = field(default=None, init=False)
    """A refused or killed push whose leftovers remain: its commits (old, new) and start time."""

    def __post_init__(self) -> None:
        self.users = Git(None, as_user=True, keep_fds=self.trusted.keep_fds, environ=self.trusted.environ)

    async def find_obstacle(self, old: str, new: str) -> str | None:
        """Return the obstacle to moving the branch, with a remedy, or None."""
        reason = await anyio.to_thread.run_sync(describe_unfinished_operation, self.repository, self.branch)
        if reason is not None:
            return reason
        if (checkout := await find_checkout(self.repository, self.branch, self.users)) is None:
            return None
        return await self._find_obstacle_in(checkout, old, new)

    async def _find_obstacle_in(self, checkout: Path, old: str, new: str) -> str | None:
        obstacle = await anyio.to_thread.run_sync(describe_interrupted_landing, self.repository, self.branch)
        if obstacle is not None:
            return obstacle  # another run's
        # Check filters first, because detecting changes runs them.
        configuration = await read_git_config(self.users, checkout)
        if (unsafe := await find_unsafe_filter(self.repository, checkout, configuration)) is not None:
            return ": ".join(unsafe)
        if changed := await list_uncommitted_changes(checkout, self.users):
            return f"the target's checkout has uncommitted changes ({', '.join(changed[:3])}): commit or stash them"
        changes = await self.trusted.changes(old, new)
        paths = [change.path for change in changes]
        path = await find_path_controlling_git(self.repository, self.users, checkout, configuration, paths)
        if path is not None:
            message = f"it changes {printable_name(path)}, which controls the programs that your git runs"
            return f"{message}: review and merge it manually"
        if (hidden := await self._describe_hidden_changes(checkout, set(paths))) is not None:
            return hidden
        if in_way := await self._find_files_in_way(checkout, changes):
            return f"untracked files would be overwritten ({', '.join(in_way[:3])}): move or commit them"
        if not (locks := await find_blocking_locks(self.repository, checkout, self.branch, self.users)):
            return None
        named = ", ".join(map(str, locks))
        return f"another of your git commands has locked the target: if none is running, remove {named}"

    async def _describe_hidden_changes(self, checkout: Path, paths: Collection[str]) -> str | None:
        """Return changes at these paths that flags in the index hide, with a remedy, or None.

        A push never succeeds if such a file was edited, and restores one that was removed.
        """
        listed = split_nul((await self.users("ls-files", "-v", "-z", cwd=checkout)).stdout)
        tags = {entry[2:]: entry[0] for entry in listed if entry[0] in _HIDING_FLAGS and entry[2:] in paths}
        if not tags:
            return None
        options = sorted({option for tag in tags.values() for option in _HIDING_FLAGS[tag]})
        index = await self.users("rev-parse", "--git-path", "index", cwd=checkout)
        with temporary_folder(self.trusted) as folder:
            env = {"GIT_INDEX_FILE": f"{folder}/index"}
            source = checkout / os.fsdecode(index.stdout).rstrip("\n")
            await anyio.to_thread.run_sync(shutil.copy2, source, env["GIT_INDEX_FILE"])
            for option in options:  # git would apply only the first of several
                await self.users("update-index", option, "-z", "--stdin", cwd=checkout, env=env, input_=join_nul(tags))
            arguments = ("diff-files", "--raw", "-z", "--no-renames", "--ignore-submodules=all")
            found = await self.users(*arguments, cwd=checkout, env=env)
        changed = [change for change in parse_raw_diff(found.stdout) if change.path in tags]
        left_out = await list_left_out(checkout, self.users)
        changed = [one for one in changed if one.path not in left_out or one.new_mode != MISSING_MODE]
        if not changed:
            return None
        names = join_names([printable_name(change.path) for change in changed], 3)
        commands = " and ".join(f"`git update-index {option} PATH`" for option in options)
        message = f"the target's checkout has changes that git is set to ignore ({names})"
        return f"{message}: run {commands} for each, then commit or stash them"

    async def _find_files_in_way(self, checkout: Path, changes: Sequence[FileChange]) -> list[str]:
        """Return untracked or ignored files that git would delete or overwrite."""
        added = [change.path for change in changes if not int(change.old_mode, 8)]
        removed = {change.path for change in changes if not int(change.new_mode, 8)}
        files, folders = await anyio.to_thread.run_sync(_find_existing, checkout, added, removed)
        if folders:
            literal = [f":(literal){name}" for name in folders]
            listed = await self.users("ls-files", "--others", "-z", "--", *literal, cwd=checkout)
            files += map(printable_name, split_nul(listed.stdout))
        return files

    async def recover(
        self, move: tuple[str | None, str], since: float, *, may_finish: bool, was_killed: bool = True
    ) -> list[str]:
        """Run `recover_push` in each checkout that may have leftovers of a push.

        Returns the paths that have changed since.
        """
        self.unrecovered = move, since
        locked = await anyio.to_thread.run_sync(find_locked_checkouts, self.repository, self.branch)
        switched = await anyio.to_thread.run_sync(find_switched_checkouts, self.repository, self.branch, since)
        foreign: list[str] = []
        current = await find_checkout(self.repository, self.branch, self.users)
        for checkout in dict.fromkeys([current, *locked, *switched]):
            try:
                foreign += await recover_push(
                    self.repository, checkout, self.branch, move, since, self.users, may_finish=may_finish,
                    was_killed=was_killed,
                )  # fmt: skip
            except OSError as error:  # as on a full disk
                message = f"can't undo an interrupted landing in {checkout}: {error}"
                raise RefusedError(message, "fix the cause: the next landing tries again") from None
        await release_pack(self.repository, move[1], self.users)  # not before: the recovery needs its objects
        self.unrecovered = None
        return foreign

    async def complete(
        self, move: tuple[str | None, str], since: float, heads: dict[Path, tuple[int, int]], *, updated_checkout: bool
    ) -> None:
        """Complete a push that has moved the branch; `heads` precede the push."""
        if await anyio.to_thread.run_sync(find_locked_checkouts, self.repository, self.branch):  # a hook was killed
            await self.recover(move, since, may_finish=True)
        else:
            await release_pack(self.repository, move[1], self.users)
        old, new = move
        if old is not None and not updated_checkout:
            await update_switched_checkout(self.repository, self.branch, (old, new), heads, self.users)


def _find_existing(top: Path, added: Sequence[str], removed: Collection[str]) -> tuple[list[str], list[str]]:
    """Return files at or above added paths, and folders at these paths. Blocks."""
    files: dict[str, None] = {}
    folders: list[str] = []
    containing = {name.rpartition("/")[0] for name in added}
    existing = {folder for folder in containing if not folder or is_folder(top / folder)}
    for name in added:
        if name.rpartition("/")[0] not in existing:  # so that a large new folder costs no call for each of its files
            continue
        path = top / name
        if is_folder(path):
            folders.append(name)
        elif os.path.lexists(path):
            files[printable_name(name)] = None
    paths = [PurePosixPath(folder) for folder in containing]
    parents = {str(parent) for path in paths for parent in (path, *path.parents)} - {".", *removed}
    for name in sorted(parents):
        path = top / name
        if os.path.lexists(path) and not is_folder(path):
            files[printable_name(name)] = None
    return list(files), folders
