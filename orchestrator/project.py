"""Where things are: the project's `.council/` folder with its state, and the home of the repositories of our own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from secrets import randbelow

from orchestrator.config.store import MEMORY, check_store_url, folder_url
from orchestrator.errors import RefusedError
from orchestrator.protocols import Document, Key

COUNCIL_FOLDER = ".council"
_LONGEST_URL = 1 << 16
#: What older layouts of state are in, from a project's folder: a file with all sessions, and a folder.
LEGACY_FILE, LEGACY_TREE = ".worktrees/.parallel-dev-state.json", ".worktrees/.state"
#: The document that says what of them was imported, and whether that is complete.
LEGACY_RECORD = Key("import", "worktrees")


def is_import_complete(record: Document) -> bool:
    """Whether that document says so; of one that is damaged it is not known, and nothing is imported twice."""
    return record.damaged or bool(record.value.get("is_complete", True))


@dataclass(frozen=True, slots=True)
class Project:
    """A folder that holds a `.council/`: the top of the user's checkout, or where the YAML file is for a URL."""

    top: Path

    @property
    def folder(self) -> Path:
        """The folder of our own in it, readable by the owner alone and ignored by git."""
        return self.top / COUNCIL_FOLDER

    @property
    def state_folder(self) -> Path:
        """The folder of the project's own store."""
        return self.folder / "state"

    @property
    def store_file(self) -> Path:
        """Where the URL of the store stands that the file of the newest run names, if it names one."""
        return self.folder / "store"

    def store(self) -> str:
        """Return the URL of the store that the newest run is recorded in, as far as files say. Blocks.

        RefusedError where the file that names it is not as it was written.
        """
        if not os.path.lexists(self.store_file):
            return folder_url(self.state_folder)
        lines = [""]
        if self.store_file.is_file():  # a pipe would be waited for
            with self.store_file.open("rb") as file:
                lines = file.read(_LONGEST_URL).decode(errors="replace").strip().split("\n")
        try:
            return check_store_url(lines[0] if len(lines) == 1 else "")
        except ValueError:
            remedy = f"write the URL of one into it, or remove it to use {self.state_folder}"
            raise RefusedError(f"{self.store_file} names no store", remedy) from None

    def set_store_url(self, url: str | None) -> None:
        """Have commands look there, or in the project's own store, where they are told nothing else. Blocks."""
        if url is None or url == MEMORY:  # of which nothing is left to look at
            self.store_file.unlink(missing_ok=True)
            return
        staged = self.store_file.with_name(f"{self.store_file.name}.{randbelow(10**12)}.new")
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:  # there may be a password in it
            file.write(f"{url}\n")
        staged.replace(self.store_file)

    @property
    def log_file(self) -> Path:
        """Where the details of our own faults are written."""
        return self.folder / "council.log"

    @property
    def logs_folder(self) -> Path:
        """Where the output of sessions is kept."""
        return self.folder / "logs"

    @property
    def legacy(self) -> Path:
        """Where copies are kept of files of older layouts that could not be imported."""
        return self.folder / "legacy"

    def logs(self, run: str) -> Path:
        """Where the output of a run's sessions is kept."""
        return self.logs_folder / run

    def background_log(self, run: str) -> Path:
        """Where a process that runs a run in the background writes its errors."""
        return self.logs(run) / "background.log"

    @property
    def file_locks(self) -> Path:
        """The lock files of the files that sessions have locked."""
        return self.folder / "locks" / "files"

    @property
    def views(self) -> Path:
        """Copies of the state for people to read."""
        return self.folder / "views"

    @property
    def views_lock(self) -> Path:
        """Held by the process that writes them."""
        return self.folder / "views.lock"

    def has_legacy(self) -> bool:
        """Whether there is state of an older layout. Blocks."""
        return any((self.top / name).exists() for name in (LEGACY_FILE, LEGACY_TREE))

    def check(self) -> None:
        """Refuse (RefusedError) a folder that a link leads away from: a repository may bring one."""
        own = (
            self.folder,
            self.logs_folder,
            self.state_folder,
            self.store_file,
            self.views,
            self.legacy,
            self.log_file,
        )
        for folder in (*own, self.file_locks.parent, self.file_locks, self.views_lock):
            if folder.is_symlink():
                raise RefusedError(f"{folder} is a link", "remove it, so that one of our own can be made there")

    def create(self) -> None:
        """Make the folder, for the owner alone."""
        self.check()
        for folder in (self.folder, self.logs_folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            folder.chmod(0o700)


def find_project(start: Path) -> Project:
    """Return the project that a folder is in; RefusedError where no run has ever been started.

    Where there is none of ours, it is the folder that has the state of an older layout. Above a repository none is
    looked for.
    """
    start = start.absolute()
    folders: list[Project] = []
    for folder in (start, *start.parents):
        folders.append(Project(folder))
        if os.path.lexists(folder / ".git"):  # what is above a repository is no part of it
            break
    for project in folders:
        if project.state_folder.is_dir() or project.store_file.is_file():
            return project
    for project in folders:
        if project.has_legacy():
            return project
    if not_in_repository_error(start) is not None:
        what = f"council has not run in {start}, which is in no git repository"
        raise RefusedError(what, "cd to the repository that it ran in")
    remedy = "start with `council run`, or cd to the repository that it ran in"
    raise RefusedError(f"council has not run in {start}", remedy)


def not_in_repository_error(folder: Path) -> RefusedError | None:
    """Return the error of a folder that is in no repository, so that git has nothing to say about it. Blocks."""
    if any((one / ".git").exists() or (one / "objects").is_dir() for one in (folder, *folder.parents)):  # or a bare one
        return None
    remedy = "cd to your repository, or create one: `git init`, then commit something"
    return RefusedError(f"{folder} is in no git repository", remedy)


def council_home(environ: Mapping[str, str]) -> Path:
    """Return the folder for the repositories of our own: `COUNCIL_HOME`, or `council` in the user's state folder."""
    if environ.get("COUNCIL_HOME"):
        return Path(environ["COUNCIL_HOME"]).resolve()
    if environ.get("XDG_STATE_HOME"):
        return Path(environ["XDG_STATE_HOME"]).resolve() / "council"
    if not environ.get("HOME"):
        raise RefusedError("neither COUNCIL_HOME nor HOME is set", "set COUNCIL_HOME to a folder of yours")
    return Path(environ["HOME"]).resolve() / ".local" / "state" / "council"


def exclude_from_git(git_dir: Path) -> None:
    """Keep `.council/` out of the user's commits by `info/exclude`, once."""
    exclude = git_dir / "info" / "exclude"
    before = exclude.read_bytes() if exclude.exists() else b""
    line = f"/{COUNCIL_FOLDER}/".encode()
    if line in before.splitlines():
        return
    exclude.parent.mkdir(exist_ok=True)
    separator = b"" if not before or before.endswith(b"\n") else b"\n"
    staged = exclude.with_name(f"{exclude.name}.{randbelow(10**12)}.new")  # a process may start several runs
    staged.write_bytes(before + separator + line + b"\n")
    if exclude.exists():
        staged.chmod(exclude.stat().st_mode)
    staged.replace(exclude)


def find_stale_exclude_files(git_dir: Path) -> dict[Path, float]:
    """Return the files that `exclude_from_git` was about to put into place, with when (wall-clock seconds). Blocks."""
    found = (git_dir / "info").glob("exclude.*.new")
    return {path: path.lstat().st_mtime for path in found if path.name.split(".")[1].isdecimal()}
