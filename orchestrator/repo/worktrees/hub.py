"""The repositories of our own, outside the user's tree: one set for each repository that is worked on.

    <home>/<name>-<digest>/
      hub.git/       objects, which sessions borrow from (read only for them)
      trusted.git/   configuration, refs and index files of our own; its objects are the hub's
      session.git/   what each session's own git directory starts as a copy of
      sessions/      what each attempt has to itself, one folder an attempt
      indexes/       our own index of each attempt's checkout, and what waits to be admitted, one folder an attempt
      places/        checkouts that attempts take turns in
      trash/         folders that are being deleted
      locks/         permanent lock files
      origin.json    whom it is for (`repo.worktrees.origin`)

No git command of ours uses a configuration, hook or attribute that an agent could have written: each session has a
git directory to itself, which we never run git in, and the one we do run it in is not named in anything that an agent
is given. Git that looks at files or objects of an agent's runs in a sandbox (`Git.confined`), so that whatever it finds
there can't make it do anything else. What agents commit comes in as verified objects (`repo.intake.collect`).
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.errors import RefusedError, to_unusable_error
from orchestrator.locking.liveness import LivenessLocks
from orchestrator.repo.git.command import IDENTITY, Git
from orchestrator.repo.worktrees import origin
from orchestrator.repo.worktrees.removal import remove_all
from orchestrator.system.file_lock import FileLock

#: Where the trusted repository keeps what each run has fetched.
INTERNAL_REFS = "refs/council"


@dataclass(frozen=True, slots=True)
class Hub:
    """Where everything of one repository lives."""

    root: Path

    @property
    def objects(self) -> Path:
        """The objects that sessions borrow."""
        return self.root / "hub.git" / "objects"

    @property
    def trusted(self) -> Path:
        """The repository that our git commands run in."""
        return self.root / "trusted.git"

    @property
    def seed(self) -> Path:
        """What a session's git directory is copied from."""
        return self.root / "session.git"

    @property
    def sessions(self) -> Path:
        """One folder for each run, in it one for each attempt."""
        return self.root / "sessions"

    @property
    def indexes(self) -> Path:
        """One folder for each attempt, with our own index of its checkout; no session sees it."""
        return self.root / "indexes"

    @property
    def places(self) -> Path:
        """The checkouts that sessions take turns in (`repo.worktrees.slots`)."""
        return self.root / "places"

    @property
    def trash(self) -> Path:
        """Folders that wait for their deletion."""
        return self.root / "trash"

    @property
    def unfinished(self) -> Path:
        """Where it is while it is being made or removed, so that there is a whole one or none."""
        return self.root.with_name(f"{self.root.name}.new")

    @property
    def creation_lock(self) -> FileLock:
        """The lock, beside it, under which it is made and removed."""
        return FileLock(self.root.with_name(f"{self.root.name}.lock"))

    def lock(self, name: str) -> FileLock:
        """Return the permanent lock of that name."""
        return FileLock(self.root / "locks" / name)

    def landing_lock(self, source: str, target: str) -> FileLock:
        """Return the lock that serializes landings on one branch of one repository."""
        digest = hashlib.sha256(f"{source}\0{target}".encode()).hexdigest()[:16]
        return self.lock(f"landing-{digest}")

    def run_lock(self, run: str) -> FileLock:
        """Return the lock of a run's leader."""
        return self.lock(f"run-{run}")

    @property
    def liveness_locks(self) -> LivenessLocks:
        """The locks of the orchestrators of this machine that work with it."""
        return LivenessLocks(self.root / "locks")


def is_inside_hub(hub: Hub, place: Path) -> bool:
    """Whether no link leads from a hub to where something of it lies: behind one may be files of the user's. Blocks."""
    return place.parent.resolve().is_relative_to(hub.root.resolve())


def locate_hub(source: str, home: Path) -> Hub:
    """Return the hub of a repository, by its path or URL; it need not exist yet."""
    last = source.rstrip("/").removesuffix("/.git").removesuffix(".git").rsplit("/", 1)[-1]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last)[:40] or "repo"
    return Hub(home / f"{name}-{hashlib.sha256(source.encode(errors='surrogateescape')).hexdigest()[:12]}")


async def create_hub(
    hub: Hub, object_format: str, environ: Mapping[str, str], user: origin.HubUser | None = None
) -> None:
    """Make the hub if it is not there; all at once, so that a crash leaves none or a whole one.

    It remembers `user`, so that it can be told later whether anybody is left who needs it.
    """
    remedy = "set COUNCIL_HOME to another folder"
    if any(char in str(hub.root) for char in '\n":'):  # git's lists of object folders know no way to write them
        raise RefusedError(f"{str(hub.root)!r} can't hold repositories", remedy)
    parent = hub.root.parent
    try:
        await anyio.to_thread.run_sync(lambda: parent.mkdir(mode=0o700, parents=True, exist_ok=True))
    except OSError as error:
        raise to_unusable_error(error, f"{parent} can't be made", remedy) from None
    async with hub.creation_lock.hold():
        if not hub.root.exists():
            await _build(hub, object_format, environ)
        if user is not None:
            await anyio.to_thread.run_sync(origin.record_user, hub.root, user)


async def _build(hub: Hub, object_format: str, environ: Mapping[str, str]) -> None:
    building = hub.unfinished
    await remove_all([building], environ)
    building.mkdir(mode=0o700)
    for name in ("hub.git", "trusted.git", "session.git"):
        git = Git(building / name, environ=environ)
        await git("init", "--quiet", "--bare", "--template=", f"--object-format={object_format}", cwd=building)
    _configure(building, hub)
    building.rename(hub.root)


def _configure(building: Path, hub: Hub) -> None:
    for name in ("sessions", "indexes", "places", "trash", "locks"):
        (building / name).mkdir(mode=0o700)
    shutil.rmtree(building / "trusted.git" / "objects")
    (building / "trusted.git" / "objects").symlink_to(Path("..", "hub.git", "objects"))
    # A commit that the log calls queued must not be lost with the power.
    _add_settings(building / "trusted.git", "core", fsync="committed,reference", fsyncMethod="batch")
    _add_settings(building / "session.git", "core", bare="false")
    _add_settings(building / "session.git", "user", name=IDENTITY[0], email=IDENTITY[1])
    _add_settings(building / "session.git", "gc", auto="0")
    alternates = building / "session.git" / "objects" / "info" / "alternates"
    alternates.parent.mkdir(exist_ok=True)
    alternates.write_text(f"{hub.objects}\n")


def _add_settings(git_dir: Path, section: str, **settings: str) -> None:
    with (git_dir / "config").open("a", encoding="utf-8") as config:
        config.writelines([f"[{section}]\n", *(f'\t{name} = "{value}"\n' for name, value in settings.items())])


def internal_ref_name(run: str, name: str) -> str:
    """Return a ref of the trusted repository that keeps what a run has fetched."""
    return f"{INTERNAL_REFS}/{run}/{name}"


def work_branch_name(run: str, task: str, part: str) -> str:
    """Return the branch that holds what became of a task; `part` is the attempt's number, or `conflict`."""
    return f"council/{run}/{task}/{part}"
