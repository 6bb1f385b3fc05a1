"""A merge contains the changes between the work and its base, regardless of the number of landings since."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.domain.runs.model import PreparedMerge
from orchestrator.repo.git.command import Git
from orchestrator.repo.landing import target_branch
from orchestrator.repo.landing.target_branch import Landed, Target
from orchestrator.repo.source.run_repository import find_run_repository
from orchestrator.repo.worktrees.hub import create_hub, internal_ref_name, locate_hub
from tests.conftest import Repository
from tests.merge_leases import hold_merge_lease


@pytest.mark.extended_variants
@pytest.mark.parametrize("few", [-1, 200], ids=["many have landed", "few have landed"])
async def test_partly_merged_work_merges_as_by_git(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    """Work lands next to other work, and onto a part of itself that the user merged by hand and changed."""
    monkeypatch.setattr(target_branch, "_MAX_WALKED_LANDINGS", few)
    site = await find_run_repository(str(repository.top), is_url=False, environ=repository.environ)
    hub = locate_hub(site.location, tmp_path / "council-home")
    await create_hub(hub, site.object_format, repository.environ)
    git = Git(hub.trusted, environ=repository.environ)
    source = site.source(git)
    start = await source.fetch("main", internal_ref_name("r", "start"))
    target = Target(hub, git, source, branch="main", start=start, ref=internal_ref_name("r", "target"))

    async def built_on(parent: str, name: str) -> str:
        blob = await git.line("hash-object", "-w", "--stdin", input_=name.encode())
        listing = await git.line("ls-tree", parent)
        tree = await git.line("mktree", input_=f"{listing}\n100644 blob {blob}\t{name}\n".encode())
        return await git.line("commit-tree", tree, "-p", parent, input_=b"work")

    async def land(task: str, commit: str) -> None:
        async with hold_merge_lease(source, "main") as lease:
            merge = await target.prepare(lease, f"r/{task}", commit, start)
            assert isinstance(merge, PreparedMerge)
            assert isinstance(await target.move(lease, [merge]), Landed)

    part = await built_on(start, "part")
    await land("a", await built_on(start, "a"))
    await land("b", await built_on(start, "b"))
    assert (await source.push(part, "by-hand", None, ())).moved
    repository.git("merge", "--quiet", "--no-ff", "-m", "By hand", "by-hand")
    repository.commit({"part": "changed by the user\n"}, "change it")
    await land("rest", await built_on(part, "rest"))
    names = set(repository.git("ls-tree", "--name-only", "main").split())
    assert names >= {"a", "b", "part", "rest"}
    assert (repository.top / "part").read_text() == "changed by the user\n"
