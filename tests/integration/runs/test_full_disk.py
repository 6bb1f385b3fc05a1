"""A full disk: commands end with one line and exit code 1; a run waits for space and loses nothing."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.repo.landing.target_branch import DeferredLanding
from orchestrator.system.files import copy_folder
from tests import small_disk as small_disks
from tests.conftest import Repository, hermetic_environ
from tests.faults import SHELL_ADAPTER
from tests.integration.runs.test_shared_runs import states
from tests.landings import Landing
from tests.merge_leases import hold_merge_lease
from tests.small_disk import mounted
from tests.waiting import wait_for

pytestmark = pytest.mark.extended

#: Space for a repository, a run and its sessions.
_SIZE = "32m"


@pytest.fixture
def small_disk(tmp_path: Path, environ: dict[str, str], template: Path) -> Iterator[Repository]:
    """A repository on a small disk, with its state and hub."""
    with mounted(tmp_path / "disk", _SIZE) as disk:
        made = Repository(disk / "project", {**environ, **hermetic_environ(disk)}, disk / "ledger" / "spawns")
        made.spawns.parent.mkdir()
        shutil.copytree(template, made.top)
        made.git("update-index", "--refresh")
        made.remember()
        yield made


def filler(repository: Repository) -> Path:
    """Return the file that fills the disk."""
    return repository.spawns.parent / "filler"


def fill(repository: Repository) -> None:
    """Fill the disk."""
    small_disks.fill(filler(repository))


def fill_with_log(repository: Repository) -> None:
    """Fill the disk, and the last page of the log."""
    fill(repository)
    for _ in range(50):
        if repository.council("checkpoint", "create").code:
            break


async def test_run_on_a_full_disk_waits_and_lands_everything(small_disk: Repository) -> None:
    """Finished work is collected later; a session that fails on the full disk costs no attempt."""
    folder = small_disk.spawns.parent
    sh = {**SHELL_ADAPTER, "writable": [str(folder)]}
    room = f"until [ -e {folder}/go ]; do sleep 0.05; done"
    # The session can't write this file while the disk is full, like a program that finds the disk full.
    fails = f"head -c 100000 /dev/zero > big.txt || {{ touch {folder}/has-failed; exit 7; }}"
    tasks: list[dict[str, Any]] = [
        {"id": "finished", "prompt": f"echo done > finished.txt; touch {folder}/is-done; {room}"},
        {"id": "failing", "prompt": f"touch {folder}/is-there; {room}; {fails}", "attempts": 1},
        {"id": "last", "prompt": "echo last > last.txt", "needs": ["finished"], "checks": ["test ! -e broken"]},
    ]
    run = small_disk.start("run", str(small_disk.configure(tasks, adapters={"sh": sh})), "--json")
    wait_for(lambda: (folder / "is-done").exists() and (folder / "is-there").exists())
    fill(small_disk)
    (folder / "go").touch()
    wait_for((folder / "has-failed").exists)
    done = small_disk.council("status", "--json")
    assert "landed" not in done.states.values(), done
    assert run.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(3)
    filler(small_disk).unlink()
    stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == 0, (stdout, stderr)
    assert "Traceback" not in stderr
    assert (small_disk.top / "finished.txt").read_text() == "done\n"
    assert (small_disk.top / "big.txt").stat().st_size == 100_000
    ended = small_disk.council("status", "--json")
    assert set(ended.states.values()) == {"landed"}
    await small_disk.assert_invariants()


def test_folder_copied_to_a_full_disk_reports_it(tmp_path: Path) -> None:
    """By its errno. Otherwise a session whose folder can't be created fails, and costs an attempt."""
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "below/file").write_bytes(bytes(1 << 20))
    copy_folder(source, tmp_path / "copies" / "copy")
    assert (tmp_path / "copies/copy/below/file").stat().st_size == 1 << 20
    with mounted(tmp_path / "disk", "64k") as disk, pytest.raises(OSError, match="No space left") as raised:
        copy_folder(source, disk / "copy")
    assert raised.value.errno == errno.ENOSPC


async def test_landing_on_a_full_disk_leaves_the_checkout_unchanged(small_disk: Repository) -> None:
    """Of three files one fits, one is cut short and one is empty: all are removed, and land when there is space."""
    names, size, room = ("a.bin", "b.bin", "c.bin"), 4 << 20, 6 << 20
    flag = small_disk.spawns.parent / "fill"
    hook = small_disk.top / ".git/hooks/pre-receive"
    hook.parent.mkdir(exist_ok=True)
    free = "$(stat -f -c '%a * %S' .)"
    fills = f"head -c $(({free} - {room})) /dev/zero >> {filler(small_disk)}"
    # The session's files take space until its worktree is clean again.
    cleaned = f"while [ -e {small_disk.environ['COUNCIL_HOME']}/*/slots/1/tree/a.bin ]; do sleep 0.05; done"
    hook.write_text(f"#!/bin/sh\n[ -e {flag} ] || exit 0\n{cleaned}\n[ -e {filler(small_disk)} ] || {fills}\n")
    hook.chmod(0o755)
    small_disk.remember()
    flag.touch()
    writes = "; ".join(f"yes text | head -c {size} > {name}" for name in names)  # git turns zeros into holes
    path = small_disk.configure([{"id": "t", "prompt": writes}], adapters={"sh": SHELL_ADAPTER})
    ended = small_disk.council("run", str(path), "--json")
    assert (ended.code, ended.states) == (1, {"t": "queued"}), ended
    assert small_disk.git("status", "--porcelain") == ""
    flag.unlink()
    filler(small_disk).unlink()
    again = small_disk.council("resume", "--json")
    assert (again.code, again.states) == (0, {"t": "landed"}), again
    assert [(small_disk.top / name).stat().st_size for name in names] == [size] * 3
    await small_disk.assert_invariants()


async def test_landing_without_disk_space_for_the_index_lock_leaves_no_lock(
    small_disk: Repository, tmp_path: Path
) -> None:
    """The disk fills up right before the checkout is updated; the landing is made once there is space."""
    landing = await Landing.prepare(small_disk, tmp_path)
    hook = small_disk.top / ".git/hooks/pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ncat /dev/zero >{filler(small_disk)}\nexit 0\n")
    hook.chmod(0o755)
    async with hold_merge_lease(landing.source, "main") as lease:
        refused = await landing.target.move(lease, [landing.merge])
        assert isinstance(refused, DeferredLanding), refused
        assert not landing.lock.exists()
        hook.unlink()
        filler(small_disk).unlink()
    await landing.finish()
    landing.check({}, {})


async def test_run_waiting_for_room_ends_at_a_signal(small_disk: Repository) -> None:
    """One is enough: `resume` does the rest."""
    run = small_disk.start("run", str(small_disk.configure([{"id": "t", "prompt": "hang"}])))
    wait_for(small_disk.spawns.exists)
    fill_with_log(small_disk)
    run.send_signal(signal.SIGTERM)
    stdout, stderr = run.communicate(timeout=60)
    assert run.returncode in {1, 130}, (stdout, stderr)
    assert "Traceback" not in stderr
    filler(small_disk).unlink()
    assert small_disk.council("cancel", "t").code == 0
    await small_disk.assert_invariants()


@pytest.mark.parametrize(
    "command",
    [
        ["run", "council.yaml"],
        ["cancel", "two"],
        ["task", "ignore", "one", "--reason", "not needed"],
        ["checkpoint", "create"],
        ["retry", "failed"],
        ["retry", "failed", "--reload"],
        ["share", "put", "key", "more than the last page of the log has space for " * 100],
    ],
    ids=lambda command: "-".join(command)[:30],
)
async def test_command_on_a_full_disk_ends_with_one_line_and_exit_code_1(
    small_disk: Repository, command: list[str]
) -> None:
    """It names the disk and the fix; with space the same command succeeds."""
    tasks: list[dict[str, Any]] = [{"id": name, "prompt": "hang"} for name in ("one", "two")]
    config = small_disk.configure([*tasks, {"id": "failed", "prompt": "exit 1", "attempts": 1}])
    shutil.copy(config, small_disk.top / "council.yaml")
    run = small_disk.start("run", str(config))
    wait_for(lambda: states(small_disk).get("failed") == "failed")
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=30)
    fill_with_log(small_disk)
    ended = small_disk.council(*command)
    assert ended.code == 1, ended
    assert len(ended.stderr.splitlines()) == 1, ended
    assert os.strerror(errno.ENOSPC).lower() in ended.stderr.lower()
    assert "free some space" in ended.stderr
    filler(small_disk).unlink()
    if command[0] == "run":
        return
    again = small_disk.council(*command)
    assert again.code == 0, again


@pytest.mark.parametrize("command", [["resume"], ["work", "--run", "latest"]], ids=lambda command: command[0])
async def test_resume_on_a_full_disk_reports_it_and_waits(small_disk: Repository, command: list[str]) -> None:
    """In one line; it continues as soon as there is space."""
    config = small_disk.configure([{"id": "t", "prompt": "attempt 1 hang\nwrite t.txt x"}])
    run = small_disk.start("run", str(config))
    wait_for(small_disk.spawns.exists)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=30)
    fill_with_log(small_disk)
    resumed = small_disk.start(*command)
    assert resumed.stderr is not None
    notice = resumed.stderr.readline()
    assert f"{os.strerror(errno.ENOSPC)}: free some space" in notice, notice
    filler(small_disk).unlink()
    stdout, stderr = resumed.communicate(timeout=60)
    assert (resumed.returncode, "Traceback" in stderr) == (0, False), (stdout, stderr)
    assert states(small_disk) == {"t": "landed"}
    await small_disk.assert_invariants()
