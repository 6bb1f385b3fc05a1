"""Collecting work from folders and files whose rights the agent has taken away."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.domain.security.secrets import Redactor
from orchestrator.errors import GitError
from orchestrator.repo.git.command import Git
from orchestrator.repo.intake.collect import CollectionResult, collect_work
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.worktrees.files.change_detection import TreeSnapshot
from orchestrator.repo.worktrees.worktrees import Worktree
from tests.conftest import Repository
from tests.hub_fixture import HubFixture

pytestmark = pytest.mark.extended

RULES = IntakeRules(Redactor([]))
ROOT = Path(__file__).parents[3]
#: A user id that owns nothing.
USER = 54321
MODES = [0, 0o111, 0o444, 0o666]


@pytest.fixture
async def session(
    repository: Repository, tmp_path: Path, environ: dict[str, str]
) -> tuple[Git, Worktree, str, TreeSnapshot]:
    """A worktree with tracked files in folders, and its snapshot."""
    repository.commit({"old/a": "a\n", "old/deep/b": "b\n", "file": "f\n"}, "more")
    yard = await HubFixture.of(repository.top, tmp_path / "council-home", environ)
    base = await yard.fetch()
    async with yard.open() as pool:
        worktree, checkout = await yard.begin(pool, "task", base)
        await pool.slots.detach(checkout)
    return yard.git, worktree, base, checkout.contents.snapshot


async def _collect(
    session: tuple[Git, Worktree, str, TreeSnapshot], *, with_diff: bool
) -> tuple[CollectionResult, str]:
    git, worktree, base, snapshot = session
    diff = snapshot.compare() if with_diff else None
    work = await collect_work(git, worktree, base, "work\n", rules=RULES, diff=diff)
    changes = await git("diff-tree", "-r", "--raw", "--abbrev=7", "--name-status", base, work.commit or base)
    return work, changes.stdout.decode()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("folder", ["", "old", "new/deep"])
@pytest.mark.parametrize("with_diff", [True, False])
async def test_work_in_inaccessible_folder_is_collected(
    session: tuple[Git, Worktree, str, TreeSnapshot], folder: str, mode: int, with_diff: bool
) -> None:
    """Whichever rights of its owner a folder lacks, its changes are in the commit, and nothing is deleted."""
    tree = session[1].tree
    (tree / "new/deep").mkdir(parents=True)
    for name in ("old/a", "old/deep/b", "new/a", "new/deep/b", "top"):
        (tree / name).write_text("changed\n")
    (tree / folder).chmod(mode)
    work, changes = await _collect(session, with_diff=with_diff)
    assert work == CollectionResult(work.commit)
    assert changes.splitlines() == ["A\tnew/a", "A\tnew/deep/b", "M\told/a", "M\told/deep/b", "A\ttop"]


@pytest.mark.parametrize("with_diff", [True, False])
async def test_unreadable_files_are_collected_with_their_executable_bit(
    session: tuple[Git, Worktree, str, TreeSnapshot], with_diff: bool
) -> None:
    """Only the right to read is restored: a file that can be executed stays executable, another one does not."""
    git, worktree, _, _ = session
    for name, mode in {"file": 0, "plain": 0o022, "program": 0o111, "old/a": 0o111}.items():
        (worktree.tree / name).write_text(f"{name}\n")
        (worktree.tree / name).chmod(mode)
    work, _ = await _collect(session, with_diff=with_diff)
    assert work == CollectionResult(work.commit)
    names = ("file", "old/a", "plain", "program")
    listed = (await git("ls-tree", "-r", "--format=%(objectmode) %(path)", work.commit or "", *names)).stdout.decode()
    assert listed.splitlines() == ["100644 file", "100755 old/a", "100644 plain", "100755 program"]


@pytest.mark.parametrize("mode", [0, 0o444])
@pytest.mark.parametrize("folder", ["", "refs/heads", "objects"])
async def test_commits_in_inaccessible_session_repository_are_kept(
    session: tuple[Git, Worktree, str, TreeSnapshot], folder: str, mode: int
) -> None:
    """A branch of the agent's is salvaged although its repository was made unreadable."""
    git, worktree, base, _ = session
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    (worktree.tree / "file").write_text("changed\n")
    for command in (["checkout", "--quiet", "-b", "other"], [*identity, "commit", "--quiet", "--all", "-m", "other"]):
        subprocess.run(["git", *command], cwd=worktree.tree, check=True)
    (worktree.git_dir / folder).chmod(mode)
    work, _ = await _collect(session, with_diff=True)
    assert work.complete
    assert work.salvaged == ("refs/salvage/run1/task.1/other",) or work.commit is not None
    kept = work.salvaged[0] if work.salvaged else work.commit or ""
    assert await git.line("diff-tree", "-r", "--name-only", base, kept) == "file"


async def test_links_keep_the_rights_of_their_targets(
    session: tuple[Git, Worktree, str, TreeSnapshot], tmp_path: Path
) -> None:
    """Neither a link to a folder nor one to a file gives anybody rights outside of the worktree."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("secret\n")
    (outside / "file").chmod(0)
    tree = session[1].tree
    (tree / "new").mkdir()
    for path in (tree / "link", tree / "new/link", tree / "old/link"):
        path.symlink_to(outside)
        path.with_name("file-link").symlink_to(outside / "file")
    outside.chmod(0o100)
    await _collect(session, with_diff=True)
    await _collect(session, with_diff=False)
    assert outside.stat().st_mode & 0o777 == 0o100
    assert (outside / "file").stat().st_mode & 0o777 == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("with_diff", [True, False])
async def test_files_of_another_owner_are_collected_by_root(
    session: tuple[Git, Worktree, str, TreeSnapshot], with_diff: bool
) -> None:
    """Confined git has none of root's capabilities: it could not open them, and would skip the folder."""
    tree = session[1].tree
    (tree / "new").mkdir()
    for name in ("new/a", "top"):
        (tree / name).write_text("x\n")
        (tree / name).chmod(0o600)
        os.chown(tree / name, USER, USER)
    os.chown(tree / "new", USER, USER)
    (tree / "new").chmod(0o700)
    work, changes = await _collect(session, with_diff=with_diff)
    assert work == CollectionResult(work.commit)
    assert changes.splitlines() == ["A\tnew/a", "A\ttop"]


async def test_git_in_inaccessible_folder_names_the_folder(tmp_path: Path, environ: dict[str, str]) -> None:
    """It is a failure of this command, not of the installed git, which would end the run."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0)
    git = Git(None, environ=environ).confined(readable=(folder,))
    with pytest.raises(GitError, match=r"can't open folder .*/folder|Permission denied"):
        await git("status", cwd=folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every folder")
@pytest.mark.parametrize("name", ["trusted.git", "hub.git", "hub.git/objects"])
async def test_inaccessible_internal_repository_is_no_damage(
    session: tuple[Git, Worktree, str, TreeSnapshot], name: str
) -> None:
    """Otherwise the command ends with an internal error, or recommends to move the repository away."""
    git, _, base, _ = session
    assert git.git_dir is not None
    folder = git.git_dir.parent / name
    mode = folder.stat().st_mode
    folder.chmod(0)
    try:
        with pytest.raises(PermissionError) as raised:
            await git("cat-file", "-e", base)
    finally:
        folder.chmod(mode)
    assert Path(raised.value.filename).is_relative_to(git.git_dir)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder of an ordinary user's."""
    folder = Path(tempfile.mkdtemp(prefix="council-user-"))
    os.chown(folder, USER, USER)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests of this file already run as an ordinary user")
def test_ordinary_user_gets_the_same_results(public_folder: Path) -> None:
    """All tests above, without root's right to open everything."""

    def run_as_user(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": os.environ["PATH"], "HOME": str(public_folder), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            user=USER,
            group=USER,
            extra_groups=[],
        )

    try:
        run_as_user("-c", "import orchestrator, pytest").check_returncode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("another user can't read the tests or their environment")
    options = ("-q", "-p", "no:cacheprovider", f"--basetemp={public_folder}/tests")
    done = run_as_user("-m", "pytest", *options, __file__)
    assert done.returncode == 0, done.stdout[-5000:]
