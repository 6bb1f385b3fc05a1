"""Pushes into a checkout that end at each of their steps, and the user's changes before and after."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from orchestrator.domain.runs.model import PreparedMerge
from orchestrator.errors import GitError, RefusedError, TargetMissing
from orchestrator.repo.git.command import Git
from orchestrator.repo.landing import target_branch as landings
from orchestrator.repo.landing.interrupted_push import recover_push
from orchestrator.repo.landing.target_branch import DeferredLanding, Landed
from orchestrator.repo.source.user_checkouts import find_repository, lock_marker
from orchestrator.system import file_lock
from orchestrator.system.process import kill_by_environment
from tests.conftest import Repository
from tests.landings import OURS, Landing, recorded
from tests.merge_leases import hold_merge_lease
from tests.waiting import wait_for

pytestmark = pytest.mark.extended


def nothing(_: Landing) -> None:
    """The push had not begun to write."""


def writing(count: int, partial: str | None = None) -> Callable[[Landing], None]:
    """It was writing files: some were complete, and one was perhaps partial."""

    def write(landing: Landing) -> None:
        landing.lock.touch()
        landing.write(tuple(OURS)[:count])
        if partial is not None:
            content, path = OURS[partial] or "", landing.repository.top / partial
            path.parent.mkdir(parents=True)
            path.write_text(content[: len(content) // 2])

    return write


def staged(landing: Landing) -> None:
    """Files and index were written, the ref was not."""
    landing.repository.git("read-tree", "-u", "-m", landing.old, landing.merge.new)


def moved(landing: Landing) -> None:
    """The push was complete but unrecorded. Moves nothing if the user committed first, as a push."""
    staged(landing)
    with suppress(subprocess.CalledProcessError):
        landing.repository.git("update-ref", "refs/heads/main", landing.merge.new, landing.old)


def undoing(landing: Landing) -> None:
    """The undo was in progress: index and one file are as before, and one file is partial."""
    writing(5)(landing)
    (landing.repository.top / "README.md").write_text("# Project\n")
    (landing.repository.top / "src/app.py").write_text("def main():\n    return 0")
    landing.lock.write_text(lock_marker("main"))


STAGES = {
    "nothing": nothing,
    "first file": writing(1),
    "piece": writing(1, "a/b/new.txt"),
    "all files": writing(5),
    "index": staged,
    "ref": moved,
    "undo": undoing,
}


#: The files that the user has now, and the user's lines of `git status`, by path.
Done = tuple[dict[str, str | None], dict[str, str]]
Action = Callable[["Landing"], Done]


def unlocked(landing: Landing) -> None:
    """Remove the stale lock, as git suggests."""
    landing.lock.unlink(missing_ok=True)


def commit_new(landing: Landing) -> Done:
    """Commit a new file."""
    unlocked(landing)
    (landing.repository.top / "user.txt").write_text("user\n")
    landing.repository.git("add", "user.txt")
    landing.repository.git("commit", "--quiet", "--message", "user")
    return {"user.txt": "user\n"}, {}


def commit_only(landing: Landing) -> Done:
    """Commit a new file and a changed one, whatever else is staged."""
    unlocked(landing)
    (landing.repository.top / "user.txt").write_text("user\n")
    (landing.repository.top / "kept.txt").write_text("changed\n")
    landing.repository.git("add", "user.txt")
    landing.repository.git("commit", "--quiet", "--message", "user", "--", "user.txt", "kept.txt")
    return {"user.txt": "user\n", "kept.txt": "changed\n"}, {}


def commit_deletion(landing: Landing) -> Done:
    """Delete a file, and commit that."""
    unlocked(landing)
    landing.repository.git("rm", "--quiet", "kept.txt")
    landing.repository.git("commit", "--quiet", "--message", "user")
    return {"kept.txt": None}, {}


def commit_all(landing: Landing) -> Done:
    """Commit everything, including the landing's files."""
    unlocked(landing)
    (landing.repository.top / "user.txt").write_text("user\n")
    landing.repository.git("add", "--all")
    landing.repository.git("commit", "--quiet", "--message", "user")
    return {"user.txt": "user\n"}, {}


def commit_twice(landing: Landing) -> Done:
    """Commit a new file, then everything else."""
    commit_only(landing)
    (landing.repository.top / "more.txt").write_text("more\n")
    landing.repository.git("add", "more.txt")
    landing.repository.git("commit", "--quiet", "--message", "more")
    return {"user.txt": "user\n", "kept.txt": "changed\n", "more.txt": "more\n"}, {}


def leave_untracked(landing: Landing) -> Done:
    """Create an untracked file."""
    (landing.repository.top / "user.txt").write_text("user\n")
    return {"user.txt": "user\n"}, {"user.txt": "??"}


def prune_objects(landing: Landing) -> Done:
    """Remove the stale lock, and delete all objects that neither a ref nor the index needs."""
    unlocked(landing)
    landing.repository.git("gc", "--quiet", "--prune=now")
    return {}, {}


def idle(_: Landing) -> Done:
    """Do nothing."""
    return {}, {}


ACTIONS = (idle, commit_new, commit_only, commit_deletion, commit_all, commit_twice, leave_untracked, prune_objects)


def cases(stages: set[str], actions: set[Action]) -> list[object]:
    """Return all pairs of a stage and an action; only the named ones run outside of the slow suite."""
    return [
        pytest.param(
            stage,
            act,
            id=f"{stage}-{act.__name__}",
            marks=() if stage in stages and act in actions else pytest.mark.slow,
        )
        for stage in STAGES
        for act in ACTIONS
    ]


@pytest.mark.parametrize(
    ("stage", "act"), cases({"piece", "index", "undo"}, {idle, commit_new, commit_only, prune_objects})
)
async def test_changes_of_the_user_after_a_killed_push_are_kept(
    repository: Repository, tmp_path: Path, stage: str, act: Action
) -> None:
    """At each step of it: the work lands, the user's commits and files stay, and nothing stays staged or locked."""
    if stage in {"piece", "undo"} and act is commit_all:
        pytest.skip("a commit of a partial file is a change of it: a conflict")
    landing = await Landing.prepare(repository, tmp_path)
    await landing.bring_objects()
    STAGES[stage](landing)
    theirs, uncommitted = act(landing)
    await landing.finish()
    landing.check(theirs, uncommitted)


@pytest.mark.parametrize(("stage", "act"), cases({"all files", "index"}, {commit_new, commit_only}))
async def test_commits_of_the_user_before_a_push_writes_are_kept(
    repository: Repository, tmp_path: Path, stage: str, act: Action
) -> None:
    """The push has already checked the checkout when they commit, and is killed at each step."""
    if act is prune_objects:
        pytest.skip("a push whose objects are missing writes nothing")
    landing = await Landing.prepare(repository, tmp_path)
    await landing.bring_objects()
    theirs, uncommitted = act(landing)
    STAGES[stage](landing)
    await landing.finish()
    landing.check(theirs, uncommitted)


#: A git that runs something before or after the command by which a push updates a checkout.
GIT = """#!/bin/sh
if [ "$1" != read-tree ] || [ -e "{folder}/done" ]; then exec {git} "$@"; fi
: > "{folder}/done"
user() {{
    cd "{top}"
    for name in $({git} rev-parse --local-env-vars) GIT_QUARANTINE_PATH; do unset "$name"; done
    {act} || : > "{folder}/refused"
}}
[ {when} = before ] && (user)
[ {when} = before ] && {kill}
{git} "$@"
code=$?
[ {when} = after ] && (user)
[ {when} = after ] && {kill}
exit $code
"""


async def test_lock_of_a_killed_push_is_removed_while_the_user_works(repository: Repository, tmp_path: Path) -> None:
    """Once none of their git commands runs: one of those might own it."""
    landing = await Landing.prepare(repository, tmp_path)
    landing.lock.touch()
    command = ["git", "cat-file", "--batch"]
    with subprocess.Popen(command, cwd=repository.top, env=repository.environ, stdin=subprocess.PIPE) as users:
        assert users.stdin
        ends = threading.Timer(0.5, users.stdin.close)
        ends.start()
        await landing.finish()
        ends.join()
    landing.check({}, {})


async def test_commit_after_switching_to_the_target_during_a_push_is_kept(
    repository: Repository, tmp_path: Path
) -> None:
    """It was checked out nowhere when the push began."""
    landing = await Landing.prepare(repository, tmp_path)
    repository.git("switch", "--quiet", "--create", "other")
    hook = repository.top / ".git/hooks/pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"""#!/bin/sh
unset $(git rev-parse --local-env-vars) GIT_QUARANTINE_PATH
cd {repository.top} && git switch --quiet main && echo user > user.txt && git add user.txt
git -c user.name=user -c user.email=user commit --quiet --message user
""")
    hook.chmod(0o755)
    async with hold_merge_lease(landing.source, "main") as lease:
        await landing.target.move(lease, [landing.merge])
    hook.unlink()
    assert repository.git("log", "-1", "--format=%s") == "user"
    assert repository.git("status", "--porcelain") == ""
    await landing.finish()
    landing.check({"user.txt": "user\n"}, {})


#: A git that completes a user's commit during the undo of a push, after it read the index: `git commit` does so after
#: the hook `pre-commit`, and has no lock.
UNDOING = """#!/bin/sh
case "$*" in
    *--index-info*)
        [ -e {folder}/done ] || {{
            cd {top}
            cp .git/index {folder}/done
            tree=$(GIT_INDEX_FILE={folder}/done {git} write-tree)
            {git} update-ref refs/heads/main $({git} commit-tree $tree -p main -m user)
        }} ;;
esac
exec {git} "$@"
"""


async def test_commit_during_the_undo_of_a_rejected_push_is_not_reverted(
    repository: Repository, tmp_path: Path
) -> None:
    """It includes the staged files of the push: index and files follow it."""
    environ = repository.environ
    landing = await Landing.prepare(repository, tmp_path)
    refuse = repository.top / ".git/hooks/reference-transaction"
    refuse.parent.mkdir(exist_ok=True)
    refuse.write_text('#!/bin/sh\n[ "$1" != prepared ] || exit 1\n')
    refuse.chmod(0o755)
    real, programs = shutil.which("git", path=environ["PATH"]), tmp_path / "programs"
    programs.mkdir()
    (programs / "git").write_text(
        UNDOING.format(folder=tmp_path, git=f"{real} -c core.hooksPath=/", top=repository.top)
    )
    (programs / "git").chmod(0o755)
    path, identity = environ["PATH"], {f"GIT_{who}_NAME": "user" for who in ("AUTHOR", "COMMITTER")}
    environ |= {**identity, "PATH": f"{programs}:{path}"}
    async with hold_merge_lease(landing.source, "main") as lease:
        await landing.target.move(lease, [landing.merge])
    assert (tmp_path / "done").exists()
    environ["PATH"] = path
    refuse.unlink()
    assert repository.git("log", "-1", "--format=%s") == "user"
    assert repository.git("status", "--porcelain") == ""
    await landing.finish()
    landing.check({}, {})


async def test_rejected_push_is_undone_before_the_next(repository: Repository, tmp_path: Path) -> None:
    """For example after a full disk; its staged files do not count as changes of the user's."""
    environ = repository.environ
    landing = await Landing.prepare(repository, tmp_path)
    refuse = repository.top / ".git/hooks/reference-transaction"
    refuse.parent.mkdir(exist_ok=True)
    refuse.write_text('#!/bin/sh\n[ "$1" != prepared ] || exit 1\n')
    refuse.chmod(0o755)
    real, programs, path = shutil.which("git", path=environ["PATH"]), tmp_path / "programs", environ["PATH"]
    programs.mkdir()
    (programs / "git").write_text(f'#!/bin/sh\ncase "$*" in *--index-info*) exit 128 ;; esac\nexec {real} "$@"\n')
    (programs / "git").chmod(0o755)
    environ["PATH"] = f"{programs}:{path}"
    work = await landing.git.line("rev-parse", f"{landing.merge.new}^2")
    async with hold_merge_lease(landing.source, "main") as lease:
        with pytest.raises(GitError, match="128"):
            await landing.target.move(lease, [landing.merge])
        refuse.unlink()
        environ["PATH"] = path
        again = await landing.target.prepare(lease, "run/one", work, landing.old, None, [landing.merge.new])
        assert isinstance(again, PreparedMerge)
        assert isinstance(await landing.target.move(lease, [again]), Landed)
    landing.check({}, {})


def test_rejected_push_is_undone_after_a_kill(repository: Repository, tmp_path: Path) -> None:
    """The next process lands or removes its staged files, which stay locked until then."""
    refuse, path = repository.top / ".git/hooks/reference-transaction", repository.environ["PATH"]
    refuse.parent.mkdir(exist_ok=True)
    refuse.write_text('#!/bin/sh\n[ "$1" != prepared ] || ! grep -q refs/heads/main || exit 1\n')
    refuse.chmod(0o755)
    real, programs, failed = shutil.which("git", path=path), tmp_path / "programs", tmp_path / "failed"
    programs.mkdir()
    fails = f'case "$PWD $*" in "{repository.top} "*--index-info*) : > {failed}; exit 128 ;; esac'
    (programs / "git").write_text(f'#!/bin/sh\n{fails}\nexec {real} "$@"\n')
    (programs / "git").chmod(0o755)
    repository.environ["PATH"] = f"{programs}:{path}"
    tasks = [{"id": "one", "prompt": "write one.txt 1\nappend README.md More."}, {"id": "two", "prompt": "write two 2"}]
    run = repository.start("run", str(repository.configure(tasks)))
    wait_for(failed.exists)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    repository.environ["PATH"] = path
    refuse.unlink()
    with pytest.raises(subprocess.CalledProcessError, match="128"):
        repository.git("commit", "--quiet", "--message", "user")
    ended = repository.council("resume", "--json")
    assert (ended.code, ended.states) == (0, {"one": "landed", "two": "landed"}), ended
    assert repository.git("status", "--porcelain") == ""
    assert not list((repository.top / ".git").glob("index.*"))


async def test_landing_with_a_running_push_stays_interrupted(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example in a stopped hook: its staged files at a kill do not count as changes of the user's."""
    monkeypatch.setattr(landings, "_PUSH_TIMEOUT", 0.1)
    landing = await Landing.prepare(repository, tmp_path)
    await landing.bring_objects()
    async with hold_merge_lease(landing.source, "main") as lease:
        async with landing.target._landing_lock.hold(0):
            with pytest.raises(RefusedError, match="is moving the target"):
                await landing.target.recover(lease, recorded(landing.merge, 60), [landing.merge.new])
            staged(landing)
        assert await landing.target.find_obstacle(landing.merge) is None
    await landing.finish()
    landing.check({}, {})


@pytest.mark.parametrize("kill", ["false", "kill -KILL 0"], ids=["lives", "killed"])
@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize(
    "act", ["commit --quiet --all --message user", "switch --quiet other", "reset --hard", "stash"]
)
async def test_change_of_the_user_during_a_checkout_update_is_rejected(
    repository: Repository, tmp_path: Path, act: str, when: str, kill: str
) -> None:
    """Files that are staged and on no branch yet would be part of their commit, or move along to another branch."""
    environ = repository.environ
    real, programs = shutil.which("git", path=environ["PATH"]), tmp_path / "programs"
    programs.mkdir()
    for program in Path(repository.git("--exec-path")).iterdir():
        (programs / program.name).symlink_to(program)
    (programs / "git").unlink(missing_ok=True)
    identity = {f"GIT_{who}_{what}": "user" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    script = GIT.format(folder=tmp_path, git=real, top=repository.top, when=when, kill=kill, act=f"{real} {act}")
    (programs / "git").write_text(script)
    (programs / "git").chmod(0o755)
    landing = await Landing.prepare(repository, tmp_path)
    repository.git("branch", "other")
    environ |= {**identity, "GIT_EXEC_PATH": str(programs)}
    async with hold_merge_lease(landing.source, "main") as lease:
        await landing.target.move(lease, [landing.merge])
    assert (tmp_path / "refused").exists()
    del environ["GIT_EXEC_PATH"]
    await landing.finish()
    landing.check({}, {})
    assert not list((repository.top / ".git").glob("index.*"))


async def test_finishing_an_interrupted_push_keeps_the_index_locked(repository: Repository, tmp_path: Path) -> None:
    """Until the branch has moved: otherwise a switch would take the staged files along."""
    environ = repository.environ
    landing = await Landing.prepare(repository, tmp_path)
    await landing.bring_objects()
    staged(landing)
    landing.lock.write_text(lock_marker("main"))
    repository.git("branch", "other")
    real, programs, path = shutil.which("git", path=environ["PATH"]), tmp_path / "programs", environ["PATH"]
    programs.mkdir()
    act = f"cd {repository.top} && ! {real} switch --quiet other && : > {tmp_path}/refused"
    (programs / "git").write_text(
        f'#!/bin/sh\ncase "$*" in *" update-ref -m council"*) ({act}) ;; esac\nexec {real} "$@"\n'
    )
    (programs / "git").chmod(0o755)
    environ["PATH"] = f"{programs}:{path}"
    await landing.finish()
    environ["PATH"] = path
    assert (tmp_path / "refused").exists()
    landing.check({}, {})


#: A hook of the user's that changes their checkout while a push runs.
MEANWHILE = """#!/bin/sh
unset $(git rev-parse --local-env-vars) GIT_QUARANTINE_PATH
cd {top} && git {act}
exit 0
"""


@pytest.mark.parametrize("act", ["switch --quiet other", "branch --move main other2"])
async def test_switching_branches_during_a_push_carries_no_changes(
    repository: Repository, tmp_path: Path, act: str
) -> None:
    """Git has determined the target's checkout before that."""
    landing = await Landing.prepare(repository, tmp_path)
    repository.git("branch", "other")
    hook = repository.top / ".git/hooks/update"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(MEANWHILE.format(top=repository.top, act=act))
    hook.chmod(0o755)
    async with hold_merge_lease(landing.source, "main") as lease:
        with suppress(TargetMissing):
            await landing.target.move(lease, [landing.merge])
    hook.unlink()
    assert repository.git("branch", "--show-current") in {"other", "other2"}
    assert repository.git("status", "--porcelain") == ""
    assert not list((repository.top / ".git").glob("index.*"))
    if act.startswith("switch"):
        await landing.finish()
        repository.git("switch", "--quiet", "main")
        landing.check({}, {})


@pytest.mark.parametrize("name", ["update", "reference-transaction"])
async def test_objects_of_a_push_survive_a_prune_of_the_user(repository: Repository, tmp_path: Path, name: str) -> None:
    """No ref points to them yet: the branch would move to a missing commit."""
    landing = await Landing.prepare(repository, tmp_path)
    hook = repository.top / ".git/hooks" / name
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(MEANWHILE.format(top=repository.top, act="repack -q -a -d && git prune --expire=now"))
    hook.chmod(0o755)
    async with hold_merge_lease(landing.source, "main") as lease:
        assert isinstance(await landing.target.move(lease, [landing.merge]), Landed)
    hook.unlink()
    landing.check({}, {})


@pytest.mark.parametrize("name", ["update", "pre-receive"])
async def test_switching_to_the_target_during_a_push_gets_the_landing(
    repository: Repository, tmp_path: Path, name: str
) -> None:
    """The push found no checkout of it: files and index are brought to the new commit after it."""
    landing = await Landing.prepare(repository, tmp_path)
    repository.git("switch", "--quiet", "--create", "other")
    hook = repository.top / ".git/hooks" / name
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(MEANWHILE.format(top=repository.top, act="switch --quiet main"))
    hook.chmod(0o755)
    async with hold_merge_lease(landing.source, "main") as lease:
        moved = await landing.target.move(lease, [landing.merge])
    assert isinstance(moved, Landed)
    landing.check({}, {})


@pytest.mark.parametrize("stage", ["index", "undo"])
async def test_killed_push_is_recovered_after_the_clock_was_set_back(
    repository: Repository, tmp_path: Path, stage: str
) -> None:
    """All its leftovers are older than its intent: a marked lock still counts as ours."""
    landing = await Landing.prepare(repository, tmp_path)
    await landing.bring_objects()
    STAGES[stage](landing)
    landing.lock.write_text(lock_marker("main"))
    await landing.finish(ago=-3600)
    landing.check({}, {})


@pytest.mark.parametrize("leave", ["switch --quiet other", "checkout --quiet --detach", "branch --move main other2"])
@pytest.mark.parametrize("stage", ["index", "piece", "undo"])
async def test_removing_the_lock_of_a_killed_push_and_leaving_takes_nothing_along(
    repository: Repository, tmp_path: Path, stage: str, leave: str
) -> None:
    """The undo happens on their current branch; their own changes stay, staged or not."""
    landing = await Landing.prepare(repository, tmp_path)
    repository.git("branch", "other")
    await landing.bring_objects()
    STAGES[stage](landing)
    unlocked(landing)
    (repository.top / "kept.txt").write_text("staged\n")
    (repository.top / "user.txt").write_text("user\n")
    repository.git("add", "kept.txt", "user.txt")
    (repository.top / "kept.txt").write_text("changed\n")
    repository.git(*leave.split())
    async with hold_merge_lease(landing.source, "main") as lease:
        with suppress(TargetMissing):
            await landing.target.recover(lease, recorded(landing.merge, 60), [landing.merge.new])
    assert repository.git("status", "--porcelain").splitlines() == ["MM kept.txt", "A  user.txt"]
    if "--move" in leave:
        return
    await landing.finish()
    repository.git("stash")
    repository.git("switch", "--quiet", "main")
    landing.check({}, {})


async def test_killed_landing_of_another_run_is_reported_with_its_repair(repository: Repository) -> None:
    """Not as changes of the user's, which they would commit."""
    path = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    hook = repository.top / ".git/hooks/reference-transaction"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text('#!/bin/sh\n[ "$1" != prepared ] || ! grep -q refs/heads/main || kill -KILL 0\n')
    hook.chmod(0o755)
    killed = repository.council("run", str(path), "--json", failpoints="landing.pushed=kill")
    assert killed.code == -signal.SIGKILL
    hook.unlink()
    for command in (["run", str(path)], ["doctor", str(path)]):
        ended = repository.council(*command)
        assert ended.code != 0
        assert "`council resume` of its run" in ended.stdout + ended.stderr, ended
    ended = repository.council("run", str(path), "--allow-deferred", "--json")
    assert ended.states == {"one": "queued"}
    assert "`council resume` of its run" in ended.result["tasks"][0]["reason"]
    assert repository.council("resume", killed.result["run"], "--json").states == {"one": "landed"}
    assert repository.git("status", "--porcelain") == ""


async def test_changes_reverted_by_the_user_after_a_push_stay_reverted(repository: Repository, tmp_path: Path) -> None:
    """The push updated the checkout, which is still on the branch, regardless of the state of other worktrees."""
    landing = await Landing.prepare(repository, tmp_path)
    hook = repository.top / ".git/hooks/post-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(MEANWHILE.format(top=repository.top, act=f"worktree add --quiet --detach {tmp_path}/other"))
    hook.write_text(hook.read_text().replace("exit 0", "echo '# Project' > README.md; rm new.txt"))
    hook.chmod(0o755)
    async with hold_merge_lease(landing.source, "main") as lease:
        assert isinstance(await landing.target.move(lease, [landing.merge]), Landed)
    assert repository.git("status", "--porcelain").splitlines() == [" M README.md", " D new.txt"]


async def test_foreign_lock_that_rejects_a_push_is_kept(repository: Repository, tmp_path: Path) -> None:
    """Also if its owner is not git, and does not keep it open."""
    landing = await Landing.prepare(repository, tmp_path)
    hook = repository.top / ".git/hooks/pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\n: > {landing.lock}\n")
    hook.chmod(0o755)
    async with hold_merge_lease(landing.source, "main") as lease:
        assert isinstance(await landing.target.move(lease, [landing.merge]), DeferredLanding)
    hook.unlink()
    assert landing.lock.exists()
    landing.lock.unlink()
    await landing.finish()
    landing.check({}, {})


async def test_lock_on_the_head_of_a_bare_repository_is_removed(repository: Repository, tmp_path: Path) -> None:
    """HEAD points to the branch that a linked worktree has checked out, and a push locks both."""
    bare, checkout, git = tmp_path / "bare.git", tmp_path / "checkout", Git(None, environ=repository.environ)
    repository.git("clone", "--quiet", "--bare", str(repository.top), str(bare))
    await git("worktree", "add", "--quiet", str(checkout), "main", cwd=bare)
    local, tip = await find_repository(bare, git), repository.git("rev-parse", "main")
    locks = [bare / "HEAD.lock", bare / "worktrees/checkout/HEAD.lock", bare / "refs/heads/main.lock"]
    for lock in locks:
        lock.touch()
    assert await recover_push(local, checkout, "main", (None, tip), 0, git, may_finish=True) == []
    assert not [lock for lock in locks if lock.exists()]


async def test_slow_push_is_reported(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the process that pushes, and by one that waits for the outcome."""
    monkeypatch.setattr(landings, "_SLOW_PUSH", 0.1)
    monkeypatch.setattr(file_lock, "NOTICE_AFTER", 0.1)
    hook, free = repository.top / ".git/hooks/pre-receive", tmp_path / "free"
    hook.write_text(f"#!/bin/sh\nwhile ! test -e {free}; do sleep 0.05; done\n")
    hook.chmod(0o755)
    landing = await Landing.prepare(repository, tmp_path)

    async def reported(count: int) -> None:
        with anyio.fail_after(20):
            while len(caplog.messages) < count:
                await anyio.sleep(0.02)

    async with hold_merge_lease(landing.source, "main") as lease, anyio.create_task_group() as group:
        group.start_soon(landing.target.move, lease, [landing.merge])
        await reported(1)
        group.start_soon(landing.target.recover, lease, recorded(landing.merge, 0), [landing.merge.new])
        await reported(2)
        free.touch()
    pushing, waiting = caplog.messages
    assert pushing == "waiting for a push to the target of this process (a repository hook may be delaying it)"
    assert waiting.startswith(f"waiting for a push to the target of process {os.getpid()} (alive, since ")
    landing.check({}, {})


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 60))])
async def test_pushes_killed_at_random_times_are_recovered(repository: Repository, tmp_path: Path, seed: int) -> None:
    """With commits of the user's at random moments: all of them exist in the end, and nothing is left over."""
    chance = random.Random(seed)
    landing = await Landing.prepare(repository, tmp_path)
    repository.environ["COUNCIL_TEST_MARK"] = mark = f"{tmp_path}/{seed}"
    moments = chance.uniform(0, 0.12), chance.uniform(0, 0.12)
    is_move = chance.random() < 0.5
    are_done: list[bool] = []

    def kill() -> None:
        time.sleep(moments[0])
        kill_by_environment(f"COUNCIL_TEST_MARK={mark}".encode())

    def commit() -> None:
        time.sleep(moments[1])
        with suppress(subprocess.CalledProcessError):  # the push has the lock: the user would retry
            (repository.top / "user.txt").write_text("user\n")
            users.git("add", "user.txt")
            users.git("commit", "--quiet", "--message", "user", "--", "user.txt")
            are_done.append(True)

    users = replace(repository, environ={**repository.environ, "COUNCIL_TEST_MARK": ""})
    threads = [threading.Thread(target=one) for one in (kill, commit)]
    for thread in threads:
        thread.start()
    try:
        with suppress(GitError):
            if is_move:
                async with hold_merge_lease(landing.source, "main") as lease:
                    await landing.target.move(lease, [landing.merge])
            else:
                await landing.source.push(landing.merge.new, "main", landing.old, ())
    finally:
        for thread in threads:
            thread.join()
    if not are_done:
        for lock in (repository.top / ".git").rglob("*.lock"):  # also that of HEAD
            lock.unlink()
        commit_only(landing)
    await landing.finish()
    kept: dict[str, str | None] = {} if are_done else {"kept.txt": "changed\n"}
    landing.check({"user.txt": "user\n", **kept}, {})


@pytest.mark.parametrize("whose", ["0", "$PPID"])
def test_push_stopped_during_its_update_ends_with_its_process(
    repository: Repository, tmp_path: Path, whose: str
) -> None:
    """A hook that is stopped for ever delays `council resume` only by the time to kill it."""
    hook, is_stopped = repository.top / ".git/hooks/post-index-change", tmp_path / "stopped"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\n[ -e {is_stopped} ] || {{ : > {is_stopped}; kill -STOP {whose}; }}\n")
    hook.chmod(0o755)
    run = repository.start("run", str(repository.configure([{"id": "one", "prompt": "write one.txt 1"}])))
    wait_for(is_stopped.exists)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    ended = repository.council("resume", "--json", timeout=20)
    assert ended.states == {"one": "landed"}, ended
    assert repository.git("status", "--porcelain") == ""
    assert not list((repository.top / ".git").glob("index.*"))
