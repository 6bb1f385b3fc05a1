"""`council clean` removes leftovers once and names the reason; needed files and unlanded work stay."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.topics.cleanup import Cleaner
from orchestrator.domain.runs.leftovers import STALE_FILE_SECONDS, Leftover, LeftoverKind
from orchestrator.project import Project
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from orchestrator.system.file_lock import FileLock
from tests.conftest import CommandResult, Repository
from tests.waiting import wait_for

#: Changes a file and leaves a key next to it, so that its worktree is preserved.
KEEPS: dict[str, Any] = {"id": "keeps", "prompt": "write good.txt g\nwrite .env KEY=1", "attempts": 1}


def found(ended: CommandResult) -> list[tuple[str, str]]:
    """Return status and last path component of everything that `clean --json` listed except worktree slots."""
    return sorted((one["status"], Path(one["name"]).name) for one in ended.result["found"] if one["kind"] != "slot")


def slot_statuses(ended: CommandResult) -> set[str]:
    """Return the status of each worktree slot that `clean --json` listed."""
    return {one["status"] for one in ended.result["found"] if one["kind"] == "slot"}


def nothing(ended: CommandResult) -> bool:
    """Return whether `clean --json` listed only worktree slots that are ready for the next run."""
    return found(ended) == [] and slot_statuses(ended) <= {"ready"}


def home_of(repository: Repository) -> Path:
    """Return the folder of all hubs."""
    return Path(repository.environ["COUNCIL_HOME"])


def hub_of(repository: Repository) -> Hub:
    """Return the hub of the repository."""
    [root] = (path for path in home_of(repository).iterdir() if path.is_dir())
    return Hub(root)


def trees(repository: Repository) -> list[str]:
    """Return the names of all worktrees."""
    return sorted(path.name for path in home_of(repository).glob("*/sessions/*/*"))


def age(path: Path) -> Path:
    """Set the times of a path far into the past."""
    then = time.time() - 2 * STALE_FILE_SECONDS
    os.utime(path, (then, then), follow_symlinks=False)
    return path


def run_once(repository: Repository, *tasks: dict[str, Any], code: int = 0) -> str:
    """Run tasks to their end and return the run's id."""
    ended = repository.council("run", str(repository.configure(tasks)), "--json")
    assert ended.code == code, ended
    return str(ended.result["run"])


def run_outside(repository: Repository, *arguments: str) -> CommandResult:
    """Run the command in a folder that is no project."""
    folder = repository.top.parent / "run_outside"
    folder.mkdir(exist_ok=True)
    return Repository(folder, repository.environ, repository.spawns).council(*arguments)


@pytest.mark.parametrize("option", ["--runs", "--logs"])
def test_age_of_runs_is_refused_outside_a_project(repository: Repository, option: str) -> None:
    """Nothing would be found, even with `COUNCIL_STATE`: the logs are in the project."""
    refused = run_outside(repository, "clean", option, "1ms", "--yes")
    assert refused.code == 2
    assert "cd to the repository of a run" in refused.stderr


@pytest.mark.extended
def test_idle_worktrees_are_counted_with_their_repositories(repository: Repository) -> None:
    """`--pool` removes those of all repositories."""
    clone = repository.top.parent / "clone"
    repository.git("clone", ".", str(clone))
    for one in (repository, Repository(clone, repository.environ, repository.spawns)):
        run_once(one, {"id": "a", "prompt": "write a.txt a"})
    printed = repository.council("clean", "--dry-run").stdout
    assert re.search(r"^2 idle worktrees \(.+\) of 2 repositories ready for the next run", printed, re.MULTILINE)


async def test_clean_removes_a_finished_run_completely(repository: Repository) -> None:
    """Except worktree slots that are ready for the next run, unless they are named; with and without a project."""
    run_once(repository, {"id": "a", "prompt": "write a.txt a"})
    for listed in (repository.council("clean", "--json"), run_outside(repository, "clean", "--json")):
        assert (listed.code, listed.result["freed"], found(listed), slot_statuses(listed)) == (0, 0, [], {"ready"})
    printed = repository.council("clean", "--yes", "--preserved").stdout
    assert "no leftovers to remove" in printed
    assert re.search(r"^1 idle worktree \(.+\) ready for the next run: --pool removes it$", printed, re.MULTILINE)
    await repository.assert_invariants()
    assert list(hub_of(repository).slots.iterdir())
    removed = repository.council("clean", "--yes", "--pool", "--json")
    assert (removed.code, removed.result["freed"]) == (0, sum(one["bytes"] for one in listed.result["found"]))
    assert not list(hub_of(repository).slots.iterdir())
    assert repository.council("clean", "--json").result == {"found": [], "freed": 0, "exit": 0}
    await repository.assert_invariants()


async def test_worktree_of_an_ended_task_is_removed_once(repository: Repository) -> None:
    """Killed after the end of its task was recorded; the worktree is listed, removed, and not found again."""
    tasks: list[dict[str, Any]] = [
        {"id": "done", "prompt": "write a.txt a\nexit 1", "attempts": 1},
        {"id": "waits", "prompt": "hang"},
    ]
    config = repository.configure(tasks, capacity=1)
    assert repository.council("run", str(config), failpoints="worktree.removed=kill").code == -signal.SIGKILL
    # The state after a slightly earlier kill: the task has ended, its worktree exists.
    [folder] = home_of(repository).glob("*/sessions")
    run = repository.council("status", "--json").result["run"]
    [user] = home_of(repository).glob("*/slots/*/user")
    assert user.read_text() == str(folder / run / "done.1")
    (folder / run / "done.1").mkdir(parents=True)
    (folder / run / "done.1" / "slot").symlink_to(user.parent)
    (user.parent / "tree" / "a.txt").write_text("a" * 5000)
    listed = repository.council("clean", "--json")
    assert listed.code == 0
    assert [one for one in found(listed) if not one[1].startswith("done.1-")] == [("left_over", "done.1")]  # and trash
    assert str(user.parent) not in {one["name"] for one in listed.result["found"]}
    [one] = (one for one in listed.result["found"] if one["kind"] == "worktree")
    assert one["bytes"] > 5000
    assert (one["run"], one["task"], one["removed"]) == (run, "done", False)
    printed = repository.council("clean")
    assert "task finished, and its work is saved" in printed.stdout
    assert "add --yes" in printed.stdout
    assert "removed" not in repository.council("clean", "--dry-run", "--yes").stdout
    assert trees(repository) == ["done.1"]
    removed = repository.council("clean", "--yes", "--json")
    assert (removed.code, removed.result["freed"]) == (0, sum(one["bytes"] for one in listed.result["found"]))
    assert all(one["removed"] for one in removed.result["found"])
    assert not list(folder.iterdir())
    assert not list(folder.with_name("slots").iterdir())
    assert not list(folder.with_name("trash").iterdir())
    assert repository.council("clean", "--yes", "--json").result["found"] == []
    assert repository.council("salvage", "show", "done/1").code == 0


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    "failpoint",
    [
        "session.spawned",
        "work.committed",
        *(pytest.param(step, marks=pytest.mark.slow) for step in ("worktree.partly_made", "session.ended")),
    ],
)
async def test_interrupted_run_can_resume_after_clean(repository: Repository, failpoint: str) -> None:
    """The state that a resume needs is only reported, with every option; cancelled instead, everything is removed."""
    config = repository.configure([{"id": "a", "prompt": "write a.txt a"}, {"id": "b", "prompt": "write b.txt b"}])
    assert repository.council("run", str(config), failpoints=f"{failpoint}=kill").code == -signal.SIGKILL
    before = trees(repository)
    slots = {path.readlink() for path in hub_of(repository).sessions.glob("*/*/slot")}
    assert slots
    cleaned = repository.council("clean", "--yes", "--preserved", "--logs", "1ms", "--json")
    assert cleaned.code == 0
    assert found(cleaned) == [("needed", name) for name in before]
    assert trees(repository) == before
    # Only the slots that sessions have are kept.
    assert slot_statuses(cleaned) <= {"left_over"}
    assert set(hub_of(repository).slots.iterdir()) == slots
    [run] = {one["run"] for one in cleaned.result["found"] if one["kind"] == "worktree"}
    assert f"needed by `council resume {run}`" in repository.council("clean").stdout
    ended = repository.council("resume", "--json")
    assert ended.states == {"a": "landed", "b": "landed"}, ended
    assert nothing(repository.council("clean", "--json"))
    await repository.assert_invariants()


@pytest.mark.extended
async def test_cancelled_killed_run_leaves_nothing(repository: Repository) -> None:
    """The cancel preserves the work; `clean` finds nothing more, and the preserved work stays."""
    config = repository.configure([{"id": "a", "prompt": "write a.txt a\nhang"}])
    child = repository.start("run", str(config))
    wait_for(lambda: list(home_of(repository).glob("*/sessions/*/a.1/slot/tree/a.txt")))
    child.kill()
    child.communicate()
    assert repository.council("cancel", "--yes", "--json").states == {"a": "cancelled"}
    assert repository.council("clean", "--yes", "--preserved", "--json").result["found"] == []
    assert "a.txt" in repository.council("salvage", "show", "a/1").stdout
    await repository.assert_invariants()


async def test_active_run_is_not_cleaned(repository: Repository) -> None:
    """Nothing of an active run is listed, and the run ends normally."""
    tasks = [KEEPS, {"id": "long", "prompt": "write l.txt l\nhang"}]
    child = repository.start("run", str(repository.configure(tasks)), "--json")
    wait_for(lambda: list(home_of(repository).glob("*/sessions/*/long.1/slot/tree/l.txt")))
    wait_for(lambda: repository.council("status", "--json").states["keeps"] == "failed")
    cleaned = repository.council("clean", "--yes", "--preserved", "--logs", "1ms", "--json")
    assert (cleaned.code, cleaned.result["found"]) == (0, [])
    assert run_outside(repository, "clean", "--yes", "--preserved", "--json").result["found"] == []
    assert [name for name in trees(repository) if ".0.check" not in name] == ["keeps.1", "long.1"]
    assert repository.council("cancel", "long").code == 0
    stdout, stderr = child.communicate(timeout=60)
    assert CommandResult(child.returncode, stdout, stderr).states == {"keeps": "failed", "long": "cancelled"}
    await repository.assert_invariants()


async def test_preserved_work_is_removed_only_on_request(repository: Repository) -> None:
    """A worktree with an uncommittable file is listed and stays; `--preserved` removes it, but no branch."""
    run_once(repository, KEEPS, code=1)
    cleaned = repository.council("clean", "--yes", "--json")
    assert (cleaned.code, found(cleaned), cleaned.result["freed"]) == (0, [("preserved", "keeps.1")], 0)
    assert trees(repository) == ["keeps.1"]
    printed = repository.council("clean", "--yes").stdout
    assert "kept: contains files that are not in any commit" in printed
    assert "--preserved removes it" in printed
    assert repository.council("clean", "--preserved", "--dry-run", "--yes").code == 0
    assert trees(repository) == ["keeps.1"]
    [kept] = hub_of(repository).sessions.glob("*/*/slot")
    slot = kept.readlink()
    assert slot.exists()
    cleaned = repository.council("clean", "--preserved", "--yes", "--json")
    assert [one["removed"] for one in cleaned.result["found"] if one["status"] == "preserved"] == [True]
    assert trees(repository) == []
    assert not slot.exists()
    assert [one["name"] for one in repository.council("salvage", "list", "--json").result["preserved"]] == ["keeps/1"]
    await repository.assert_invariants()


def damage(repository: Repository, event: bytes, at: int) -> None:
    """Flip a bit of the record of an event, `at` a byte of its line."""
    log = next((repository.top / ".council/state").glob("*/*.jsonl"))
    lines = log.read_bytes().splitlines(keepends=True)
    [index] = [number for number, line in enumerate(lines) if event in line]
    flipped = bytearray(lines[index])
    flipped[at] ^= 1
    lines[index] = bytes(flipped)
    log.write_bytes(b"".join(lines))


@pytest.mark.extended
async def test_damaged_record_proves_nothing(repository: Repository) -> None:
    """If a task is unreadable, its worktree is kept; if the list of runs is unreadable, no run counts as unknown."""
    run = run_once(repository, KEEPS, code=1)
    age(hub_of(repository).trusted / "refs/council" / run)
    damage(repository, b"task.failed", -3)
    cleaned = repository.council("clean", "--yes", "--json")
    assert found(cleaned) == [("preserved", "keeps.1")]
    assert "damaged" in next(one["reason"] for one in cleaned.result["found"] if one["kind"] == "worktree")
    for event in (b"run.created", b"run.finished"):  # everything that has the run's document
        damage(repository, event, 30)
    assert repository.council("runs", "--json").result["runs"] == []
    assert nothing(repository.council("clean", "--yes", "--preserved", "--json"))
    assert trees(repository) == ["keeps.1"]


async def test_hub_of_a_deleted_repository_is_removed(repository: Repository) -> None:
    """From any folder; a hub whose repository or state exists stays."""
    run_once(repository, {"id": "a", "prompt": "write a.txt a"})
    root = hub_of(repository).root
    aside = repository.top.parent / "aside"
    (repository.top / ".git").rename(aside)
    assert nothing(run_outside(repository, "clean", "--json"))
    shutil.rmtree(repository.top)
    listed = run_outside(repository, "clean", "--json")
    assert found(listed) == [("left_over", root.name)]
    assert listed.result["found"][0]["reason"] == f"{repository.top / '.git'} no longer exists; no unmerged work"
    assert run_outside(repository, "clean", "--yes").code == 0
    assert not root.exists()
    assert run_outside(repository, "clean", "--json").result["found"] == []


async def test_hub_of_a_deleted_repository_with_work_stays(repository: Repository) -> None:
    """Its preserved branches and worktrees may be the only copy of the work."""
    run_once(repository, KEEPS, code=1)
    shutil.rmtree(repository.top)
    listed = run_outside(repository, "clean", "--yes", "--json")
    assert [one["status"] for one in listed.result["found"]] == ["preserved"]
    assert listed.result["found"][0]["reason"].endswith("; unmerged work (refs: 1, worktrees: 1)")
    assert hub_of(repository).root.exists()
    assert run_outside(repository, "clean", "--yes", "--preserved").code == 0
    assert not list(home_of(repository).glob("*/"))


async def test_unmounted_disk_is_not_a_deleted_repository(repository: Repository) -> None:
    """A hub whose repository was below a mount point that is not mounted now is not rated."""
    run_once(repository, {"id": "a", "prompt": "write a.txt a"})
    recorded = hub_of(repository).root / "origin.json"
    mount = Path(next(path for path in repository.top.parents if os.path.ismount(path)))
    recorded.write_text(recorded.read_text().replace(f'"{mount}"]', f'"{repository.top.parent}"]'))
    assert f'"{repository.top.parent}"]' in recorded.read_text()
    shutil.rmtree(repository.top)
    assert nothing(run_outside(repository, "clean", "--json"))


@pytest.mark.extended
async def test_hub_unknown_to_any_state_is_removed(repository: Repository) -> None:
    """With a deleted state the runs' worktrees count as work, their refs do not; another project may know them."""
    old = run_once(repository, KEEPS, code=1)
    hub = hub_of(repository)
    repository.git("worktree", "add", "--quiet", "-b", "second", str(repository.top.parent / "second"))
    second = Repository(repository.top.parent / "second", repository.environ, repository.spawns)
    config = repository.configure([{"id": "b", "prompt": "write b.txt b"}], repo=str(second.top), target="out")
    assert second.council("run", str(config)).code == 0
    assert hub_of(repository) == hub
    shutil.rmtree(repository.top / ".council")
    assert found(second.council("clean", "--json")) != []
    new = run_once(repository, {"id": "a", "prompt": "write a.txt a"})
    age(hub.trusted / "refs/council" / old)
    for one in (second, repository):  # either hub might belong to the other
        assert nothing(one.council("clean", "--json"))
    shutil.rmtree(second.top / ".council")
    listed = repository.council("clean", "--json")
    assert found(listed) == [("left_over", old), ("preserved", "keeps.1")]
    assert repository.council("clean", "--yes").code == 0
    refs = Repository(hub.trusted, repository.environ, repository.spawns).git("for-each-ref", "--format=%(refname)")
    assert f"refs/council/{old}/" not in refs
    assert f"refs/council/{new}/" in refs
    assert f"refs/heads/council/{old}/keeps/1" in refs
    assert found(repository.council("clean", "--json")) == [("preserved", "keeps.1")]
    assert repository.council("clean", "--yes", "--preserved").code == 0
    assert trees(repository) == []


@pytest.mark.extended
async def test_leftovers_of_killed_commands_are_removed(repository: Repository) -> None:
    """Temporary files and locks in the hub and next to it: those of git at once, our own when old; nothing else."""
    run_once(repository, KEEPS, code=1)
    hub = hub_of(repository)
    session = next(hub.sessions.glob("*/*"))
    index = hub.indexes / f"{session.parent.name}-{session.name}"
    assert index.exists()
    left = [
        hub.objects / "pack/tmp_pack_Ab12cD",
        hub.trusted / "packed-refs.lock",
        index.with_name(f"{index.name}.live-ab12cd34"),
        index.with_name(f"{session.parent.name}-gone.1"),
        index.with_name(f"{session.parent.name}-gone.1.import"),
        hub.indexes / "merge-ab12cd34",
        repository.top / ".git/info/exclude.4711.new",
    ]
    for path in left:
        if path.name.startswith(("tmp", "packed", "exclude")) or path.name.endswith("gone.1"):
            path.write_text("x")
        else:
            (path / "sub").mkdir(parents=True)
    half_built = hub.root.with_name("other-0123456789ab.new")
    (half_built / "hub.git").mkdir(parents=True)
    for path in (index, hub.trusted / "config", session):
        age(path)
    assert found(repository.council("clean", "--json")) == sorted(
        [("preserved", session.name), *(("left_over", name) for name in (half_built.name, left[0].name, left[1].name))]
    )
    for path in left:
        age(path)
    names = sorted([*(path.name for path in left), half_built.name])
    listed = repository.council("clean", "--json")
    assert [name for status, name in found(listed) if status == "left_over"] == names
    assert repository.council("clean", "--yes").code == 0
    assert not [path for path in (*left, half_built) if path.exists()]
    assert index.exists()
    assert found(repository.council("clean", "--json")) == [("preserved", session.name)]
    await repository.assert_invariants()


async def test_hub_being_created_is_not_a_leftover(repository: Repository) -> None:
    home = home_of(repository)
    (home / "other-0123456789ab.new").mkdir(parents=True)
    async with FileLock(home / "other-0123456789ab.lock").hold():
        assert run_outside(repository, "clean", "--json").result["found"] == []
    assert len(run_outside(repository, "clean", "--json").result["found"]) == 1


@pytest.mark.extended
async def test_old_logs_are_removed_on_request(repository: Repository) -> None:
    """Logs of runs that ended before; the task's work and state stay, and logs of a run that has not ended."""
    old = run_once(repository, {"id": "a", "prompt": "write a.txt a\nprint hello"})
    config = repository.configure([{"id": "b", "prompt": "print hello\nhang"}])
    child = repository.start("run", str(config))
    wait_for(lambda: repository.spawns.exists() and " b " in repository.spawns.read_text())
    child.kill()
    child.communicate()
    logs = repository.top / ".council/logs"
    assert found(repository.council("clean", "--json", "--logs", "1d"))[0][0] == "needed"
    assert repository.council("clean", "--yes").code == 0
    assert len(list(logs.iterdir())) == 2
    assert repository.council("clean", "--yes", "--logs", "1ms").code == 0
    assert [path.name for path in logs.iterdir()] != [old]
    assert len(list(logs.iterdir())) == 1
    assert repository.council("logs", "a", "--run", old).code == 0
    refused = repository.council("clean", "--logs", "soon")
    assert (refused.code, "30m" in refused.stderr) == (2, True)
    assert repository.council("cancel", "--yes").code == 0


@contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Make a file that nobody can remove, not even root; skip if this is not supported."""
    if subprocess.run(["chattr", "+i", path], check=False, capture_output=True).returncode:
        pytest.skip("files can't be made immutable here")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield
    finally:
        moved = Path(f"/proc/self/fd/{descriptor}").readlink()
        subprocess.run(["chattr", "-i", moved], check=True)
        os.close(descriptor)


@pytest.mark.extended
async def test_unremovable_leftover_is_named(repository: Repository) -> None:
    """The exit code reports it, the rest is removed, and unreadable folders are no obstacle."""
    run_once(repository, KEEPS, {**KEEPS, "id": "other"}, code=1)
    closed = next(home_of(repository).glob("*/sessions/*/other.1/slot/tree")) / "closed"
    (closed / "deep").mkdir(parents=True)
    closed.chmod(0)
    stuck = next(home_of(repository).glob("*/sessions/*/keeps.1/slot/tree/.env"))
    with immutable(stuck):
        cleaned = repository.council("clean", "--yes", "--preserved", "--json")
        assert (cleaned.code, cleaned.result["exit"]) == (1, 1)
        errors = {one["task"]: (one["removed"], one["error"]) for one in cleaned.result["found"] if one["task"]}
        assert errors["other"] == (True, None)
        assert errors["keeps"][0] is False
        assert "Operation not permitted" in errors["keeps"][1]
        assert trees(repository) == []
        [waits] = hub_of(repository).trash.iterdir()
        assert found(repository.council("clean", "--json")) == [("left_over", waits.name)]
        printed = repository.council("clean", "--yes")
        assert printed.code == 1
        assert f"{waits} could not be removed" in printed.stderr
    assert repository.council("clean", "--yes").code == 0
    assert not list(hub_of(repository).trash.iterdir())


async def listed_in_process(repository: Repository, store: FileStore) -> tuple[Cleaner, list[Leftover]]:
    """Return a cleaner of the project, and the worktrees that it lists."""
    cleaner = Cleaner(home_of(repository), repository.environ, SystemClock(), Project(repository.top), store)
    return cleaner, [one for one in await cleaner.find() if one.kind is LeftoverKind.WORKTREE]


@pytest.mark.extended
async def test_leftover_needed_since_listing_stays(repository: Repository) -> None:
    """A run that becomes active is not touched, and neither is an item whose status has changed."""
    run = run_once(repository, KEEPS, code=1)
    async with FileStore.open(repository.log, SystemClock()) as store:
        cleaner, listed = await listed_in_process(repository, store)
        async with hub_of(repository).run_lock(run).hold():
            [removal] = await cleaner.remove(listed)
            assert "is locked by process" in str(removal.error)
        assert repository.council("retry", "keeps").code == 0
        [removal] = await cleaner.remove(listed)
        assert removal.error == "it is in use again, or has changed"
        assert trees(repository) == ["keeps.1"]


@pytest.mark.extended
async def test_hub_used_since_listing_stays(repository: Repository) -> None:
    """The repository exists again: its hub is not removed."""
    run_once(repository, {"id": "a", "prompt": "write a.txt a"})
    aside = repository.top.parent / "aside"
    repository.top.rename(aside)
    cleaner = Cleaner(home_of(repository), repository.environ, SystemClock())
    listed = await cleaner.find()
    assert [one.name for one in listed] == [str(hub_of(repository).root)]
    aside.rename(repository.top)
    assert [one.error for one in await cleaner.remove(listed)] == ["it is in use again, or has changed"]
    assert hub_of(repository).root.exists()


@pytest.mark.extended
async def test_repository_can_run_again_after_clean(repository: Repository) -> None:
    """The next run of a repository at the same path creates its hub again."""
    run_once(repository, {"id": "a", "prompt": "write a.txt a"})
    aside = repository.top.parent / "aside"
    repository.top.rename(aside)
    assert run_outside(repository, "clean", "--yes").code == 0
    assert not list(home_of(repository).glob("*/"))
    aside.rename(repository.top)
    assert repository.council("clean", "--json").code == 0
    assert repository.council("clean", "--yes", "--logs", "1ms", "--json").result["found"][0]["removed"] is True
    run_once(repository, {"id": "b", "prompt": "write b.txt b"})


@contextmanager
def confirmation(repository: Repository) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start `clean --preserved` on a terminal and wait for its question; yield the process and its terminal."""
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "orchestrator.cli.main", "clean", "--preserved"]
    child = subprocess.Popen(
        argv, cwd=repository.top, env=repository.environ, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    try:
        said = b""
        while b"[y/N]" not in said:
            said += os.read(ours, 4096)
        yield child, ours
    finally:
        child.kill()
        child.wait()
        os.close(ours)


@pytest.mark.extended
@pytest.mark.parametrize(("answer", "stays"), [("y", False), ("", True), ("no", True)])
async def test_clean_on_a_terminal_asks_once(repository: Repository, answer: str, stays: bool) -> None:
    """Only `yes` removes."""
    run_once(repository, KEEPS, code=1)
    with confirmation(repository) as (child, terminal):
        os.write(terminal, answer.encode() + b"\n")
        assert child.wait(timeout=30) == 0
    assert trees(repository) == (["keeps.1"] if stays else [])


async def test_clean_follows_no_link(repository: Repository) -> None:
    """A link in our folders leads to files of others, regardless of its name."""
    run, hub = run_once(repository, {"id": "a", "prompt": "write a.txt 1"}), hub_of(repository)
    theirs = repository.top.parent / "theirs"
    names = ("a.1/tree/file", "a.1.check/file", "trusted.git/config", "notes", "7/tree/file", "tree/file")
    for place in (f"{run}/a.1/tree/file", *names):
        file = theirs / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("precious")
        age(file)
    before = sorted(theirs.rglob("*"))
    moved = hub.root / "moved"
    for link in (
        hub.sessions / run,
        hub.sessions / "20200101-000000-abcd",
        hub.sessions,
        hub.slots,
        hub.slots / "7",
        hub.trash,
        hub.indexes,
        hub.root.with_name("theirs-0123456789ab"),
        hub.root.with_name("theirs-0123456789ab.new"),
    ):
        if link.exists():
            link.rename(moved)
        link.symlink_to(theirs)
        cleaned = repository.council("clean", "--yes", "--preserved", "--json")
        assert cleaned.code == 0, (link, cleaned)
        assert sorted(theirs.rglob("*")) == before, link
        link.unlink(missing_ok=True)
        if moved.exists():
            moved.rename(link)


@pytest.mark.extended
async def test_folder_that_only_looks_like_a_partial_hub_stays(repository: Repository) -> None:
    """Our folders are also recognized by their content: COUNCIL_HOME may contain anything."""
    run_once(repository, {"id": "a", "prompt": "write a.txt 1"})
    photos = home_of(repository) / "photos-20200101abcd.new"
    photos.mkdir()
    (photos / "one.jpg").write_text("precious")
    assert repository.council("clean", "--yes", "--preserved").code == 0
    assert (photos / "one.jpg").exists()


@pytest.mark.extended
async def test_signal_ends_the_confirmation(repository: Repository) -> None:
    run_once(repository, KEEPS, code=1)
    with confirmation(repository) as (child, _):
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=30) == 130
    assert trees(repository) == ["keeps.1"]
