"""Read refs, commits and diffs; GitPython avoids a process where possible."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.to_thread

from orchestrator.errors import GitError
from orchestrator.repo.git.command import CONFIG_FLAGS, Git, is_object_id, sealed_environment

if TYPE_CHECKING:
    import git

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CommitSummary:
    """A commit's subject line and committer time (seconds since 1970)."""

    subject: str
    committed: int


@cache
def _sealed_repo() -> tuple[type[git.Repo], type[Exception]]:
    """Return GitPython's repository class and its base error class."""

    # Imported late: importing GitPython takes as long as all other imports together.
    import git  # noqa: PLC0415

    class SealedGit(git.Git):
        """Runs git without our environment, which could relocate it or run programs."""

        def execute(self, command: Sequence[str], *args: Any, **kwargs: Any) -> Any:
            variables = (f"{name}={value}" for name, value in sealed_environment(self.environment()).items())
            return super().execute(["env", "-i", *variables, "git", *CONFIG_FLAGS, *command[1:]], *args, **kwargs)

    class SealedRepo(git.Repo):
        GitCommandWrapperType = SealedGit

    return SealedRepo, git.exc.GitError


async def _read(repository: Git, read: Callable[[git.Repo], T]) -> T:
    """Run `read` on our repository in a thread. Raises GitError if it is unreadable."""
    return await anyio.to_thread.run_sync(partial(_open_and_read, repository, read))


def _open_and_read(repository: Git, read: Callable[[git.Repo], T]) -> T:
    repo, error_type = _sealed_repo()
    try:
        with repo(repository.git_dir, expand_vars=False) as opened:
            opened.git.update_environment(PATH=repository.environ.get("PATH", ""))
            return read(opened)
    except (error_type, ValueError, OSError) as error:  # ValueError: a missing or unreadable object
        raise GitError(["cat-file"], 128, f"{repository.git_dir}: {error}") from error


async def list_refs(repository: Git, *prefixes: str) -> dict[str, str]:
    """Return object ids, keyed by full ref name, for refs below the prefixes."""
    listed = await repository.line("for-each-ref", "--format=%(objectname) %(refname)", *prefixes)
    pairs = (line.split(" ", 1) for line in listed.splitlines())
    return {name: commit for commit, name in pairs}


async def read_commits(repository: Git, commits: Collection[str]) -> dict[str, CommitSummary]:
    """Return commit summaries, keyed by id."""

    def read(opened: git.Repo) -> dict[str, CommitSummary]:
        found = {commit: opened.commit(commit) for commit in commits}
        return {
            name: CommitSummary(str(commit.summary), int(commit.committed_datetime.timestamp()))
            for name, commit in found.items()
        }

    return await _read(repository, read)


async def diff_trees(repository: Git, base: str, commit: str, options: Sequence[str]) -> bytes:
    """Return the output of `git diff-tree -r` with our options."""

    def read(opened: git.Repo) -> bytes:
        exact = {"stdout_as_string": False, "strip_newline_in_stdout": False}
        return bytes(opened.git.diff_tree("-r", *options, base, commit, **exact))

    return await _read(repository, read)


async def read_ref(repository: Path, ref: str) -> str | None:
    """Return the object id of a ref in the user's repository, or None, without git.

    `repository` is a git directory or the root of a checkout. Raises GitError if it can't be read.
    """
    return await anyio.to_thread.run_sync(_read_ref, repository, ref)


def _read_ref(repository: Path, ref: str) -> str | None:
    own = repository / ".git"
    with suppress(OSError):  # packed, in another format, or missing: ask GitPython
        value = ((own if own.exists() else repository) / ref).read_text(errors="replace").rstrip("\n")
        if is_object_id(value):
            return value
    return _read_any_ref(repository, ref)


def _read_any_ref(repository: Path, ref: str) -> str | None:
    import git  # noqa: PLC0415  as above

    try:
        with git.Repo(repository) as opened:
            return git.SymbolicReference.dereference_recursive(opened, ref)
    except ValueError:  # GitPython raises this for a missing ref
        return None
    except (git.exc.InvalidGitRepositoryError, git.exc.NoSuchPathError):  # the message is only the path
        raise GitError(["rev-parse", ref], 128, f"{repository} is no longer a git repository") from None
    except (git.exc.GitError, OSError) as error:
        raise GitError(["rev-parse", ref], 128, f"{repository}: {error}") from error
