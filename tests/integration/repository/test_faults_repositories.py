"""Repositories in unusual states: stale locks, checkouts, configuration. Each works, or is rejected."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import GitError
from orchestrator.repo.git.reading import read_ref
from orchestrator.system.process_table import process_stat
from tests.conftest import CommandResult, Repository
from tests.waiting import wait_for

pytestmark = pytest.mark.extended

ONE = [{"id": "one", "prompt": "write one.txt 1\nappend README.md More."}]


def planted(place: Path) -> Path:
    """Create an empty lock file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    return place


async def test_stale_locks_of_each_kind_are_removed(repository: Repository, tmp_path: Path) -> None:
    """Killed git commands leave locks in our own repository, which the run's next owner removes."""
    config = repository.configure(ONE)
    assert repository.council("run", str(config), failpoints="worktree.created=kill").code == -signal.SIGKILL
    run = next((tmp_path / "council-home").glob("*/sessions/*"))
    trusted = run.parents[1] / "trusted.git"
    names = ("config.lock", "packed-refs.lock", "HEAD.lock", "index.lock", f"refs/heads/council/{run.name}/one/1.lock",
             f"refs/council/{run.name}/start.lock", f"../indexes/{run.name}-one.1/index.lock")  # fmt: skip
    locks = [planted(trusted / name) for name in names]
    ended = repository.council("resume", "--json")
    assert ended.states == {"one": "landed"}, ended
    assert not [lock for lock in locks if lock.exists()]
    await repository.assert_invariants()


async def test_lock_stays_while_its_git_command_lives(repository: Repository, tmp_path: Path) -> None:
    """Another run's command may have created it: only locks of this run alone are removed."""
    config = repository.configure(ONE)
    assert repository.council("run", str(config), failpoints="worktree.created=kill").code == -signal.SIGKILL
    run = next((tmp_path / "council-home").glob("*/sessions/*"))
    trusted = run.parents[1] / "trusted.git"
    shared, own = planted(trusted / "config.lock"), planted(trusted / f"../indexes/{run.name}-one.1/index.lock")
    environ = {**repository.environ, "GIT_DIR": str(trusted)}
    with subprocess.Popen(["git", "cat-file", "--batch"], env=environ, stdin=subprocess.PIPE) as living:
        assert repository.council("resume", "--json").states == {"one": "landed"}
        living.communicate(b"")
    assert shared.exists()
    assert not own.exists()


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("index.lock", True),
        pytest.param("refs/heads/main.lock", True, marks=pytest.mark.slow),
        ("packed-refs.lock", False),
        pytest.param("config.lock", False, marks=pytest.mark.slow),
    ],
)
async def test_lock_of_the_user_is_never_removed(repository: Repository, name: str, stops: bool) -> None:
    """Its owner may be an editor or a command of theirs: the landing waits, with the fix, until it is gone."""
    lock = planted(repository.top / ".git" / name)
    ended = repository.council("run", str(repository.configure(ONE)), "--json")
    assert ended.states == {"one": "queued" if stops else "landed"}, ended
    assert lock.exists()
    if stops:
        assert f"remove {lock}" in ended.result["tasks"][0]["reason"]
    lock.unlink()
    assert repository.council("resume", "--json").states == {"one": "landed"}
    await repository.assert_invariants()


@pytest.mark.parametrize("damage", ["HEAD", "refs/council/*/start", "objects/??/*"])
def test_damaged_internal_repository_is_named_with_the_remedy(
    repository: Repository, tmp_path: Path, damage: str
) -> None:
    """No retry would help; a new run works once it is moved away."""
    config = repository.configure(ONE)
    assert repository.council("run", str(config), failpoints="worktree.created=kill").code == -signal.SIGKILL
    [trusted] = (tmp_path / "council-home").glob("*/trusted.git")
    for file in trusted.glob(damage):
        file.chmod(0o600)
        file.write_text("" if "objects" in damage else "garbage\n")
    refused = repository.council("resume", "--json")
    assert (refused.code, refused.result["status"]) == (2, "refused"), refused
    assert f"the internal repository {trusted.parent} is damaged" in refused.result["error"]
    assert "move it away" in refused.result["remedy"]
    if damage == "HEAD":  # a valid repository is needed by all of these, but not each of its objects and refs
        for command in (["salvage", "list"], ["run", str(config)]):
            refused = repository.council(*command, "--json")
            assert (refused.code, "move it away" in refused.result["remedy"]) == (2, True), refused
    trusted.parent.rename(tmp_path / "moved")
    assert repository.council("run", str(config), "--json").states == {"one": "landed"}


def test_lost_objects_of_built_work_are_named_with_the_remedy(repository: Repository, tmp_path: Path) -> None:
    """Not as an error of the user's repository, which has none of the refs that git names."""
    config = repository.configure(ONE)
    assert repository.council("run", str(config), failpoints="landing.merged=kill").code == -signal.SIGKILL
    [objects] = (tmp_path / "council-home").glob("*/hub.git/objects")
    for entry in objects.iterdir():
        shutil.rmtree(entry)
    for command in (["resume"], ["run", str(config)]):
        refused = repository.council(*command, "--json")
        assert (refused.code, refused.result["status"]) == (2, "refused"), refused
        assert f"the internal repository {objects.parents[1]} is damaged" in refused.result["error"]
        assert "move it away" in refused.result["remedy"]


@pytest.mark.parametrize(
    ("start", "finish"),
    [
        (("rebase", "--quiet", "--exec", "exit 1", "HEAD~1"), ("rebase", "--quit")),
        (("bisect", "start", "HEAD", "HEAD~2"), ("bisect", "reset", "HEAD")),
    ],
    ids=["rebase", "bisect"],
)
async def test_landing_during_a_rebase_or_bisect_of_the_target_waits(
    repository: Repository, start: Sequence[str], finish: Sequence[str]
) -> None:
    """Git would reject the push without a reason; the task names the operation and the command that finishes it."""
    for number in range(2):
        repository.commit({"README.md": f"# {number}\n"})
    with suppress(subprocess.CalledProcessError):  # the rebase stops here
        repository.git(*start)
    ended = repository.council("run", str(repository.configure(ONE)), "--json")
    assert ended.states == {"one": "queued"}, ended
    assert f"a {start[0]} of 'main' is in progress" in ended.result["tasks"][0]["reason"]
    assert f"`git {start[0]} " in ended.result["tasks"][0]["reason"]
    assert [line.get("event") for line in ended.lines].count("task.deferred") == 1
    repository.git(*finish)
    repository.git("switch", "--quiet", "main")
    repository.remember()
    assert repository.council("resume", "--json").states == {"one": "landed"}
    await repository.assert_invariants()


async def test_landing_on_a_rewritten_target_waits_with_a_remedy(repository: Repository) -> None:
    """The user amends its first commit while a session runs; once the old history is back, the work lands."""
    old = repository.git("rev-parse", "HEAD")
    child = repository.start("run", str(repository.configure(ONE)), "--json", failpoints="work.recorded=stop")
    wait_for(lambda: (stat := process_stat(child.pid)) is not None and stat.state == "T")
    repository.git("commit", "--quiet", "--amend", "--message", "rewritten")
    child.send_signal(signal.SIGCONT)
    stdout, stderr = child.communicate(timeout=60)
    ended = CommandResult(child.returncode, stdout, stderr)
    assert (ended.code, ended.states) == (1, {"one": "queued"}), ended
    assert "the history of 'main' was rewritten" in ended.result["tasks"][0]["reason"]
    assert [line.get("event") for line in ended.lines].count("task.deferred") == 1
    repository.git("reset", "--quiet", "--hard", old)
    repository.remember()
    assert repository.council("resume", "--json").states == {"one": "landed"}
    await repository.assert_invariants()


@pytest.mark.parametrize(
    ("target", "failpoint"),
    [
        ("main", "work.recorded=stop"),
        ("out", "work.recorded=stop@2"),
        pytest.param("remote", "work.recorded=stop@2", marks=pytest.mark.extended),
        ("main", "landing.intended=kill"),
        pytest.param("main", "landing.pushed=kill", marks=pytest.mark.extended),
        pytest.param("remote", "landing.pushed=kill@2", marks=pytest.mark.extended),
    ],
)
async def test_deleted_target_is_not_recreated(
    repository: Repository, tmp_path: Path, target: str, failpoint: str
) -> None:
    """Landings wait, also those of a killed process, until the branch exists again."""
    folder, more = repository.top, {"target": target}
    if target == "remote":
        folder, target = tmp_path / "remote.git", "main"
        repository.git("clone", "--quiet", "--bare", str(repository.top), str(folder))
        more = {"repo": f"file://{folder}"}
    git = ("-C", str(folder))
    two = {"id": "two", "prompt": "append one.txt 2", "needs": ["one"]}
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}, two], **more)
    repository = replace(repository, top=config.parent if "repo" in more else repository.top)
    child = repository.start("run", str(config), "--json", failpoints=failpoint)
    if "stop" in failpoint:
        wait_for(lambda: (stat := process_stat(child.pid)) is not None and stat.state == "T")
    else:
        child.communicate(timeout=60)
    tip = repository.git(*git, "rev-parse", f"refs/heads/{target}")
    repository.git(*git, "branch", "--move", target, "renamed")
    if "stop" in failpoint:
        child.send_signal(signal.SIGCONT)
        stdout, stderr = child.communicate(timeout=60)
        ended = CommandResult(child.returncode, stdout, stderr)
        last = "two" if "@2" in failpoint else "one"
        assert ended.states[last] == "queued", ended
        (reason,) = (one["reason"] for one in ended.result["tasks"] if one["id"] == last)
        command = f"git branch {target} {tip}"
        remedy = f"create it again (`{command}`), then `council resume`"
        assert reason == f"the target branch '{target}' was deleted or renamed: {remedy}"
    refused = repository.council("resume", "--json")
    assert (refused.code, "was deleted or renamed" in refused.result["error"]) == (2, True), refused
    assert f"refs/heads/{target}" not in repository.git(*git, "for-each-ref", "--format=%(refname)").split()
    repository.git(*git, "branch", "--move", "renamed", target)
    ended = repository.council("resume", "--json")
    assert ended.states == {"one": "landed", "two": "landed"}, ended
    assert repository.git(*git, "show", f"{target}:one.txt") == "1\n2"


async def test_detached_head_is_accepted(repository: Repository) -> None:
    """With no branch checked out the target moves, and the checkout stays as it is."""
    repository.git("checkout", "--quiet", "--detach")
    repository.remember()
    ended = repository.council("run", str(repository.configure(ONE)), "--json")
    assert ended.states == {"one": "landed"}, ended
    assert repository.git("show", "main:one.txt") == "1"
    assert not (repository.top / "one.txt").exists()
    await repository.assert_invariants(target_checked_out=False)


def _empty(repository: Repository) -> None:
    repository.git("init", "--quiet", "--initial-branch=main", "../empty")


def _submodule(repository: Repository) -> None:
    head = repository.git("rev-parse", "HEAD")
    repository.git("update-index", "--add", "--cacheinfo", f"160000,{head},libs/sub")
    repository.git("commit", "--quiet", "--message", "submodule")


def _shallow(repository: Repository) -> None:
    repository.commit({"f": "2"})
    repository.git("clone", "--quiet", "--depth=1", f"file://{repository.top}", "../shallow")


@pytest.mark.parametrize(
    ("prepare", "repo", "fragment", "remedy"),
    [
        (_empty, "empty", "no commits yet", "create a first commit"),
        (_submodule, "project", "submodules", "libs/sub"),
        (lambda repository: repository.commit({".gitattributes": "*.bin filter=lfs\n"}), "project", "git LFS", "base"),
        (_shallow, "shallow", "shallow clone", "--unshallow"),
    ],
    ids=["empty", "submodules", "LFS", "shallow"],
)
async def test_unusable_repository_is_rejected(
    repository: Repository, prepare: Callable[[Repository], object], repo: str, fragment: str, remedy: str
) -> None:
    """Exit code 2 with the reason and the fix, and no program has run."""
    prepare(repository)
    config = repository.configure(ONE, repo=str(repository.top.parent / repo), target="out")
    ended = repository.council("run", str(config), "--json")
    assert (ended.code, ended.result["status"]) == (2, "refused"), ended
    assert fragment in ended.result["error"]
    assert remedy in ended.result["error"] + ended.result["remedy"]
    assert not repository.spawns.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a repository away")
async def test_foreign_repository_is_rejected_until_trusted(repository: Repository, tmp_path: Path) -> None:
    """Git's own rule (safe.directory) applies: its message is printed each time, and following it is enough."""
    subprocess.run(["chown", "-R", "12345:12345", str(repository.top)], check=True)
    config = repository.configure(ONE)
    trusts = tmp_path / "gitconfig"
    trusts.write_text("[safe]\n")
    repository.environ["GIT_CONFIG_GLOBAL"] = str(trusts)
    while (ended := repository.council("run", str(config), "--json")).code:
        assert (ended.code, ended.result["status"]) == (2, "refused"), ended
        advice = re.search(r"safe.directory (\S+)", ended.result["error"])
        assert advice is not None, ended
        assert advice[1] not in trusts.read_text(), ended
        assert not repository.spawns.exists()
        trusts.write_text(f"{trusts.read_text()}\tdirectory = {advice[1]}\n")
    assert ended.states == {"one": "landed"}
    assert repository.git("status", "--porcelain") == ""


def _sparse(repository: Repository) -> None:
    repository.git("sparse-checkout", "set", "--cone", "src")
    assert not (repository.top / "docs").exists()


def _signs(repository: Repository) -> None:
    for key, value in (("commit.gpgSign", "true"), ("push.gpgSign", "if-asked"), ("gpg.program", "/bin/false")):
        repository.git("config", key, value)


def _converts(repository: Repository) -> None:
    repository.git("config", "core.autocrlf", "true")
    (repository.top / "docs/a.txt").unlink()
    repository.git("checkout", "--", "docs/a.txt")
    assert (repository.top / "docs/a.txt").read_bytes() == b"a\r\n"


def _nobody(repository: Repository) -> None:
    repository.git("config", "user.useConfigOnly", "true")


@pytest.mark.parametrize(
    "odd", [_sparse, _converts, *(pytest.param(odd, marks=pytest.mark.slow) for odd in (_signs, _nobody))]
)
async def test_unusual_checkout_takes_landings(repository: Repository, odd: Callable[[Repository], object]) -> None:
    """Sparse, signing with a broken program, converting line ends, or without an identity: it lands and is clean."""
    repository.commit({"docs/a.txt": "a\n"}, "docs")
    odd(repository)
    repository.remember()
    prompt = "append docs/a.txt b\nwrite docs/new.txt new\nappend src/app.py # end"
    ended = repository.council("run", str(repository.configure([{"id": "one", "prompt": prompt}])), "--json")
    assert ended.states == {"one": "landed"}, ended
    assert repository.git("show", "main:docs/a.txt") == "a\nb"
    assert repository.git("status", "--porcelain") == ""
    assert repository.git("log", "-1", "--format=%cn %G?") == "CLI Council N"
    if odd is _sparse:
        assert not (repository.top / "docs").exists()
    if odd is _converts:
        assert (repository.top / "docs/a.txt").read_bytes() == b"a\r\nb\r\n"
    await repository.assert_invariants()


def refusing(repository: Repository, hook: str) -> Path:
    """Create a hook that fails."""
    place = repository.top / ".git/hooks" / hook
    place.parent.mkdir(exist_ok=True)
    place.write_text("#!/bin/sh\necho not on a friday >&2\nexit 1\n")
    place.chmod(0o755)
    repository.remember()
    return place


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param("update", marks=pytest.mark.slow),
        pytest.param("push-to-checkout", marks=pytest.mark.slow),
        "reference-transaction",
    ],
)
async def test_rejecting_hook_of_the_user_is_respected(repository: Repository, hook: str) -> None:
    """The target does not move, its checkout is unchanged, the reason names the hook; without it the work lands."""
    place = refusing(repository, hook)
    before = repository.git("rev-parse", "main")
    ended = repository.council("run", str(repository.configure(ONE)), "--json")
    assert ended.states == {"one": "queued"}, ended
    assert "hook" in ended.result["tasks"][0]["reason"]
    assert (repository.git("rev-parse", "main"), repository.git("status", "--porcelain")) == (before, "")
    place.unlink()
    repository.remember()
    assert repository.council("resume", "--json").states == {"one": "landed"}
    await repository.assert_invariants()


async def test_failing_other_hooks_of_the_user_stop_nothing(repository: Repository) -> None:
    """A push does not run hooks of commits, merges and checkouts, and hooks after an operation can't reject it."""
    for hook in ("pre-commit", "commit-msg", "pre-merge-commit", "post-merge", "post-checkout", "pre-push",
                 "post-receive", "post-update", "post-index-change"):  # fmt: skip
        refusing(repository, hook)
    ended = repository.council("run", str(repository.configure(ONE)), "--json")
    assert ended.states == {"one": "landed"}, ended
    await repository.assert_invariants()


async def test_missing_own_repositories_are_named(repository: Repository) -> None:
    """An incomplete folder is not reported as an internal error, and the printed remedy works."""
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    repository.council("run", str(config))
    (hub,) = (path for path in Path(repository.environ["COUNCIL_HOME"]).iterdir() if path.is_dir())
    shutil.rmtree(hub)
    (hub / "sessions").mkdir(parents=True)
    for command in (["resume"], ["run", str(config)], ["salvage", "list"]):
        ended = repository.council(*command, "--json")
        assert (ended.code, ended.result["status"]) == (2, "refused"), ended
        assert str(hub) in ended.result["error"]
        assert "move it away and start a new run" in ended.result["remedy"]
    hub.rename(hub.with_name("moved"))
    assert repository.council("run", str(config), "--json").states == {"one": "no_change"}  # it landed before


def test_removed_locks_folder_is_created_again(repository: Repository) -> None:
    """By the next command of the run, and by the next run."""
    config = repository.configure(ONE)
    repository.council("run", str(config))
    (folder,) = Path(repository.environ["COUNCIL_HOME"]).glob("*/locks")
    for command in (["resume"], ["run", str(config)]):
        shutil.rmtree(folder)
        ended = repository.council(*command, "--json")
        assert (ended.code, ended.states) == (0, {"one": "landed"}), ended


def test_locks_folder_removed_during_a_run_ends_it_with_the_fix(repository: Repository) -> None:
    tasks = [{"id": name, "prompt": f"write {name}.txt 1"} for name in ("one", "two")]
    child = repository.start("run", str(repository.configure(tasks, capacity=1)), failpoints="work.recorded=stop")
    wait_for(lambda: (stat := process_stat(child.pid)) is not None and stat.state == "T")
    (folder,) = Path(repository.environ["COUNCIL_HOME"]).glob("*/locks")
    shutil.rmtree(folder)
    child.send_signal(signal.SIGCONT)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 2, stderr
    assert f"{folder} was deleted while it was in use" in stderr
    assert repository.council("resume", "--json").states == {"one": "landed", "two": "landed"}


@pytest.mark.parametrize("setting", ["transfer.hideRefs", "receive.hideRefs", "uploadpack.hideRefs"])
def test_branches_hidden_by_the_configuration_are_used(repository: Repository, setting: str) -> None:
    """The user hides them from others; a run is their own."""
    repository.git("config", setting, "refs/heads")
    ended = repository.council("run", str(repository.configure(ONE)), "--json")
    assert ended.states == {"one": "landed"}, ended


async def test_vanished_repository_is_named(repository: Repository) -> None:
    """The library's own message is the path alone."""
    shutil.rmtree(repository.top / ".git")
    with pytest.raises(GitError, match="is no longer a git repository"):
        await read_ref(repository.top, "refs/heads/main")
    with pytest.raises(GitError, match="is no longer a git repository"):
        await read_ref(repository.top / "gone", "refs/heads/main")
