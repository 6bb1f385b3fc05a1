"""Killed git commands, one after the other, and their stale locks."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import GitError, GitKilled
from orchestrator.repo.git.command import Git
from orchestrator.repo.landing.interrupted_push import remove_incoming_objects
from orchestrator.repo.worktrees.hub import Hub, create_hub, locate_hub
from tests.conftest import FAKE_CLI, Repository

pytestmark = pytest.mark.extended


async def run_killing(repository: Repository, number: int, failpoint: str) -> None:
    """Kill the n-th git command (from 1) of a whole run, which succeeds all the same."""
    name = f"t{number}"
    task = {"id": name, "prompt": f"write {name}.txt 1\nappend README.md {number}"}
    repository.remember()
    ended = repository.council(
        "run", str(repository.configure([task])), "--json", failpoints=f"{failpoint}=kill@{number}"
    )
    if ended.code == -signal.SIGKILL:
        ended = repository.council("resume", "--json")
    assert (ended.code, ended.states) == (0, {name: "landed"}), (number, ended)
    assert repository.git("status", "--porcelain") == "", number
    await repository.assert_invariants()
    shutil.rmtree(repository.environ["COUNCIL_HOME"])
    shutil.rmtree(repository.top / ".council")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("failpoint", ["git.started", "git.ended"])
async def test_each_git_command_of_a_run_may_be_killed(repository: Repository, failpoint: str) -> None:
    """The n-th, for each n until there is none."""
    for number in itertools.count(1):
        await run_killing(repository, number, failpoint)
        if number % 8 == 0:
            config = repository.configure([{"id": "last", "prompt": f"write last.txt {number}"}])
            ended = repository.council("run", str(config), failpoints=f"git.starting=kill@{number}")
            shutil.rmtree(repository.environ["COUNCIL_HOME"])
            shutil.rmtree(repository.top / ".council")
            if ended.code != -signal.SIGKILL:  # it has fewer commands
                assert number > 20
                return


@pytest.mark.parametrize("failpoint", ["git.started", "git.ended"])
@pytest.mark.parametrize("number", [2, 8, 13, 24, 35])
async def test_git_command_of_a_run_may_be_killed(repository: Repository, number: int, failpoint: str) -> None:
    await run_killing(repository, number, failpoint)


async def trusted_git(repository: Repository, tmp_path: Path) -> tuple[Hub, Git]:
    """Create a hub, and return it with git in its trusted repository."""
    hub = locate_hub(str(repository.top), tmp_path / "hubs")
    await create_hub(hub, "sha1", repository.environ)
    return hub, Git(hub.trusted, environ=repository.environ)


@pytest.mark.parametrize(
    ("lock", "command"),
    [
        ("config.lock", ("config", "core.bare", "true")),
        ("packed-refs.lock", ("pack-refs", "--all")),
        ("refs/heads/one.lock", ("update-ref", "refs/heads/one", "{commit}")),
        ("HEAD.lock", ("symbolic-ref", "HEAD", "refs/heads/other")),
        ("shallow.lock", ("fetch", "--depth=1", "{top}", "refs/heads/main")),
        ("../indexes/one/index.lock", ("read-tree", "{commit}")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_lock_of_a_killed_command_stops_no_other(
    repository: Repository, tmp_path: Path, lock: str, command: tuple[str, ...]
) -> None:
    """It is removed once no possible owner is alive, and not before."""
    hub, git = await trusted_git(repository, tmp_path)
    await git("fetch", "--quiet", str(repository.top), "refs/heads/main:refs/heads/main")
    facts = {"commit": repository.git("rev-parse", "main"), "top": f"file://{repository.top}"}
    arguments = [argument.format(**facts) for argument in command]
    index = hub.indexes / "one" / "index"
    index.parent.mkdir()
    place = hub.trusted / lock
    place.touch()
    env = {"GIT_INDEX_FILE": str(index)}
    environ = {**repository.environ, **env, "GIT_DIR": str(hub.trusted)}
    with subprocess.Popen(["git", "cat-file", "--batch"], env=environ, stdin=subprocess.PIPE) as living:
        with pytest.raises(GitError, match="exists"):
            await git(*arguments, env=env)
        assert place.exists()
        living.communicate(b"")
    await git(*arguments, env=env)
    assert not place.exists()


async def test_command_over_its_limit_is_reported_without_its_arguments(repository: Repository) -> None:
    """They would hide the reason, in which a task's failure is shortened."""
    git = Git(None, environ=repository.environ)
    with pytest.raises(GitError) as raised:
        await git("-c", "alias.wait=!sleep 60", "wait", cwd=repository.top, limit=0.5)
    assert raised.value.stderr == "git was killed: it ran longer than 0.5 s"


def install_killed_git(repository: Repository, tmp_path: Path, command: str, condition: str = "true") -> Path:
    """Put a git on PATH of which one command is killed while a shell condition is true; return its folder."""
    programs = tmp_path / "programs"
    programs.mkdir(exist_ok=True)
    git = shutil.which("git", path=os.environ["PATH"])
    kill = f'[ "$word" = {command} ] && {condition} && kill -KILL $$'
    (programs / "git").write_text(f'#!/bin/sh\nfor word; do {kill}; done\nexec {git} "$@"\n')
    (programs / "git").chmod(0o755)
    repository.environ["PATH"] = f"{programs}{os.pathsep}{repository.environ['PATH']}"
    return programs


def configure_one(repository: Repository, programs: Path) -> str:
    """Configure one task whose sessions can read this folder of programs."""
    programs.mkdir(exist_ok=True)
    readable = [sys.prefix, str(FAKE_CLI.parents[1]), str(programs)]
    return str(repository.configure([{"id": "one", "prompt": "write one.txt 1"}], readable=readable))


@pytest.mark.parametrize(
    ("start", "command"),
    [
        *(("run", command) for command in ("fetch", "init", "merge-tree", "update-ref")),
        *(("work", command) for command in ("fetch", "merge-tree", "update-ref")),
    ],
)
async def test_git_command_killed_once_is_run_again(
    repository: Repository, tmp_path: Path, start: str, command: str
) -> None:
    """At no cost: the first attempt lands, and nothing is reported as failed."""
    killed = tmp_path / "killed"
    condition = f"[ ! -e {killed} ] && : > {killed}"
    if start == "work":
        config = configure_one(repository, tmp_path / "programs")
        assert repository.council("run", config, failpoints="session.spawned=kill").code == -signal.SIGKILL
        install_killed_git(repository, tmp_path, command, condition)
        ended = repository.council("work", "--run", "latest", "--json")
    else:
        programs = install_killed_git(repository, tmp_path, command, condition)
        ended = repository.council("run", configure_one(repository, programs), "--json")
    assert killed.exists()
    assert (ended.code, ended.states) == (0, {"one": "landed"}), ended
    assert [task["attempts"] for task in ended.result["tasks"]] == [1]
    await repository.assert_invariants()


@pytest.mark.parametrize("command", ["init", "fetch", "merge-tree"])
async def test_git_that_is_always_killed_ends_with_one_line(
    repository: Repository, tmp_path: Path, command: str
) -> None:
    """Exit code 1, and no internal error; without the kills the work lands."""
    path = repository.environ["PATH"]
    config = configure_one(repository, install_killed_git(repository, tmp_path, command))
    ended = repository.council("run", config)
    assert ended.code == 1, ended
    assert "killed" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    repository.environ["PATH"] = path
    again = ("resume",) if command == "merge-tree" else ("run", config)
    assert repository.council(*again, "--json").states == {"one": "landed"}
    await repository.assert_invariants()


async def test_work_whose_git_is_always_killed_is_not_an_internal_error(repository: Repository, tmp_path: Path) -> None:
    """As of `run`; without the kills the next worker lands the task."""
    path = repository.environ["PATH"]
    config = configure_one(repository, tmp_path / "programs")
    assert repository.council("run", config, failpoints="session.spawned=kill").code == -signal.SIGKILL
    install_killed_git(repository, tmp_path, "fetch")
    ended = repository.council("work", "--run", "latest")
    assert ended.code == 1, ended
    assert "killed" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    repository.environ["PATH"] = path
    assert repository.council("work", "--run", "latest", "--json").states == {"one": "landed"}
    await repository.assert_invariants()


@pytest.mark.parametrize("start", ['serve() {{ {server} "$@"; }}; serve', "exec {server}"], ids=["reported", "silent"])
async def test_killed_server_is_retried(repository: Repository, tmp_path: Path, start: str) -> None:
    """Whether git's shell reports its death or not; a missing server was not killed."""
    server, asked = tmp_path / "server", tmp_path / "asked"
    server.write_text(f'#!/bin/sh\n[ -e {asked} ] || {{ touch {asked}; kill -9 $$; }}\nexec git upload-pack "$@"\n')
    server.chmod(0o755)
    other = tmp_path / "other"
    repository.git("init", "--quiet", "--bare", str(other))
    git = Git(other, environ=repository.environ)
    await git("fetch", "--quiet", f"--upload-pack={start.format(server=server)}", str(repository.top), "main")
    assert asked.exists()
    with pytest.raises(GitError, match="Could not read from remote repository") as raised:
        await git("fetch", "--quiet", str(tmp_path / "nothing"), "main")
    assert not isinstance(raised.value, GitKilled)


async def test_objects_received_by_a_killed_push_are_removed(repository: Repository) -> None:
    """And after the end of a git command that runs in the repository."""
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    assert repository.council("run", str(config), failpoints="attempt.recorded=kill").code == -signal.SIGKILL
    left = repository.top / ".git/objects/tmp_objdir-incoming-a"
    left.mkdir()
    assert repository.council("resume", "--json").states == {"one": "landed"}
    assert not left.exists()
    left.mkdir()
    with subprocess.Popen(["git", "-c", "alias.last=!sleep 0.5", "last"], cwd=repository.top / ".git"):
        remove_incoming_objects(repository.top / ".git", 0)
    assert not left.exists()
    await repository.assert_invariants()


async def test_objects_of_a_git_killed_during_the_run_are_removed_at_its_end(
    repository: Repository, tmp_path: Path
) -> None:
    """The command is repeated at once, so nothing else looks for what it left."""
    git, programs, killed = shutil.which("git"), tmp_path / "bin", tmp_path / "killed"
    programs.mkdir()
    die = f'[ -e "{killed}" ] || {{ mkdir "{killed}" "$GIT_DIR/objects/tmp_objdir-bulk-fsync-a"; kill -9 $$; }}'
    (programs / "git").write_text(f'#!/bin/sh\ncase "$*" in *merge-tree*) {die};; esac\nexec {git} "$@"\n')
    (programs / "git").chmod(0o755)
    repository.environ["PATH"] = f"{programs}:{repository.environ['PATH']}"
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    assert repository.council("run", str(config), "--json").states == {"one": "landed"}
    assert killed.exists()
    assert not list((tmp_path / "council-home").glob("*/hub.git/objects/tmp_*"))
    await repository.assert_invariants()


async def test_partial_objects_are_removed(repository: Repository, tmp_path: Path) -> None:
    """Of a killed push in the user's repository, of killed commands in ours: by recovery, and by `clean`."""
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    assert repository.council("run", str(config), failpoints="landing.intended=kill").code == -signal.SIGKILL
    (hub,) = (Path(path).parent for path in (tmp_path / "council-home").glob("*/hub.git"))

    def plant() -> list[Path]:
        names = ("tmp_objdir-bulk-fsync-a/x", "pack/tmp_pack_a", "ab/tmp_obj_a", "tmp_idx_a")
        made = [hub / "hub.git/objects" / name for name in names]
        for path in made:
            path.parent.mkdir(exist_ok=True)
            path.write_text("half")
        return made

    theirs = repository.top / ".git/objects/tmp_objdir-incoming-a"
    (theirs / "pack").mkdir(parents=True)
    older = theirs.with_name("tmp_objdir-incoming-b")
    older.mkdir()
    os.utime(older, (1, 1))
    ours = plant()
    environ = {**repository.environ, "GIT_DIR": str(hub / "trusted.git")}
    with subprocess.Popen(["git", "cat-file", "--batch"], env=environ, stdin=subprocess.PIPE) as living:
        assert repository.council("resume", "--json").states == {"one": "landed"}
        assert all(path.exists() for path in ours)
        living.communicate(b"")
    assert older.exists(), "an object of another writer was removed"
    assert not theirs.exists()
    assert repository.council("clean", "--yes").code == 0
    assert not [path for path in ours if path.exists()]
    older.rmdir()
    config = repository.configure([{"id": "two", "prompt": "write two.txt 2"}])
    assert repository.council("run", str(config), failpoints="landing.intended=kill").code == -signal.SIGKILL
    ours = plant()
    assert repository.council("resume", "--json").code == 0
    assert not [path for path in ours if path.exists()]
    await repository.assert_invariants()
