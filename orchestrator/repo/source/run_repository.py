"""Find the repository that a run works on from a config or a run record."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import RefusedError
from orchestrator.repo.git.command import Git, check_version
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.repo.source.user_checkouts import LocalRepository, find_repository, read_current_branch


@dataclass(frozen=True, slots=True)
class RunRepository:
    """A run's repository: where to fetch and push, and the repository itself if local."""

    location: str
    repository: LocalRepository | None
    object_format: str

    @property
    def identity(self) -> str:
        """The repository's identity, the same for all checkouts and spellings of the path."""
        return self.location if self.repository is None else str(self.repository.git_dir)

    def source(self, git: Git) -> UpstreamRepository:
        """Return the repository as an upstream to fetch from and push to."""
        return UpstreamRepository.of(
            self.location, is_local=self.repository is not None, git=git, repository=self.repository
        )


async def find_run_repository(repo: str, *, is_url: bool, environ: Mapping[str, str]) -> RunRepository:
    """Find the repository that a config names."""
    await check_version(environ)
    if is_url:
        return RunRepository(repo, None, "sha1")
    git = Git(None, as_user=True, environ=environ)
    repository = await find_repository(Path(repo), git)
    if repository.object_format != "sha1":
        raise RefusedError(f"{repo} is a {repository.object_format} repository", "use a SHA-1 repository")
    return RunRepository(str(repository.top or repository.git_dir), repository, repository.object_format)


_COMMON_NAMES = ("main", "master", "trunk", "develop")


async def list_branches(repository: LocalRepository, git: Git) -> dict[str, str]:
    """Return the branches with their commit ids; empty before the first commit."""
    form = "--format=%(objectname) %(refname:lstrip=2)"
    listed = await git("for-each-ref", form, "refs/heads/", cwd=repository.folder)
    lines = listed.stdout.decode(errors="surrogateescape").split("\n")[:-1]
    return {name: commit for commit, name in (line.split(" ", 1) for line in lines)}


async def has_unmerged_commits(folder: Path, branch: str, base: str, git: Git) -> bool:
    """Return whether a branch exists and has commits that another branch lacks.

    Raises GitError if the other branch does not exist.
    """
    listed = await git(
        "for-each-ref", "--format=%(refname)", f"--no-merged=refs/heads/{base}", f"refs/heads/{branch}", cwd=folder
    )
    return listed.stdout.decode(errors="surrogateescape").rstrip("\n") == f"refs/heads/{branch}"


async def find_base_branch(repository: LocalRepository, git: Git) -> str | None:
    """Return the default base branch, or None if there are no branches.

    That is the checked-out branch, else the default branch of `origin`, else a branch with a common name.
    """
    remote = await git("symbolic-ref", "--quiet", "refs/remotes/origin/HEAD", cwd=repository.folder, ok=(0, 1, 128))
    default = remote.stdout.decode(errors="surrogateescape").rstrip("\n").removeprefix("refs/remotes/origin/")
    return choose_base_branch(
        await list_branches(repository, git), await read_current_branch(repository.folder, git), default
    )


def choose_base_branch(branches: Collection[str], current: str | None, default: str | None) -> str | None:
    """Return the first branch that exists: current, default, a common name, or any."""
    wanted = (current, default, *_COMMON_NAMES, *sorted(branches))
    return next((name for name in wanted if name in branches), None)
