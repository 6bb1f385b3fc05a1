"""What is looked at before anything starts: each refusal says what to do, and no run has been recorded by then."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import GitError, RefusedError
from orchestrator.project import Project
from orchestrator.protocols import Adapter
from orchestrator.repo.checkout import LocalRepository, changes_in, checkout_of, inspect
from orchestrator.repo.git import Git, check_version
from orchestrator.repo.source import Source


@dataclass(frozen=True, slots=True)
class Site:
    """Where a run works: the location to fetch from and push to, and the repository if it is on this machine."""

    location: str
    repository: LocalRepository | None
    object_format: str

    @property
    def identity(self) -> str:
        """What names the repository, by whichever of its checkouts or spellings it was reached."""
        return self.location if self.repository is None else str(self.repository.git_dir)

    def source(self, git: Git) -> Source:
        """Return the repository as a source of work, for git in the trusted repository."""
        return Source.of(self.location, is_local=self.repository is not None, git=git)


async def find_site(repo: str, *, is_url: bool, environ: Mapping[str, str]) -> Site:
    """Find the repository that a config names."""
    await check_version(environ)
    if is_url:
        return Site(repo, None, "sha1")
    git = Git(None, users=True, environ=environ)
    repository = await inspect(Path(repo), git)
    if repository.object_format != "sha1":
        raise RefusedError(f"{repo} is a {repository.object_format} repository", "use one with SHA-1 object names")
    return Site(str(repository.top or repository.git_dir), repository, repository.object_format)


async def check_branches(source: Source, base: str, target: str) -> dict[str, str]:
    """Return the branches of the source; RefusedError if the base is not there or the target can't be."""
    try:
        heads = await source.heads()
    except GitError as error:
        raise RefusedError(f"{source.location} can't be read: {error.stderr}", "check `repo`") from None
    if not heads:
        raise RefusedError(f"{source.location} has no commit yet", "commit something first: sessions start from it")
    if base not in heads:
        near = difflib.get_close_matches(base, heads, n=3, cutoff=0.5)
        others = [head for head in sorted(heads) if not head.startswith("council/")]
        names = ", ".join((near or others)[:5])
        raise RefusedError(f"there is no branch {base!r} in {source.location}", f"set `base` to one of: {names}")
    for head in heads:
        if head.startswith(f"{target}/") or target.startswith(f"{head}/"):
            raise RefusedError(
                f"the target {target!r} can't exist beside the branch {head!r}", "set `target` to another name"
            )
    return heads


async def check_checkout(
    repository: LocalRepository | None, target: str, environ: Mapping[str, str], *, allow_deferred: bool
) -> None:
    """Refuse a target that is checked out with changes of the user's own, which no landing could get past."""
    if repository is None or allow_deferred:
        return
    git = Git(None, users=True, environ=environ)
    checkout = await checkout_of(repository, target, git)
    changed = [] if checkout is None else await changes_in(checkout, git)
    if changed:
        raise RefusedError(
            f"{target!r} is checked out in {checkout} with changes that are not committed ({', '.join(changed[:3])})",
            "commit or stash them, set another `target`, or land later with --allow-deferred",
        )


async def check_own(project: Project, environ: Mapping[str, str]) -> None:
    """Refuse a `.council` that came with the repository: what is in it would be obeyed as if we had written it."""
    git = Git(None, users=True, environ=environ)
    listed = await git("ls-files", "-z", "--", str(project.folder), cwd=project.top, ok=(0, 128))
    if listed.stdout:
        raise RefusedError(
            f"the repository brings a {project.folder.name} of its own",
            f"`git rm -r --cached {project.folder.name}`, and remove the folder unless you know whose it is",
        )


def check_programs(adapters: Mapping[str, Adapter], environ: Mapping[str, str]) -> None:
    """Refuse adapters whose program is not on PATH, all of them at once."""
    missing = [
        f"adapter {name!r} runs {program!r}, which is not on PATH"
        for name, adapter in adapters.items()
        for program in adapter.programs()
        if shutil.which(program, path=environ.get("PATH")) is None
    ]
    if missing:
        raise RefusedError("; ".join(missing), "install it or correct the adapter")
