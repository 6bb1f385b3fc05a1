"""Find the repository that a run works on from a config or a run record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import RefusedError
from orchestrator.repo.git.command import Git, check_version
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.repo.source.user_checkouts import LocalRepository, find_repository


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
