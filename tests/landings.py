"""A landing into the checked-out branch of a repository, one step at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.domain.runs.model import PreparedMerge
from orchestrator.repo.git.command import Git, join_nul
from orchestrator.repo.landing.target_branch import DeferredLanding, Landed, NothingToLand, Target
from orchestrator.repo.source.run_repository import find_run_repository
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.repo.worktrees.hub import create_hub, locate_hub
from tests.conftest import Repository
from tests.merge_leases import hold_merge_lease

#: The landing's changes; None deletes.
OURS: Mapping[str, str | None] = {
    "README.md": "# Project\nlanded\n",
    "a/b/new.txt": "new\n" * 2000,
    "gone.txt": None,
    "new.txt": "landed\n",
    "src/app.py": "def main():\n    return 1\n",
}


def recorded(merge: PreparedMerge, ago: float) -> PreparedMerge:
    """Return a merge that was recorded as a landing intent some seconds ago."""
    return merge.model_copy(update={"recorded": time.time() - ago})


@dataclass(frozen=True)
class Landing:
    """A merge to be landed on the checked-out `main` of a repository."""

    repository: Repository
    target: Target
    source: UpstreamRepository
    git: Git
    merge: PreparedMerge

    @property
    def old(self) -> str:
        """Return the commit that the target is moved from."""
        assert self.merge.old is not None
        return self.merge.old

    @property
    def lock(self) -> Path:
        """Return the lock of the checkout's index."""
        return self.repository.top / ".git/index.lock"

    @classmethod
    async def prepare(cls, repository: Repository, tmp_path: Path) -> Landing:
        """Create the merge as a run would, of work based on the current `main`."""
        start = repository.commit({"gone.txt": "gone\n", "kept.txt": "kept\n"}, "start")
        site = await find_run_repository(str(repository.top), is_url=False, environ=repository.environ)
        hub = locate_hub(site.location, tmp_path / "hubs")
        await create_hub(hub, site.object_format, repository.environ)
        git = Git(hub.trusted, environ=repository.environ)
        source = site.source(git)
        await source.fetch("main", "refs/council/base")
        env = {"GIT_INDEX_FILE": str(hub.indexes / "test")}
        await git("read-tree", start, env=env)
        blobs = {
            content: await git.line("hash-object", "-w", "--stdin", input_=content.encode())
            for content in set(OURS.values())
            if content is not None
        }
        entries = [
            f"0 {'0' * len(start)}\t{name}" if content is None else f"100644 {blobs[content]}\t{name}"
            for name, content in OURS.items()
        ]
        await git("update-index", "-z", "--index-info", env=env, input_=join_nul(entries))
        tree = await git.line("write-tree", env=env)
        work = await git.line("commit-tree", tree, "-p", start, input_=b"work\n")
        target = Target(hub, git, source, branch="main", start=start, ref="refs/council/target")
        async with hold_merge_lease(source, "main") as lease:
            merge = await target.prepare(lease, "run/one", work, start)
        assert isinstance(merge, PreparedMerge), merge
        return cls(repository, target, source, git, merge)

    async def bring_objects(self) -> None:
        """Add the merge's objects to the repository, the first step of a push: in a pack, which it keeps."""
        revisions = f"{self.merge.new}\n^{self.old}\n".encode()
        pack = (await self.git("pack-objects", "--quiet", "--revs", "--stdout", input_=revisions)).stdout
        users = Git(self.repository.top / ".git", environ=self.repository.environ)
        await users("index-pack", "--stdin", "--keep=receive-pack 1 on test", input_=pack)

    def write(self, names: tuple[str, ...]) -> None:
        """Write files as the update of the checkout does."""
        for name in names:
            content, path = OURS[name], self.repository.top / name
            path.unlink(missing_ok=True)
            if content is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)

    async def finish(self, ago: float = 60) -> None:
        """Recover as the next process does, and land the rest: `prepare` and `move`, as often as needed.

        The clock shows that the intent is `ago` seconds old.
        """
        async with hold_merge_lease(self.source, "main") as lease:
            settled: object = await self.target.recover(lease, recorded(self.merge, ago), [self.merge.new])
            intended = [self.merge.new]
            for _ in range(5):
                if isinstance(settled, Landed | NothingToLand | DeferredLanding):
                    break
                work = await self.git.line("rev-parse", f"{self.merge.new}^2")
                settled = await self.target.prepare(lease, "run/one", work, self.old, None, intended)
                if isinstance(settled, PreparedMerge):
                    intended.append(settled.new)
                    settled = await self.target.move(lease, [settled])
        assert isinstance(settled, Landed | NothingToLand), settled

    def check(self, theirs: Mapping[str, str | None], uncommitted: Mapping[str, str]) -> None:
        """Check that all landed, that the user's changes are intact, and that nothing is left over.

        `uncommitted` are the user's lines of `git status`, by path.
        """
        repository = self.repository
        status = repository.git("status", "--porcelain", "--untracked-files=all").splitlines()
        assert {line[3:]: line[:2] for line in status} == dict(uncommitted)
        for name, content in {**OURS, **theirs}.items():
            path = repository.top / name
            assert (path.read_text() if path.exists() else None) == content, name
        for name, content in OURS.items():
            if name not in theirs:
                is_tracked = repository.git("ls-tree", "--name-only", "HEAD", "--", name) == name
                assert (f"{repository.git('show', f'HEAD:{name}')}\n" if is_tracked else None) == content, name
        assert not [path for path in (repository.top / ".git").rglob("*") if path.suffix in {".lock", ".keep"}]
        repository.git("fsck", "--strict")
