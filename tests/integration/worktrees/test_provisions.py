"""Untracked files of the user's checkout are provided to worktrees, and never committed."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.settings.run_settings import PathAccess
from orchestrator.repo.git.command import Git
from orchestrator.repo.intake.collect import CollectionResult, collect_work
from orchestrator.repo.intake.diffs import diff_session
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.source.upstream import UpstreamRepository
from orchestrator.repo.worktrees.files.change_detection import TreeSnapshot
from orchestrator.repo.worktrees.hub import internal_ref_name
from orchestrator.repo.worktrees.provisions import ProvisionFailure, Provisions
from orchestrator.repo.worktrees.worktrees import Worktree
from tests.conftest import Repository
from tests.hub_fixture import HubFixture

pytestmark = pytest.mark.extended_rest

COPIED = (".env", "config/local.yaml", "vendor/a b*[c]")


@dataclass
class Workspace:
    """A worktree with its provided files, and the agent's commands in it."""

    git: Git
    worktree: Worktree
    base: str
    environ: Mapping[str, str]
    provisions: Provisions
    snapshot: TreeSnapshot

    @property
    def tree(self) -> Path:
        return self.worktree.tree

    async def prepare(self) -> None:
        """Provide all files to the worktree, as before each session."""
        assert isinstance(await self.provisions.install_into(self.tree, self.base, self.git), PathAccess)

    async def find_refusal(self) -> ProvisionFailure:
        """Return the reason why not all files can be provided."""
        result = await self.provisions.install_into(self.tree, self.base, self.git)
        assert isinstance(result, ProvisionFailure)
        return result

    def agent(self, *arguments: str) -> str:
        """Run git as the agent does."""
        done = subprocess.run(["git", *arguments], cwd=self.tree, env=self.environ, check=True, capture_output=True)
        return done.stdout.decode().strip()

    async def collect(self) -> CollectionResult:
        """Collect twice: the result with stamps must equal the result without."""
        rules = IntakeRules(Redactor(), withheld=self.provisions.paths)
        found = self.snapshot.compare()
        first = await collect_work(self.git, self.worktree, self.base, "work\n", rules=rules, diff=found)
        again = await collect_work(self.git, self.worktree, self.base, "work\n", rules=rules)
        assert await self.paths(first.commit) == await self.paths(again.commit)
        assert (first.refused, first.left_out, first.notes) == (again.refused, again.left_out, again.notes)
        return first

    async def paths(self, commit: str | None) -> list[str]:
        """Return the paths of a commit, and of all earlier commits of the agent."""
        if commit is None:
            return []
        listed = await self.git("log", "--format=", "--name-only", "-z", "--no-renames", commit, f"^{self.base}")
        return sorted(set(listed.stdout.decode().split("\0")[:-1]))


@pytest.fixture
async def workspace(repository: Repository, tmp_path: Path, environ: dict[str, str]) -> Workspace:
    """Return a worktree of a repository with ignored user files, which tracks a folder instead of one of them."""
    repository.commit({".gitignore": ".env\n", "config/base.yaml": "a: 1\n"}, "more")
    top = repository.top
    (top / ".env").write_text("API_TOKEN=of-the-user-1\nDEBUG=1\n")
    (top / ".env").chmod(0o600)
    (top / "config/local.yaml").write_text("secret: user\n")
    folder = top / "vendor/a b*[c]"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/run").write_text("#!/bin/sh\n")
    (folder / "deep/run").chmod(0o755)
    (folder / "link").symlink_to("deep/run")
    (folder / "out").symlink_to("/etc/passwd")
    (top / "data/models").mkdir(parents=True)
    (top / "data/models/big").write_text("of the user\n")
    hub_fixture = await HubFixture.of(top, tmp_path / "council-home", environ)
    base = await hub_fixture.fetch()
    async with hub_fixture.open() as pool:
        worktree, checkout = await hub_fixture.begin(pool, "task", base)
        await pool.slots.detach(checkout)
    provisions = Provisions(top, COPIED, ("data/models",))
    return Workspace(hub_fixture.git, worktree, base, environ, provisions, checkout.contents.snapshot)


async def test_copies_equal_the_users_files(workspace: Workspace) -> None:
    """Files and nested folders; modes are kept, and links in a folder stay links."""
    reach = await workspace.provisions.install_into(workspace.tree, workspace.base, workspace.git)
    assert (workspace.tree / ".env").read_text() == "API_TOKEN=of-the-user-1\nDEBUG=1\n"
    assert stat.S_IMODE((workspace.tree / ".env").stat().st_mode) == 0o600
    assert (workspace.tree / "config/local.yaml").read_text() == "secret: user\n"
    folder = workspace.tree / "vendor/a b*[c]"
    assert os.access(folder / "deep/run", os.X_OK)
    assert [(folder / name).readlink() for name in ("link", "out")] == [Path("deep/run"), Path("/etc/passwd")]
    models = workspace.provisions.checkout / "data/models"
    assert (workspace.tree / "data/models").readlink() == models
    assert reach == PathAccess(readable=(models,))


async def test_provided_files_are_not_work(workspace: Workspace) -> None:
    """They are not reported either; all other files are collected."""
    await workspace.prepare()
    assert await workspace.collect() == CollectionResult(None)
    (workspace.tree / "config/new.yaml").write_text("b: 1\n")
    left = await workspace.collect()
    assert left == CollectionResult(left.commit)
    assert await workspace.paths(left.commit) == ["config/new.yaml"]


async def test_changes_of_provided_files_are_not_work(workspace: Workspace) -> None:
    """The session may change, delete and replace them; the next session gets the user's version again."""
    await workspace.prepare()
    (workspace.tree / ".env").write_text("API_TOKEN=of-the-agent\n")
    (workspace.tree / "config/local.yaml").unlink()
    shutil.rmtree(workspace.tree / "vendor/a b*[c]")
    (workspace.tree / "vendor/a b*[c]").write_text("a file\n")
    (workspace.tree / "data/models").unlink()
    (workspace.tree / "data/models").mkdir()
    (workspace.tree / "data/models/own").write_text("own\n")
    (workspace.tree / ".gitignore").write_text("!.env\n!*\n")
    left = await workspace.collect()
    assert left == CollectionResult(left.commit)
    assert await workspace.paths(left.commit) == [".gitignore"]
    await workspace.prepare()
    assert "of-the-user-1" in (workspace.tree / ".env").read_text()
    assert (workspace.tree / "config/local.yaml").exists()
    assert (workspace.tree / "vendor/a b*[c]/deep/run").exists()
    assert (workspace.tree / "data/models/big").read_text() == "of the user\n"


async def test_many_changes_next_to_provided_files_are_found(workspace: Workspace) -> None:
    """Even if there are too many to name one by one, and a .gitignore allows everything."""
    await workspace.prepare()
    (workspace.tree / ".gitignore").write_text("!.env\n!*\n")
    for number in range(150):
        (workspace.tree / f"{number}.txt").write_text("x\n")
        (workspace.tree / f"vendor/a b*[c]/{number}").write_text("x\n")
    left = await workspace.collect()
    assert left == CollectionResult(left.commit)
    assert await workspace.paths(left.commit) == sorted([".gitignore", *(f"{number}.txt" for number in range(150))])


async def test_full_scan_does_not_import_provided_files(workspace: Workspace) -> None:
    """A folder replaced by a link makes git scan the checkout, with a .gitignore that allows everything."""
    await workspace.prepare()
    (workspace.tree / ".gitignore").write_text("!.env\n!*\n")
    shutil.rmtree(workspace.tree / "src")
    (workspace.tree / "src").symlink_to("vendor")
    left = await workspace.collect()
    assert left == CollectionResult(left.commit)
    assert await workspace.paths(left.commit) == [".gitignore", "src", "src/app.py"]


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    "path",
    [
        ".env",
        "vendor/a b*[c]/deep/run",
        *(pytest.param(path, marks=pytest.mark.slow) for path in ("config/local.yaml", "data/models")),
    ],
)
async def test_forced_commit_of_provided_files_is_not_imported(workspace: Workspace, path: str) -> None:
    """The agent's own commits are dropped then; the rest of its work is kept."""
    await workspace.prepare()
    (workspace.tree / "new.txt").write_text("new\n")
    workspace.agent("add", "--force", "--", f":(literal){path}", "new.txt")
    workspace.agent("commit", "--quiet", "--message", "mine")
    left = await workspace.collect()
    assert await workspace.paths(left.commit) == ["new.txt"]
    assert not left.complete
    assert "worktrees.copy" in "".join(left.notes)
    listed = await workspace.git("rev-list", "--objects", "--all")
    assert b"local.yaml" not in listed.stdout


async def test_link_in_place_of_the_state_folder_is_not_followed(workspace: Workspace, tmp_path: Path) -> None:
    """It can't land, and the next session writes nothing through it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    await workspace.prepare()
    shutil.rmtree(workspace.tree / "config")
    (workspace.tree / "config").symlink_to(outside)
    left = await workspace.collect()
    assert left.left_out == ("config",)
    assert "config/local.yaml" in (left.refused or "")
    assert left.commit is None
    shutil.rmtree(workspace.tree / "vendor")
    (workspace.tree / "vendor").symlink_to(outside)
    await workspace.prepare()
    assert not list(outside.iterdir())
    assert not (workspace.tree / "config").is_symlink()
    assert (workspace.tree / "vendor/a b*[c]/deep/run").exists()


async def test_link_in_place_of_state_is_not_written_through(workspace: Workspace, tmp_path: Path) -> None:
    """A linked file or folder outside stays unchanged."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept\n")
    await workspace.prepare()
    for path, target in ((".env", outside / "file"), ("config/local.yaml", outside / "none")):
        (workspace.tree / path).unlink()
        (workspace.tree / path).symlink_to(target)
    shutil.rmtree(workspace.tree / "vendor/a b*[c]")
    (workspace.tree / "vendor/a b*[c]").symlink_to(outside)
    await workspace.prepare()
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "kept\n"
    assert not (workspace.tree / ".env").is_symlink()


async def test_committed_link_in_place_of_the_state_folder_is_not_imported(workspace: Workspace) -> None:
    """In the user's checkout git would put it in place of the user's file."""
    shutil.rmtree(workspace.tree / "config")
    (workspace.tree / "config").symlink_to("/etc")
    workspace.agent("add", "--all")
    workspace.agent("commit", "--quiet", "--message", "mine")
    left = await workspace.collect()
    assert left.commit is None
    assert "config" in "".join(left.notes)


async def test_missing_source_has_a_remedy(workspace: Workspace) -> None:
    """The user may have deleted it meanwhile."""
    (workspace.provisions.checkout / ".env").unlink()
    reported = str(await workspace.find_refusal())
    assert reported.startswith("`worktrees.copy`: '.env' does not exist in ")
    assert "create it, or remove it from the configuration" in reported
    assert not (workspace.tree / ".env").exists()


async def test_link_in_the_path_of_the_source_is_rejected(workspace: Workspace, tmp_path: Path) -> None:
    """A landing may have replaced a folder with a link to anywhere; a named link itself is the user's choice."""
    top, elsewhere = workspace.provisions.checkout, tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "local.yaml").write_text("of somebody\n")
    shutil.rmtree(top / "config")
    (top / "config").symlink_to(elsewhere)
    assert "'config/local.yaml' goes through the link 'config'" in str(await workspace.find_refusal())
    (top / "config").unlink()
    (top / "config").mkdir()
    (top / "config/local.yaml").symlink_to(elsewhere / "local.yaml")
    shutil.rmtree(top / "data/models")
    (top / "data/models").symlink_to(elsewhere)
    reach = await workspace.provisions.install_into(workspace.tree, workspace.base, workspace.git)
    assert reach == PathAccess(readable=(elsewhere,))
    assert (workspace.tree / "config/local.yaml").read_text() == "of somebody\n"
    assert not (workspace.tree / "config/local.yaml").is_symlink()
    workspace.provisions = replace(workspace.provisions, hidden=(elsewhere / "deeper",))
    assert "`worktrees.link`: 'data/models' contains files hidden from sessions" in str(await workspace.find_refusal())


@pytest.mark.parametrize("path", ["config", "config/base.yaml"])
async def test_tracked_files_are_not_overwritten(workspace: Workspace, path: str) -> None:
    """Otherwise each session would seem to have changed them."""
    workspace.provisions = Provisions(workspace.provisions.checkout, (path,))
    assert "is already in the commit: remove it from `worktrees.copy`" in str(await workspace.find_refusal())


async def test_tracked_link_in_the_path_stays(workspace: Workspace, repository: Repository) -> None:
    """It belongs to the commit; the message suggests naming the folder itself."""
    (repository.top / "conf").symlink_to("config")
    base = repository.commit({}, "a link")
    await UpstreamRepository.of(str(repository.top), is_local=True, git=workspace.git).fetch(
        "main", internal_ref_name("run1", "base")
    )
    workspace.base, workspace.provisions = base, Provisions(repository.top, ("conf/local.yaml",))
    assert "'conf' is not a folder in the commit" in str(await workspace.find_refusal())


async def test_pipe_is_not_waited_for(workspace: Workspace) -> None:
    (workspace.provisions.checkout / ".env").unlink()
    os.mkfifo(workspace.provisions.checkout / ".env")
    assert "neither a file nor a folder" in str(await workspace.find_refusal())
    assert await workspace.provisions.secrets() == frozenset()


async def test_live_diff_excludes_provided_files(workspace: Workspace) -> None:
    """Neither their content nor a line about them."""
    await workspace.prepare()
    rules = IntakeRules(Redactor(), withheld=workspace.provisions.paths)
    assert await diff_session(workspace.git, workspace.worktree, workspace.base, rules=rules) == b""


async def test_secret_values_in_provided_files_are_found(workspace: Workspace) -> None:
    """In a named file of any name, and in secret files of a folder, copied or linked."""
    top = workspace.provisions.checkout
    (top / "config/local.yaml").write_text("export DB_PASSWORD='not-to-be-seen'\nDB_PASSWORD_FILE=/run/secrets/dbpw\n")
    (top / "vendor/a b*[c]/prod.env").write_text('A_KEY="in-the-folder"\n')
    (top / "vendor/a b*[c]/text").write_text("B_KEY=no-such-file\n")
    (top / "data/models/.env").write_text("C_KEY=behind-the-link\n")
    (top / "vendor/a b*[c]/.env").symlink_to("/dev/zero")
    assert await workspace.provisions.secrets() == {
        "of-the-user-1",
        "not-to-be-seen",
        "in-the-folder",
        "behind-the-link",
    }
    gone = Provisions(top, ("gone", "gone/deeper"), ("config/base.yaml/x",))
    assert await gone.secrets() == frozenset()


async def test_earlier_untracked_files_may_change(workspace: Workspace) -> None:
    """A kept cache, or setup files: as git without stamps finds them."""
    await workspace.prepare()
    (workspace.tree / ".gitignore").write_text(".env\ncache\n")
    workspace.agent("add", "--all", ".gitignore")
    workspace.agent("commit", "--quiet", "--message", "ignore")
    (workspace.tree / "cache").write_text("1\n")
    stamps = TreeSnapshot.capture(workspace.tree)
    assert stamps is not None
    workspace.snapshot = stamps
    (workspace.tree / "cache").write_text("2\n")
    (workspace.tree / "README.md").write_text("work\n")
    left = await workspace.collect()
    assert left == CollectionResult(left.commit)
    assert await workspace.paths(left.commit) == [".gitignore", "README.md"]
