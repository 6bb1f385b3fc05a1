"""Paths in a project's `.council/` folder, and council's home folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.store import MEMORY, check_store_url, folder_url
from orchestrator.errors import RefusedError
from orchestrator.protocols import Document, Key
from orchestrator.system.files import atomic_write

COUNCIL_FOLDER = ".council"
_LONGEST_URL = 1 << 16
#: The state in earlier formats, relative to a project's folder: a file with all sessions, and a folder.
LEGACY_FILE, LEGACY_TREE = ".worktrees/.parallel-dev-state.json", ".worktrees/.state"
#: The document that records the import of that state.
LEGACY_RECORD = Key("import", "worktrees")


def is_import_complete(record: Document) -> bool:
    """Return True if the import is complete, or its record damaged.

    Nothing may be imported twice.
    """
    return record.damaged or bool(record.value.get("is_complete", True))


@dataclass(frozen=True, slots=True)
class Project:
    """The parent of a `.council/` folder.

    It is the root of the user's checkout or, for a repository URL, the YAML file's folder.
    """

    top: Path

    @property
    def folder(self) -> Path:
        """The `.council/` folder, readable only by the owner and ignored by git."""
        return self.top / COUNCIL_FOLDER

    @property
    def state_folder(self) -> Path:
        """The folder of the project's own store."""
        return self.folder / "state"

    @property
    def store_file(self) -> Path:
        """The file with the URL of the newest run's store, if its YAML file sets one."""
        return self.folder / "store"

    def store(self) -> str:
        """Return the URL of the newest run's store. Blocks.

        Raises RefusedError if the store file is invalid.
        """
        if not os.path.lexists(self.store_file):
            return folder_url(self.state_folder)
        lines = [""]
        if self.store_file.is_file():  # reading a pipe would block
            with self.store_file.open("rb") as file:
                lines = file.read(_LONGEST_URL).decode(errors="replace").strip().split("\n")
        try:
            return check_store_url(lines[0] if len(lines) == 1 else "")
        except ValueError:
            remedy = f"write a store's URL to it, or remove it to use {self.state_folder}"
            raise RefusedError(f"{self.store_file} does not contain a store's URL", remedy) from None

    def set_store_url(self, url: str | None) -> None:
        """Set the default store of commands; None means the project's own store. Blocks."""
        if url is None or url == MEMORY:  # a memory store is lost with its process
            self.store_file.unlink(missing_ok=True)
            return
        atomic_write(self.store_file, f"{url}\n", mode=0o600)  # private: it may contain a password

    @property
    def log_file(self) -> Path:
        """The log with details of internal errors."""
        return self.folder / "council.log"

    @property
    def logs_folder(self) -> Path:
        """The folder with the output of all sessions."""
        return self.folder / "logs"

    @property
    def legacy(self) -> Path:
        """The folder with copies of files that could not be imported."""
        return self.folder / "legacy"

    def logs(self, run: str) -> Path:
        """Return the folder with the output of a run's sessions."""
        return self.logs_folder / run

    def background_log(self, run: str) -> Path:
        """Return the error log of a run's background process."""
        return self.logs(run) / "background.log"

    @property
    def file_locks(self) -> Path:
        """The folder with the lock files of file locks."""
        return self.folder / "locks" / "files"

    @property
    def views(self) -> Path:
        """The folder with human-readable copies of the state."""
        return self.folder / "views"

    @property
    def views_lock(self) -> Path:
        """The lock of the process that writes the views."""
        return self.folder / "views.lock"

    def has_legacy(self) -> bool:
        """Return True if there is state in an earlier format. Blocks."""
        return any((self.top / name).exists() for name in (LEGACY_FILE, LEGACY_TREE))

    def check(self) -> None:
        """Raise RefusedError if a path is a symbolic link, which a repository may contain."""
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
                raise RefusedError(f"{folder} is a symbolic link", "remove it, so that council can create its own")

    def create(self) -> None:
        """Create the folder, accessible only by the owner."""
        self.check()
        for folder in (self.folder, self.logs_folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            folder.chmod(0o700)


def find_project(start: Path) -> Project:
    """Return the project that contains a folder.

    Without a `.council/` folder, that is the folder with state in an earlier format. The search ends at the top of the
    repository. Raises RefusedError if no run was ever started there.
    """
    start = start.absolute()
    folders: list[Project] = []
    for folder in (start, *start.parents):
        folders.append(Project(folder))
        if os.path.lexists(folder / ".git"):  # parents of a repository are not part of it
            break
    for project in folders:
        if project.state_folder.is_dir() or project.store_file.is_file():
            return project
    for project in folders:
        if project.has_legacy():
            return project
    if not_in_repository_error(start) is not None:
        message = f"there is no run in {start}, which is not in a git repository"
        raise RefusedError(message, "cd to the repository of a run")
    remedy = "start a run with `council run`, or cd to the repository of a run"
    raise RefusedError(f"there is no run in {start}", remedy)


def not_in_repository_error(folder: Path) -> RefusedError | None:
    """Return the error for a folder outside any repository, or None. Blocks."""
    if any((one / ".git").exists() or (one / "objects").is_dir() for one in (folder, *folder.parents)):  # or bare
        return None
    remedy = "cd to your repository, or create one with `git init` and commit something"
    return RefusedError(f"{folder} is not in a git repository", remedy)


def council_home(environ: Mapping[str, str]) -> Path:
    """Return the folder for council's repositories.

    `COUNCIL_HOME`, or `council` in the user's state folder.
    """
    if environ.get("COUNCIL_HOME"):
        return Path(environ["COUNCIL_HOME"]).resolve()
    if environ.get("XDG_STATE_HOME"):
        return Path(environ["XDG_STATE_HOME"]).resolve() / "council"
    if not environ.get("HOME"):
        raise RefusedError("neither COUNCIL_HOME nor HOME is set", "set COUNCIL_HOME to a folder that you own")
    return Path(environ["HOME"]).resolve() / ".local" / "state" / "council"


def exclude_from_git(git_dir: Path) -> None:
    """Add `.council/` to a repository's `info/exclude` unless already listed."""
    exclude = git_dir / "info" / "exclude"
    before = exclude.read_bytes() if exclude.exists() else b""
    line = f"/{COUNCIL_FOLDER}/".encode()
    if line in before.splitlines():
        return
    exclude.parent.mkdir(exist_ok=True)
    separator = b"" if not before or before.endswith(b"\n") else b"\n"
    mode = stat.S_IMODE(exclude.stat().st_mode) if exclude.exists() else 0o644
    atomic_write(exclude, before + separator + line + b"\n", mode=mode)


def find_stale_exclude_files(git_dir: Path) -> dict[Path, float]:
    """Return leftover temporary files of `exclude_from_git`, with mtimes. Blocks.

    Times are in wall-clock seconds.
    """
    found = (git_dir / "info").glob("exclude.*.new")
    return {path: path.lstat().st_mtime for path in found if path.name.split(".")[1].isdecimal()}
