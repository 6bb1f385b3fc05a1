"""Check that the sources of a run's worktrees exist.

They are in the base commit or in the user's checkout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orchestrator.domain.settings.run_settings import WorktreeSettings
from orchestrator.errors import RefusedError, raise_combined_refusal
from orchestrator.project import Project
from orchestrator.repo.git.command import Git
from orchestrator.repo.source.user_checkouts import LocalRepository
from orchestrator.repo.worktrees.provisions import Provisions

_Problem = tuple[str, str]
"""A problem and its remedy."""
_REMEDY: Final = "fix these under `worktrees:`"


@dataclass(frozen=True, slots=True)
class BaseCommit:
    """The base branch, and its commit or ref in the repository of `git`."""

    branch: str
    commit: str
    git: Git


async def check_worktree_sources(
    worktrees: WorktreeSettings, base: BaseCommit, repository: LocalRepository | None, hidden: Sequence[Path]
) -> None:
    """Raise RefusedError if worktrees can't be created as configured.

    The error lists all problems. Sparse folders and the inputs of setup must exist in the base. Copied or linked paths
    must exist in the checkout of `repository`, but not in the base. The last component of such a path may be a link to
    any destination, unless that is `hidden`, belongs to council, or is used by git itself. Parent folders must not be
    links.
    """
    problems = list(_find_missing(worktrees, base.branch, await _object_types(base, _required_paths(worktrees))))
    if worktrees.copied or worktrees.linked:
        if repository is None or repository.top is None:
            remedy = "remove them, or set `repo` to a checkout"
            raise RefusedError(
                "`worktrees.copy` and `worktrees.link` need a checkout, and the repository has none", remedy
            )
        provisions = make_provisions(worktrees, repository.top, (*hidden, repository.git_dir))
        provision_faults = await provisions.faults(base.commit, base.git, repr(base.branch))
        problems += [(fault.message, fault.remedy) for fault in provision_faults]
    raise_combined_refusal(problems, _REMEDY)


def make_provisions(worktrees: WorktreeSettings, top: Path, hidden: Iterable[Path]) -> Provisions:
    """Return the files for each worktree from the user's checkout at `top`.

    Council's own folder is hidden as well.
    """
    return Provisions(top, worktrees.copied, worktrees.linked, (*hidden, Project(top).folder))


def _required_paths(worktrees: WorktreeSettings) -> set[str]:
    return {*worktrees.sparse, *(path for step in worktrees.setup for path in step.inputs)}


async def _object_types(base: BaseCommit, paths: set[str]) -> dict[str, str]:
    """Return `blob` or `tree` for each path that exists in the base."""
    requested = sorted(paths)
    if not requested:
        return {}
    lines = "".join(f"{base.commit}:{path}\n" for path in requested).encode(errors="surrogateescape")
    answers = (await base.git("cat-file", "--batch-check=%(objecttype)", input_=lines)).stdout.splitlines()
    # For a missing path, git prints the request with a word appended.
    types = zip(requested, (line.decode(errors="replace") for line in answers), strict=True)
    return {path: kind for path, kind in types if kind in {"blob", "tree"}}


def _find_missing(worktrees: WorktreeSettings, branch: str, kinds: Mapping[str, str]) -> Iterator[_Problem]:
    for path in worktrees.sparse:
        if kinds.get(path) != "tree":
            yield f"`worktrees.sparse`: folder {path!r} not found in {branch!r}", "list committed folders"
    for path in dict.fromkeys(path for step in worktrees.setup for path in step.inputs):
        if kinds.get(path) != "blob":
            yield f"`worktrees.setup`: file {path!r} not found in {branch!r}", "list committed files as `inputs`"
