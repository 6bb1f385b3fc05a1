"""Our own repositories, outside the user's tree: one hub per user repository.

    <home>/<name>-<digest>/
      hub.git/       objects, which sessions borrow read-only
      trusted.git/   our configuration, refs and index files; its objects are the hub's
      session.git/   the template of each session's git directory
      sessions/      one folder for each attempt
      indexes/       our index of each attempt's checkout, and its quarantine, one folder for each attempt
      slots/         worktree slots: checkouts that attempts reuse
      trash/         folders that wait for deletion
      locks/         permanent lock files
      origin.json    the repository and the stores that the hub is for (`repo.worktrees.origin`)

None of our git commands uses configuration, hooks or attributes that an agent could have written: we never run git in a
session's git directory, and agents are given no path to the trusted repository. Git commands that read an agent's files
or objects run in a sandbox (`Git.confined`), so that these can't make git do anything else. Agents' commits are
imported as verified objects (`repo.intake.collect`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.scheduling.claims import OrchestratorIdentity
from orchestrator.errors import RefusedError, to_unusable_error
from orchestrator.project import council_home
from orchestrator.repo.git.command import IDENTITY, TRUSTED_NAME, Git
from orchestrator.repo.worktrees import origin
from orchestrator.repo.worktrees.files.file_trees import remove_all
from orchestrator.system.file_lock import FileLock, is_held

#: The ref namespace in the trusted repository for fetched commits of each run.
INTERNAL_REFS = "refs/council"


@dataclass(frozen=True, slots=True)
class LivenessLocks:
    """The locks of a hub's orchestrators, held by the process and its git commands."""

    folder: Path

    def of(self, run: str, orchestrator: str) -> FileLock:
        """Return the lock of an orchestrator of a run."""
        return FileLock(self.folder / f"run-{run}.{orchestrator}")

    async def is_dead(self, run: str, owner: OrchestratorIdentity) -> bool:
        """Return whether an orchestrator and all of its git commands are proven dead."""
        lock = self.of(run, owner.id)
        # Without a lock file, the orchestrator is on another machine, which may have the same name.
        return await anyio.Path(lock.path).exists() and not await lock.is_held()

    async def held(self, run: str) -> list[FileLock]:
        """Return the held locks of a run's orchestrators."""
        return [FileLock(path) for path in await anyio.to_thread.run_sync(self._held, run)]

    async def list_alive(self, run: str) -> frozenset[str]:
        """Return a run's orchestrators on this machine that are alive or running git."""
        paths = await anyio.to_thread.run_sync(self._held, run)
        return frozenset(path.name.removeprefix(f"run-{run}.") for path in paths)

    async def list_known(self, run: str) -> set[str]:
        """Return a run's orchestrators that have ever run on this machine, unless the locks were deleted."""
        paths = await anyio.to_thread.run_sync(self._all, run)
        return {path.name.removeprefix(f"run-{run}.") for path in paths}

    def _all(self, run: str) -> list[Path]:
        return sorted(self.folder.glob(f"run-{run}.*"))

    def _held(self, run: str) -> list[Path]:
        return [path for path in self._all(run) if is_held(path)]


@dataclass(frozen=True, slots=True)
class Hub:
    """The paths of a repository's hub."""

    root: Path

    @property
    def objects(self) -> Path:
        """The objects that sessions borrow."""
        return self.root / "hub.git" / "objects"

    @property
    def trusted(self) -> Path:
        """The repository in which our git commands run."""
        return self.root / TRUSTED_NAME

    @property
    def session_template(self) -> Path:
        """The template that each session's git directory is copied from."""
        return self.root / "session.git"

    @property
    def sessions(self) -> Path:
        """The session folders, one per run and attempt."""
        return self.root / "sessions"

    @property
    def indexes(self) -> Path:
        """The folders with our index of each attempt's checkout, hidden from sessions."""
        return self.root / "indexes"

    @property
    def slots(self) -> Path:
        """The worktree slots (`repo.worktrees.slots`)."""
        return self.root / "slots"

    @property
    def trash(self) -> Path:
        """Folders that wait for deletion."""
        return self.root / "trash"

    @property
    def staging_root(self) -> Path:
        """The hub's temporary path, so that a hub is complete or absent."""
        return self.root.with_name(f"{self.root.name}.new")

    @property
    def creation_lock(self) -> FileLock:
        """The lock for creating and removing the hub, next to its folder."""
        return FileLock(self.root.with_name(f"{self.root.name}.lock"))

    def lock(self, name: str) -> FileLock:
        """Return the permanent lock file with that name."""
        return FileLock(self.root / "locks" / name)

    def landing_lock(self, source: str, target: str) -> FileLock:
        """Return the lock that serializes landings on a branch."""
        digest = hashlib.sha256(f"{source}\0{target}".encode()).hexdigest()[:16]
        return self.lock(f"landing-{digest}")

    def run_lock(self, run: str) -> FileLock:
        """Return the lock of a run's leader."""
        return self.lock(f"run-{run}")

    @property
    def liveness_locks(self) -> LivenessLocks:
        """The liveness locks of the orchestrators on this machine that use the hub."""
        return LivenessLocks(self.root / "locks")


def is_inside_hub(hub: Hub, path: Path) -> bool:
    """Return whether no link in `path` leads out of the hub. Blocks."""
    return path.parent.resolve().is_relative_to(hub.root.resolve())


def locate_hub(source: str, home: Path) -> Hub:
    """Return the hub for a repository path or URL. The hub need not exist yet."""
    last = source.rstrip("/").removesuffix("/.git").removesuffix(".git").rsplit("/", 1)[-1]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last)[:40] or "repo"
    return Hub(home / f"{name}-{hashlib.sha256(source.encode(errors='surrogateescape')).hexdigest()[:12]}")


def find_hub(run: RunDocument, environ: Mapping[str, str]) -> Hub:
    """Return the hub of a run on this machine. It need not exist, if another machine has created the run."""
    return locate_hub(run.repo, council_home(environ)) if run.hub is None else Hub(Path(run.hub))


async def create_hub(
    hub: Hub, object_format: str, environ: Mapping[str, str], user: origin.HubUser | None = None
) -> None:
    """Create the hub atomically unless it exists.

    Records `user`, so that an unused hub can be detected later.
    """
    remedy = "set COUNCIL_HOME to another folder"
    if any(char in str(hub.root) for char in '\n":'):  # git can't quote these in its alternates files
        raise RefusedError(f"{str(hub.root)!r} can't contain git repositories", remedy)
    parent = hub.root.parent
    try:
        await anyio.to_thread.run_sync(lambda: parent.mkdir(mode=0o700, parents=True, exist_ok=True))
    except OSError as error:
        raise to_unusable_error(error, f"can't create {parent}", remedy) from None
    async with hub.creation_lock.hold():
        if not hub.root.exists():
            await _build(hub, object_format, environ)
        await anyio.to_thread.run_sync(create_folders, hub.root)
        if user is not None:
            await anyio.to_thread.run_sync(origin.record_user, hub.root, user)


async def _build(hub: Hub, object_format: str, environ: Mapping[str, str]) -> None:
    building = hub.staging_root
    await remove_all([building], environ)
    building.mkdir(mode=0o700)
    for name in ("hub.git", "trusted.git", "session.git"):
        git = Git(building / name, environ=environ)
        await git("init", "--quiet", "--bare", "--template=", f"--object-format={object_format}", cwd=building)
    _configure(building, hub)
    building.rename(hub.root)


def _configure(building: Path, hub: Hub) -> None:
    create_folders(building)
    shutil.rmtree(building / "trusted.git" / "objects")
    (building / "trusted.git" / "objects").symlink_to(Path("..", "hub.git", "objects"))
    # A commit recorded as queued must survive a power failure.
    _add_settings(building / "trusted.git", "core", fsync="committed,reference", fsyncMethod="batch")
    _add_settings(building / "session.git", "core", bare="false")
    _add_settings(building / "session.git", "user", name=IDENTITY[0], email=IDENTITY[1])
    _add_settings(building / "session.git", "gc", auto="0")
    alternates = building / "session.git" / "objects" / "info" / "alternates"
    alternates.parent.mkdir(exist_ok=True)
    alternates.write_text(f"{hub.objects}\n")


def create_folders(root: Path) -> None:
    """Create the folders of a hub that are missing, perhaps because the user has removed them. Blocks."""
    for name in ("sessions", "indexes", "slots", "trash", "locks"):
        try:
            (root / name).mkdir(mode=0o700, exist_ok=True)
        except FileExistsError as error:  # as the first access below it would fail
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from None


def _add_settings(git_dir: Path, section: str, **settings: str) -> None:
    with (git_dir / "config").open("a", encoding="utf-8") as config:
        config.writelines([f"[{section}]\n", *(f'\t{name} = "{value}"\n' for name, value in settings.items())])


def internal_ref_name(run: str, name: str) -> str:
    """Return the trusted repository's ref for a commit that a run has fetched."""
    return f"{INTERNAL_REFS}/{run}/{name}"


def pull_request_branch_name(run: str, task: str) -> str:
    """Return the branch of a task's pull request on the forge."""
    return f"council/{run}/{task}"


def work_branch_name(run: str, task: str, part: int | str) -> str:
    """Return the branch of a task's work; `part` is the attempt or `conflict`."""
    return f"council/{run}/{task}/{part}"
