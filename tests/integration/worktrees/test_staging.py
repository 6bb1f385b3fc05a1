"""Staging by known differences equals staging by a full scan."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from orchestrator.domain.security.secrets import Redactor
from orchestrator.repo.git.command import Git
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.intake.quarantine import Quarantine
from orchestrator.repo.intake.staging import StagingArea, StagingResult, stage_files
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.repo.worktrees.files.change_detection import TreeSnapshot
from orchestrator.repo.worktrees.hub import create_hub, internal_ref_name, locate_hub
from tests.conftest import Repository

VALUE = "the-value-of-a-variable"
RULES = IntakeRules(Redactor([VALUE]), max_file=1000)
IGNORED = IntakeRules(Redactor([]), scratch_patterns=("*.log",))


@dataclass(frozen=True)
class Checkout:
    """A checkout with its index, as acquired."""

    git: Git
    staging: StagingArea
    base: str
    snapshot: TreeSnapshot

    @property
    def tree(self) -> Path:
        """Return the folder of the files."""
        return self.staging.tree

    async def stage(self, rules: IntakeRules = RULES) -> StagingResult:
        """Stage by known differences, then with a full scan; both must be equal."""
        found = self.snapshot.compare()
        assert found is not None
        by_stamps = await stage_files(self.git, replace(self.staging, known_diff=found), self.base, rules)
        first = await self.index()
        of_all = await stage_files(self.git, self.staging, self.base, rules)
        assert (first, by_stamps) == (await self.index(), of_all)
        return by_stamps

    async def index(self) -> str:
        """Return the staged entries."""
        return await self.git.line("ls-files", "--stage", env=self.staging.env)


@pytest.fixture
async def checkout(repository: Repository, tmp_path: Path, environ: dict[str, str]) -> Checkout:
    """Return a checkout of the repository's `main`."""
    repository.commit({"a.txt": "a\n", "b.txt": "b\n", "folder/c.txt": "c\n", ".gitignore": "*.tmp\n"}, "more")
    hub = locate_hub(str(repository.top), tmp_path / "council-home")
    await create_hub(hub, "sha1", environ)
    git = Git(hub.trusted, environ=environ)
    source = UpstreamRepository.of(str(repository.top), is_local=True, git=git)
    base = await source.fetch("main", internal_ref_name("run1", "base"))
    tree = tmp_path / "checkout"
    tree.mkdir()
    staging = StagingArea(tree, tmp_path / "index", Quarantine(tmp_path / "import" / "objects", hub.objects))
    env = {"GIT_WORK_TREE": str(tree), "GIT_INDEX_FILE": str(staging.index)}
    await git("read-tree", "--reset", "-u", base, env=env, cwd=tree)
    stamps = TreeSnapshot.capture(tree)
    assert stamps is not None
    return Checkout(git, staging, base, stamps)


def paths_of(staged: StagingResult) -> list[str]:
    return [change.path for change in staged.changes]


async def test_added_changed_and_removed_files_are_staged(checkout: Checkout) -> None:
    """Files, links, modes and folders, regardless of their names."""
    tree = checkout.tree
    (tree / "a.txt").write_text("other\n")
    (tree / "b.txt").unlink()
    (tree / ":(top)new").write_text("new\n")
    (tree / "link").symlink_to("nowhere")
    (tree / "folder" / "c.txt").chmod(0o755)
    assert paths_of(await checkout.stage()) == [":(top)new", "a.txt", "b.txt", "folder/c.txt", "link"]
    (tree / "made").mkdir()
    (tree / "made" / "d.txt").write_text("d\n")
    assert "made/d.txt" in paths_of(await checkout.stage())


async def test_restored_file_is_not_a_change(checkout: Checkout) -> None:
    (checkout.tree / "a.txt").write_text("a\n")
    assert paths_of(await checkout.stage()) == []


async def test_ignored_files_are_skipped(checkout: Checkout) -> None:
    """By the checkout's rules, which the session may have changed, and by those of the adapter."""
    for name in ("one.tmp", "two.log", "three.new"):
        (checkout.tree / name).write_text("x\n")
    assert paths_of(await checkout.stage(IGNORED)) == ["three.new"]
    await checkout.git("read-tree", checkout.base, env=checkout.staging.env)
    (checkout.tree / ".gitignore").write_text("*.new\n")
    assert paths_of(await checkout.stage(IGNORED)) == [".gitignore", "one.tmp"]


async def test_rejected_file_stays_as_in_the_base(checkout: Checkout) -> None:
    """Secret and huge files are not even read, secrets in files are found; all other files are staged."""
    (checkout.tree / ".env").write_text("A=1\n")
    (checkout.tree / "a.txt").write_text("x" * 2000)
    (checkout.tree / "b.txt").write_text(f"{VALUE}\n")
    (checkout.tree / "good").write_text("x\n")
    staged = await checkout.stage()
    assert (paths_of(staged), sorted(staged.refused)) == (["good"], [".env", "a.txt", "b.txt"])
    assert len(staged.refused_objects) == 1


async def test_file_ignored_only_by_git_is_not_rejected(checkout: Checkout) -> None:
    """A secret file that git ignores is not part of the work."""
    (checkout.tree / ".gitignore").write_text(".env\n")
    (checkout.tree / ".env").write_text("A=1\n")
    staged = await checkout.stage()
    assert (paths_of(staged), dict(staged.refused)) == ([".gitignore"], {})


async def test_earlier_staged_index_is_rebuilt(checkout: Checkout) -> None:
    """An entry staged earlier whose file is gone does not stay in the index."""
    (checkout.tree / "early").write_text("x\n")
    await stage_files(checkout.git, checkout.staging, checkout.base, RULES)
    (checkout.tree / "early").unlink()
    (checkout.tree / "late").write_text("x\n")
    assert paths_of(await checkout.stage()) == ["late"]


async def test_rejected_file_of_an_earlier_index_is_restored(checkout: Checkout) -> None:
    """A file that was staged while small and is too large now is left as in the base."""
    (checkout.tree / "a.txt").write_text("small\n")
    await stage_files(checkout.git, checkout.staging, checkout.base, RULES)
    (checkout.tree / "a.txt").write_text("x" * 2000)
    assert paths_of(await checkout.stage()) == []


async def test_index_of_another_commit_is_rebuilt(checkout: Checkout) -> None:
    """A session that began at a merge is compared with its base: the whole difference is staged."""
    other = checkout.staging.index.with_name("other")
    env = {"GIT_WORK_TREE": str(checkout.tree), "GIT_INDEX_FILE": str(other)}
    (checkout.tree / "a.txt").write_text("merged\n")
    os.utime(checkout.tree / "a.txt", (1, 1))
    await checkout.git("read-tree", checkout.base, env=env)
    await checkout.git("add", "a.txt", env=env, cwd=checkout.tree)
    other.rename(checkout.staging.index)
    stamps = TreeSnapshot.capture(checkout.tree)
    assert stamps is not None
    (checkout.tree / "b.txt").write_text("other\n")
    staged = await replace(checkout, snapshot=stamps).stage()
    assert paths_of(staged) == ["a.txt", "b.txt"]


@pytest.mark.extended_variants
@pytest.mark.parametrize("limit", [{"max_total": 5000}, {"max_files": 20}])
async def test_more_files_than_git_can_stage_are_rejected_first(checkout: Checkout, limit: dict[str, int]) -> None:
    """With size and limit; nothing is read, staged or left over, and fewer files can be staged."""
    assert (await checkout.stage()).problem is None
    before = await checkout.index()
    for number in range(21):
        (checkout.tree / f"new-{number}").write_text("x" * 300)
    staged = await checkout.stage(replace(RULES, **limit))  # type: ignore[arg-type]
    assert staged.problem is not None
    assert "too much to stage: 21 files, 6300 bytes in total" in staged.problem
    assert not staged.changes
    assert await checkout.index() == before
    assert not checkout.staging.index.with_name("index.lock").exists()
    assert not [path for path in checkout.staging.quarantine.objects.rglob("*") if path.is_file()]
    for number in range(5):
        (checkout.tree / f"new-{number}").unlink()
    staged = await checkout.stage(replace(RULES, **limit))  # type: ignore[arg-type]
    assert staged.problem is None
    assert len(staged.changes) == 16
