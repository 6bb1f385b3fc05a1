"""Import an agent's commits into the hub, all or none, after inspecting them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.errors import GitError, is_resource_exhaustion
from orchestrator.repo.git.command import (
    MISSING_MODE,
    FileChange,
    Git,
    is_object_id,
    parse_raw_diff,
    printable_name,
    split_nul,
)
from orchestrator.repo.intake.inspection import IntakeRules, find_rejected_paths
from orchestrator.repo.intake.quarantine import Quarantine
from orchestrator.repo.worktrees.files.file_trees import is_folder
from orchestrator.repo.worktrees.worktrees import Worktree

_MAX_COMMITS = 10_000
_LIMIT = 120.0  # seconds
_NULL_ID = "0" * 40


@dataclass(frozen=True, slots=True)
class SessionCommits:
    """Reads the commits that a session created from `base`."""

    git: Git
    worktree: Worktree
    base: str
    rules: IntakeRules

    async def resolve_commit(self, name: str) -> str | None:
        """Return the commit that a session's object is or points to, or None."""
        done = await self._run_on_session_objects(
            "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", ok=(0, 1, 128)
        )
        return done or None

    async def is_unreachable_from(self, commit: str, *known: str) -> bool:
        """Return whether a commit is unreachable from the `known` ones. Raises GitError."""
        return bool(
            await self._run_on_session_objects(
                "rev-list", "--max-count=1", commit, *(f"^{ancestor}" for ancestor in known)
            )
        )

    async def import_commits(self, tip: str, *known: str, descends: bool = False) -> str | None:
        """Import the commits of `tip` beyond `known`; return the reason for a failure.

        With `descends`, the commits must descend from the base.
        """
        quarantine = Quarantine(self.worktree.import_folder / "history", self.worktree.hub.objects)
        await anyio.to_thread.run_sync(quarantine.empty)
        try:
            if refused := await self._find_size_violation(tip, known):
                return refused
            await self._pack(quarantine, tip, known)
            git = self._confined_git(quarantine)
            if descends:
                await git("merge-base", "--is-ancestor", self.base, tip, env=quarantine.read_env)
            rejected = await self._inspect(quarantine, tip, known)
        except GitError as error:
            if is_resource_exhaustion(error):
                raise
            return f"they are unreadable or do not descend from its base ({error.stderr or 'exit 1'})"
        if rejected:
            return "; ".join(f"{printable_name(path)!r}: {reason}" for path, reason in sorted(rejected.items())[:5])
        await anyio.to_thread.run_sync(quarantine.admit_packs)
        return None

    def _confined_git(self, quarantine: Quarantine) -> Git:
        """Return git for the quarantine, without access to the session's objects."""
        return self.git.confined(readable=(self.worktree.hub.objects,), writable=(quarantine.objects,))

    @property
    def _packed(self) -> Path:
        return self.worktree.import_folder / "packed"

    @property
    def _view(self) -> Path:
        return self.worktree.import_folder / "theirs"

    async def open(self) -> None:
        """Link the session's objects. Must be called before any other method."""

        def link() -> None:
            link_session_objects(self.worktree.git_dir, self._view)
            (self._packed / "pack").mkdir(mode=0o700, parents=True, exist_ok=True)

        await anyio.to_thread.run_sync(link)

    async def _run_on_session_objects(self, *args: str, ok: tuple[int, ...] = (0,), input_: bytes | None = None) -> str:
        known = self.worktree.hub.objects
        env = {
            "GIT_OBJECT_DIRECTORY": str(self._packed),
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": os.pathsep.join(map(str, (known, self._view))),
        }
        readable = (known, self.worktree.git_dir, self._view)
        git = self.git.confined(readable=readable, writable=(self._packed,))
        return (await git(*args, env=env, ok=ok, limit=_LIMIT, input_=input_)).stdout.decode().rstrip("\n")

    async def _find_size_violation(self, tip: str, known: tuple[str, ...]) -> str | None:
        """Check counts and sizes before copying anything."""
        excluded = [f"^{commit}" for commit in known]
        counted = await self._run_on_session_objects(
            "rev-list", "--count", f"--max-count={_MAX_COMMITS + 1}", tip, *excluded
        )
        if int(counted) > _MAX_COMMITS:
            return f"there are more than {_MAX_COMMITS} commits"
        options = ("--objects", "--no-object-names", "--filter-print-omitted")
        limit = f"--filter=blob:limit={self.rules.max_file + 1}"
        listed = await self._run_on_session_objects("rev-list", *options, limit, tip, *excluded)
        if "~" in listed:
            return f"a file in them has more than {self.rules.max_file} bytes"
        return None

    async def _pack(self, quarantine: Quarantine, tip: str, known: tuple[str, ...]) -> None:
        revisions = "".join((f"{tip}\n", *(f"^{commit}\n" for commit in known)))
        name = await self._run_on_session_objects(
            "pack-objects", "--quiet", "--revs", str(self._packed / "pack"), input_=revisions.encode()
        )
        pack = quarantine.objects / "pack" / f"pack-{name}.pack"
        # Copied, because the packing process can't write to the copy. Its output is not trusted either.
        if not is_object_id(name):
            raise GitError(["pack-objects"], 0, "it printed no pack name")
        await anyio.to_thread.run_sync(shutil.copyfile, self._packed / pack.name, pack)
        # Hashes all objects again and follows every reference.
        await self._confined_git(quarantine)(
            "index-pack", "--strict", str(pack), env=quarantine.write_env, limit=_LIMIT
        )

    async def _inspect(self, quarantine: Quarantine, tip: str, known: tuple[str, ...]) -> dict[str, str]:
        env, git = quarantine.read_env, self._confined_git(quarantine)
        commits = (await git("rev-list", tip, *(f"^{commit}" for commit in known), env=env)).stdout
        # Include folders (-t): the name of an empty folder does not occur in a file's path.
        raw = await git("diff-tree", "--stdin", "--raw", "-r", "-t", "-z", "-m", "--root", "--no-renames",
                             "--no-commit-id", env=env, input_=commits, limit=_LIMIT)  # fmt: skip
        before = await self._base_files()
        changes = {
            FileChange(file.path, file.old_mode, file.new_mode, before.get(file.path, _NULL_ID), file.new_id)
            for file in parse_raw_diff(raw.stdout)
        }
        # Commit messages and authors are also imported.
        messages = [
            FileChange(f"commit {name}", MISSING_MODE, "100644", _NULL_ID, name) for name in commits.decode().split()
        ]
        return await find_rejected_paths(git, [*changes, *messages], self.rules, env)

    async def _base_files(self) -> dict[str, str]:
        listed = await self.git("ls-tree", "-r", "-z", self.base)
        rows = (row.partition("\t") for row in split_nul(listed.stdout))
        return {path: meta.split(" ")[2] for meta, _, path in rows}


def link_session_objects(git_dir: Path, view: Path) -> None:
    """Create a folder that gives git access to a session's objects only. Blocks.

    Alternates, which could name any folder of the machine, and pipes, on which git would block, are excluded.
    """
    shutil.rmtree(view, ignore_errors=True)
    view.mkdir(mode=0o700, parents=True)
    objects = git_dir / "objects"
    if git_dir.is_symlink() or not is_folder(objects):
        return
    for folder in objects.iterdir():
        if folder.name != "info" and is_folder(folder):
            with os.scandir(folder) as entries:
                files = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
            if all(files.values()):
                (view / folder.name).symlink_to(folder)
                continue
            (view / folder.name).mkdir()
            for name in (name for name, is_file in files.items() if is_file):
                (view / folder.name / name).symlink_to(folder / name)
