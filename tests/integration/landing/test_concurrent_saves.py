"""Files that the user saves while a landing updates their checkout."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator.errors import GitError
from orchestrator.repo.landing.target_branch import DeferredLanding, Landed
from orchestrator.repo.source.checkout_update import read_stamp, replace_files, return_files
from orchestrator.system.process import kill_by_environment
from tests.conftest import Repository
from tests.landings import Landing, recorded
from tests.merge_leases import hold_merge_lease

#: A filter of the user's that saves a file while git writes another one, at its `nth` call in a landing.
FILTER = """#!/bin/sh
echo >>{folder}/calls
[ "$(wc -l <{folder}/calls)" -ne {nth} ] || (cd {top} && {save})
exec cat
"""

#: The user's saves, with the path that `git status` then lists.
SAVES = {
    "in place": ("echo mine >src/app.py", "src/app.py"),
    "renamed over": ("echo mine >.saved && mv .saved src/app.py", "src/app.py"),
    "removed by the landing": ("echo mine >gone.txt", "gone.txt"),
    "added by the landing": ("echo mine >new.txt", "new.txt"),
    "in a folder that the landing adds": ("mkdir -p a/b && echo mine >a/b/new.txt", "a/b/new.txt"),
    "a file in place of that folder": ("rm -rf a && echo mine >a", "a"),
}


def filter_readme(repository: Repository, tmp_path: Path, save: str, nth: int) -> None:
    """Set up the filter for README.md, which git writes before most other files of a landing."""
    program = tmp_path / "filter"
    program.write_text(FILTER.format(folder=tmp_path, nth=nth, top=repository.top, save=save))
    program.chmod(0o755)
    (tmp_path / "calls").unlink(missing_ok=True)
    (repository.top / ".git/info").mkdir(exist_ok=True)
    (repository.top / ".git/info/attributes").write_text("README.md filter=saving\n")
    repository.git("config", "filter.saving.smudge", str(program))


def check_saved(repository: Repository, path: str) -> None:
    """Check that the user's file is the only change, and that nothing is locked or left over."""
    assert (repository.top / path).read_text() == "mine\n"
    (line,) = repository.git("status", "--porcelain", "--untracked-files=all").splitlines()
    assert line[2:].strip() == path
    assert not [path for path in (repository.top / ".git").iterdir() if path.name.startswith(("council-", "index."))]


@pytest.mark.parametrize(("save", "path"), SAVES.values(), ids=SAVES)
async def test_save_during_a_landing_is_kept(repository: Repository, tmp_path: Path, save: str, path: str) -> None:
    """Git compares all files, then writes them: it would overwrite what is saved in between."""
    landing = await Landing.prepare(repository, tmp_path)
    filter_readme(repository, tmp_path, save, nth=1)
    async with hold_merge_lease(landing.source, "main") as lease:
        result = await landing.target.move(lease, [landing.merge])
        assert isinstance(result, DeferredLanding)
        assert path in result.reason
        check_saved(repository, path)
        repository.git("stash", "--quiet", "--include-untracked")
        assert isinstance(await landing.target.move(lease, [landing.merge]), Landed)
    landing.check({}, {})


@pytest.mark.parametrize(("save", "path"), SAVES.values(), ids=SAVES)
async def test_save_during_the_undo_of_a_landing_is_kept(
    repository: Repository, tmp_path: Path, save: str, path: str
) -> None:
    """The undo of a refused push writes files, too."""
    landing = await Landing.prepare(repository, tmp_path)
    filter_readme(repository, tmp_path, save, nth=2)
    refuse = repository.top / ".git/hooks/reference-transaction"
    refuse.parent.mkdir(exist_ok=True)
    refuse.write_text('#!/bin/sh\n[ "$1" != prepared ] || ! grep -q refs/heads/main || exit 1\n')
    refuse.chmod(0o755)
    async with hold_merge_lease(landing.source, "main") as lease:
        assert isinstance(await landing.target.move(lease, [landing.merge]), DeferredLanding)
    refuse.unlink()
    check_saved(repository, path)


#: What may happen to a file between its comparison and its replacement.
CHANGES = {
    "in place": "echo mine >{}",
    "renamed over": "echo mine >saved && mv saved {}",
    "deleted": "rm {}",
    "made a link": "ln -sf elsewhere {}",
    "made a folder": "rm {0} && mkdir {0} && echo mine >{0}/mine",
    "made executable": "chmod +x {}",
}


def describe(path: Path) -> object:
    """Return all that counts of a file."""
    if path.is_symlink():
        return path.readlink()
    if path.is_dir():
        return {child.name: describe(child) for child in path.iterdir()}
    return (path.read_text(), path.stat().st_mode) if path.exists() else None


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same file system", "another file system"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_file_that_changed_since_the_comparison_is_kept(tmp_path: Path, change: str, elsewhere: bool) -> None:
    """Files of a linked worktree may be on another file system than its git directory."""
    if elsewhere and (not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev):
        pytest.skip("needs a second file system")
    top = tmp_path / "top"
    staging = Path("/dev/shm", f"council-test-{os.getpid()}") if elsewhere else tmp_path / "staging"
    for folder in (top, staging / "new"):
        folder.mkdir(parents=True)
        for name in ("changed", "removed", "same"):
            (folder / name).write_text(folder.name)
    (staging / "new/removed").unlink()
    (staging / "new/added").write_text("new")
    try:
        names = ["added", "changed", "removed", "same"]
        stamps = {name: read_stamp(str(top), name) for name in names}
        for name in ("changed", "removed"):
            subprocess.run(change.format(name), shell=True, cwd=top, check=True)
        before = {name: describe(top / name) for name in ("changed", "removed")}
        assert sorted(replace_files(str(top), str(staging), stamps)) == ["changed", "removed"]
        assert {name: describe(top / name) for name in ("changed", "removed")} == before
        assert [(top / name).read_text() for name in ("added", "same")] == ["new", "new"]
    finally:
        subprocess.run(["rm", "-r", str(staging)], check=True)


def test_files_that_an_interrupted_update_moved_away_return(tmp_path: Path) -> None:
    """It was killed before it compared them; files that were replaced or created since stay."""
    top, old = tmp_path / "top", tmp_path / "staging/old"
    (old / "a/b").mkdir(parents=True)
    top.mkdir()
    (old / "a/b/file").write_text("mine")
    (old / "a/link").symlink_to("b")
    (old / "replaced").write_text("old")
    (top / "replaced").write_text("new")
    return_files(str(top), str(tmp_path / "staging"))
    assert (top / "a/b/file").read_text() == "mine"
    assert (top / "a/link").readlink() == Path("b")
    assert (top / "replaced").read_text() == "new"


def test_landing_does_not_write_through_a_link_of_the_users(tmp_path: Path) -> None:
    """A link that replaces a folder is in the way of the files in it."""
    top, new, elsewhere = tmp_path / "top", tmp_path / "staging/new/a", tmp_path / "elsewhere"
    for folder in (top, new, elsewhere):
        folder.mkdir(parents=True)
    (new / "file").write_text("new")
    (top / "a").symlink_to(elsewhere)
    assert replace_files(str(top), str(tmp_path / "staging"), {"a/file": None}) == ["a/file"]
    assert not list(elsewhere.iterdir())


#: Saves files as an editor does, by renaming, from some moment of the update on. Prints each name that it saved.
SAVER = """
import glob, os, random, sys, time
chance = random.Random(int(sys.argv[1]))
print("started", flush=True)
deadline = time.monotonic() + 2
while not glob.glob(".git/council-*/new") and time.monotonic() < deadline:
    pass
time.sleep(chance.uniform(0, 0.3))
for name in chance.sample(sorted(os.listdir("many")), 30):
    with open("saved", "w") as file:
        file.write("mine\\n")
    os.replace("saved", f"many/{name}")
    print(name, flush=True)
"""


@pytest.mark.extended
@pytest.mark.parametrize("is_killed", [False, True], ids=["lives", "killed"])
@pytest.mark.parametrize("seed", range(5))
async def test_saves_at_any_time_of_a_large_landing_are_kept(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, is_killed: bool
) -> None:
    """Whether the landing succeeds or not, the checkout has the user's last version of each file."""
    names = [f"many/{number:04}" for number in range(1500)]
    repository.commit(dict.fromkeys(names, "old\n"), "many")
    monkeypatch.setattr("tests.landings.OURS", dict.fromkeys(names, "new\n"))
    landing = await Landing.prepare(repository, tmp_path)
    repository.environ["COUNCIL_TEST_MARK"] = mark = str(tmp_path)
    kill = threading.Timer(
        random.Random(seed).uniform(0.1, 0.6), lambda: kill_by_environment(f"COUNCIL_TEST_MARK={mark}".encode())
    )
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(seed)], cwd=repository.top, stdout=subprocess.PIPE, text=True
    )
    assert saver.stdout is not None
    with saver:
        assert saver.stdout.readline() == "started\n"
        if is_killed:
            kill.start()
        async with hold_merge_lease(landing.source, "main") as lease:
            with suppress(GitError):
                await landing.target.move(lease, [landing.merge])
            if is_killed:
                kill.join()
            await landing.target.recover(lease, recorded(landing.merge, 1), [landing.merge.new])
        saved = saver.stdout.read().split()
    has_landed = repository.git("rev-parse", "main") == landing.merge.new
    for name in names:
        content = "mine\n" if name.removeprefix("many/") in saved else "new\n" if has_landed else "old\n"
        assert (repository.top / name).read_text() == content, name
    listed = repository.git("status", "--porcelain", "--untracked-files=all").splitlines()
    assert sorted(line[3:] for line in listed) == sorted(f"many/{name}" for name in saved)
    assert not list((repository.top / ".git").glob("*.lock"))
