"""Whether what a run's worktrees are made of is there: in the commit that work starts from, and in the checkout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orchestrator.config.model import WorktreesConfig
from orchestrator.errors import RefusedError, raise_combined_refusal
from orchestrator.project import Project
from orchestrator.repo.git.command import Git
from orchestrator.repo.source.user_checkouts import LocalRepository
from orchestrator.repo.worktrees.provisions import Provisions

_Problem = tuple[str, str]
"""What is wrong, and what to do."""
_REMEDY: Final = "mend these under `worktrees:`"


@dataclass(frozen=True, slots=True)
class BaseCommit:
    """The branch that work starts from, and the commit or ref of it that `git` finds in its repository."""

    branch: str
    commit: str
    git: Git


async def check_worktree_sources(
    worktrees: WorktreesConfig, base: BaseCommit, repository: LocalRepository | None, hidden: Sequence[Path]
) -> None:
    """Refuse (RefusedError, with all that is wrong) worktrees that can't be made as they are configured.

    Folders to check out and the inputs of setup must be in the base. What is copied or linked must be in the checkout
    of `repository` and not in the base. Its last part may be a link: then it is what that leads to, wherever it is,
    unless it leads to `hidden`, to what is ours, or to what git itself works with. Folders before it may be no links.
    """
    faults = list(_missing(worktrees, base.branch, await _object_types(base, _required_paths(worktrees))))
    if worktrees.copied or worktrees.linked:
        if repository is None or repository.top is None:
            remedy = "remove them, or set `repo` to a checkout"
            raise RefusedError("`worktrees.copy` and `worktrees.link` need a checkout, and there is none", remedy)
        provisions = make_provisions(worktrees, repository.top, (*hidden, repository.git_dir))
        found = await provisions.faults(base.commit, base.git, repr(base.branch))
        faults += [(fault.what, fault.remedy) for fault in found]
    raise_combined_refusal(faults, _REMEDY)


def make_provisions(worktrees: WorktreesConfig, top: Path, hidden: Iterable[Path]) -> Provisions:
    """Return what each worktree gets from the user's checkout at `top`; what is ours there is hidden, too."""
    return Provisions(top, worktrees.copied, worktrees.linked, (*hidden, Project(top).folder))


def _required_paths(worktrees: WorktreesConfig) -> set[str]:
    return {*worktrees.sparse, *(path for step in worktrees.setup for path in step.inputs)}


async def _object_types(base: BaseCommit, paths: set[str]) -> dict[str, str]:
    """Return `blob` or `tree` for each path that is in the base."""
    asked = sorted(paths)
    if not asked:
        return {}
    lines = "".join(f"{base.commit}:{path}\n" for path in asked).encode(errors="surrogateescape")
    told = (await base.git("cat-file", "--batch-check=%(objecttype)", input_=lines)).stdout.splitlines()
    # Of what is not there, git repeats the question with a word behind it.
    found = zip(asked, (line.decode(errors="replace") for line in told), strict=True)
    return {path: kind for path, kind in found if kind in {"blob", "tree"}}


def _missing(worktrees: WorktreesConfig, branch: str, kinds: Mapping[str, str]) -> Iterator[_Problem]:
    for path in worktrees.sparse:
        if kinds.get(path) != "tree":
            yield f"`worktrees.sparse`: there is no folder {path!r} in {branch!r}", "name folders that are committed"
    for path in dict.fromkeys(path for step in worktrees.setup for path in step.inputs):
        if kinds.get(path) != "blob":
            yield f"`worktrees.setup`: there is no file {path!r} in {branch!r}", "name `inputs` that are committed"
