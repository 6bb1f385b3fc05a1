"""The boundary around git: no planted program runs outside of the session, and only the target changes."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from orchestrator.domain.runs.model import PreparedMerge
from orchestrator.repo.git.command import Git
from orchestrator.repo.landing.target_branch import Landed, StaleTarget, Target
from orchestrator.repo.source.run_repository import find_run_repository
from orchestrator.repo.worktrees.hub import create_hub, internal_ref_name, locate_hub
from orchestrator.system.clock import SystemClock
from tests.command_server import StartedCommand
from tests.conftest import Repository
from tests.merge_leases import hold_merge_lease

pytestmark = pytest.mark.sandbox

KILL_ALL = 'kill -9 "$(cat "{pid}")"; kill -9 0'
KILL_COUNCIL = 'kill -9 "$(cat "{pid}")"; sleep 0.2'
ONCE = 'if [ -e "{armed}" ]; then rm "{armed}"; {kill}; fi'


def plant(path: Path, script: str) -> None:
    """Create an executable shell script."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def run_armed(repository: Repository, config: Path, pid: Path, armed: Path) -> StartedCommand:
    """Run until the planted ONCE ends it."""
    child = repository.start("run", str(config), "--json")
    pid.write_text(str(child.pid))
    armed.touch()
    child.communicate(timeout=60)
    return child


def test_hook_of_the_user_does_not_get_the_password_of_the_store(repository: Repository) -> None:
    """Its other variables are the user's."""
    found = repository.spawns.parent / "environment"
    plant(repository.top / ".git/hooks/post-receive", f'cat > /dev/null; env > "{found}"')
    repository.environ.update(COUNCIL_REDIS_PASSWORD="s", COUNCIL_POSTGRES_PASSWORD_FILE="/f", OWN="kept")
    assert repository.council("run", str(repository.configure([{"id": "a", "prompt": "write a.txt x"}]))).code == 0
    names = {line.partition("=")[0] for line in found.read_text().splitlines()}
    assert "OWN" in names
    assert [name for name in names if "PASSWORD" in name] == []


STEPS = {
    "before anything is written": ("pre-receive", "cat > /dev/null; {once}"),
    "when the objects are in": ("update", "{once}"),
    "between index and ref": ("reference-transaction", 'cat > /dev/null; if [ "$1" = prepared ]; then {once}; fi'),
    "right after the ref": ("reference-transaction", 'cat > /dev/null; if [ "$1" = committed ]; then {once}; fi'),
    "when all is done": ("post-receive", "cat > /dev/null; {once}"),
}
#: The branch moves between these two: before them nothing has changed, after them everything has.
QUICK_STEPS = ("between index and ref", "right after the ref")


@pytest.mark.extended_variants
@pytest.mark.parametrize("kill", [KILL_ALL, pytest.param(KILL_COUNCIL, marks=pytest.mark.slow)], ids=["all", "council"])
@pytest.mark.parametrize(
    "step",
    [
        *(pytest.param(step, marks=() if step in QUICK_STEPS else pytest.mark.slow) for step in STEPS),
        "in the middle of the files",
    ],
)
async def test_landing_killed_at_each_step_is_recovered(
    repository: Repository, tmp_path: Path, step: str, kill: str
) -> None:
    """At each interrupted step of the push, a resume brings ref, index and files to one commit with the work."""
    pid, armed = tmp_path / "pid", tmp_path / "armed"
    once = ONCE.format(armed=armed, kill=kill.format(pid=pid))
    if step in STEPS:
        hook, script = STEPS[step]
        plant(repository.top / ".git/hooks" / hook, script.format(once=once))
    else:
        plant(tmp_path / "smudge", f'if [ "$1" = b.cut ]; then {once}; fi; cat')
        repository.git("config", "filter.cut.smudge", f"{tmp_path}/smudge %f")
        repository.git("config", "filter.cut.clean", "cat")
    repository.commit({".gitattributes": "*.cut filter=cut\n", "a.cut": "old a\n", "gone.txt": "x\n"}, "attributes")
    repository.remember()
    prompt = "write a.cut new a\nwrite b.cut new b\nwrite sub/c.cut new c\ndelete gone.txt"
    config = repository.configure([{"id": "cut", "prompt": prompt}])
    child = run_armed(repository, config, pid, armed)
    assert child.returncode == -signal.SIGKILL
    assert not armed.exists()

    ended = repository.council("resume", "--json")
    assert ended.states == {"cut": "landed"}, ended
    assert (repository.top / "b.cut").read_text() == "new b\n"
    assert not (repository.top / "gone.txt").exists()
    await repository.assert_invariants()


@pytest.mark.extended
async def test_interrupted_landing_keeps_later_changes_of_the_user(repository: Repository, tmp_path: Path) -> None:
    """A file that the user changed after the crash is never overwritten: the landing waits with the reason."""
    pid, armed = tmp_path / "pid", tmp_path / "armed"
    once = ONCE.format(armed=armed, kill=KILL_ALL.format(pid=pid))
    plant(tmp_path / "smudge", f'if [ "$1" = b.cut ]; then {once}; fi; cat')
    repository.git("config", "filter.cut.smudge", f"{tmp_path}/smudge %f")
    repository.commit({".gitattributes": "*.cut filter=cut\n", "a.cut": "old a\n"}, "attributes")
    repository.remember()
    config = repository.configure([{"id": "cut", "prompt": "write a.cut new a\nwrite b.cut new b"}])
    run_armed(repository, config, pid, armed)
    (repository.top / "a.cut").write_text("my own words\n")

    ended = repository.council("resume", "--json")
    assert ended.code == 1
    assert ended.states == {"cut": "queued"}
    assert "a.cut" in ended.result["tasks"][0]["reason"]
    assert (repository.top / "a.cut").read_text() == "my own words\n"

    repository.git("checkout", "--", "a.cut")
    assert repository.council("resume", "--json").states == {"cut": "landed"}
    await repository.assert_invariants()


async def test_planted_programs_never_run_outside_of_the_session(repository: Repository, tmp_path: Path) -> None:
    """Filters, hooks, fsmonitor, external diff and signing that an agent configures never run in our git commands."""
    marker = tmp_path / "it-ran"
    evil = tmp_path / "evil"
    plant(evil, f"touch {marker}; cat")
    keys = ["filter.evil.clean", "filter.evil.smudge", "core.fsmonitor", "diff.external", "gpg.program",
            "core.sshCommand", "core.alternateRefsCommand", "merge.evil.driver", "core.editor"]  # fmt: skip
    hub = "../../../hub.git"
    # The sandbox may deny access outside of the session.
    settings = [*(f"{key} {evil}" for key in keys), "commit.gpgSign true"]
    lines = [f'git -c "alias.try=!git config --file {hub}/config {setting} || :" try' for setting in settings]
    lines += [f"intrude {hub}/hooks/post-checkout {evil}"]
    lines += [f"intrude {hub}/info/attributes * filter=evil merge=evil diff=evil"]
    lines += [f"intrude ../git/hooks/{hook} #!/bin/sh" for hook in ("pre-commit", "post-checkout")]
    lines += ["write .gitattributes * filter=evil merge=evil", "write planted.txt x", f"plant {marker}"]
    lines += [f"git config {key} {evil}" for key in keys]
    config = repository.configure(
        [
            {"id": "planter", "prompt": "\n".join(lines)},
            {"id": "next", "prompt": "write next.txt y", "needs": ["planter"]},
            {"id": "beside", "prompt": "write beside.txt z"},
        ]
    )
    ended = repository.council("run", str(config), "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    assert not marker.exists()
    await repository.assert_invariants()


@pytest.mark.extended
async def test_damaged_git_directory_of_a_session_damages_nothing_else(repository: Repository) -> None:
    """Deleted `.git`, moved main, switched branches and commits: only the files count."""
    config = repository.configure(
        [
            {"id": "commits", "prompt": "write one.txt 1\ncommit first\nwrite two.txt 2"},
            {"id": "switches", "prompt": "git switch --quiet --create elsewhere\nwrite three.txt 3\ncommit there"},
            {"id": "moves-main", "prompt": "git branch --force main HEAD\nwrite four.txt 4"},
            {"id": "deletes-git", "prompt": "delete .git\nwrite five.txt 5"},
            {"id": "goes-back", "prompt": "write six.txt 6\ncommit six\ngit checkout --quiet HEAD~1"},
        ]
    )
    ended = repository.council("run", str(config), "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    for name in ("one", "two", "three", "four", "five", "six"):
        assert (repository.top / f"{name}.txt").exists(), name
    assert repository.git("log", "--format=%s", "-1", "--grep=^first$") == "first"
    await repository.assert_invariants()


async def test_rewritten_history_of_an_agent_is_not_imported(repository: Repository) -> None:
    """A branch that does not descend from its base contributes its files only."""
    prompt = "git checkout --quiet --orphan fresh\nwrite new.txt n\ncommit orphan\ngit branch --force council/{0} fresh"
    config = repository.configure([{"id": "orphan", "prompt": prompt}])
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"orphan": "landed"}, ended
    assert repository.git("rev-list", "--max-parents=0", "--count", "HEAD") == "1"
    await repository.assert_invariants()


async def test_nested_repository_is_rejected_and_preserved(repository: Repository) -> None:
    """A repository inside the worktree can't land as a broken link: the task fails with the fix."""
    inner = "git -C inner -c user.name=a -c user.email=a@example.org"
    prompt = f"git init --quiet inner\nwrite inner/file.txt x\ngit -C inner add --all\n{inner} commit -qm inner"
    config = repository.configure([{"id": "nested", "prompt": prompt, "attempts": 1}])
    ended = repository.council("run", str(config), "--json")
    task = ended.result["tasks"][0]
    assert (ended.code, task["status"]) == (1, "failed")
    assert "inner" in task["reason"]
    await repository.assert_invariants()


async def test_landing_of_a_late_zombie_is_adopted(repository: Repository) -> None:
    """A previous owner's push that arrives after the takeover is found under the same lease, and not repeated."""
    site = await find_run_repository(str(repository.top), is_url=False, environ=repository.environ)
    hub = locate_hub(site.identity, Path(repository.environ["COUNCIL_HOME"]))
    await create_hub(hub, site.object_format, repository.environ)
    git = Git(hub.trusted, environ=repository.environ)
    source = site.source(git)
    start = await source.fetch("main", internal_ref_name("r", "start"))
    listing = await git.line("ls-tree", start)

    async def work_of(attempt: int) -> str:
        blob = await git.line("hash-object", "-w", "--stdin", input_=b"attempt %d" % attempt)
        tree = await git.line("mktree", input_=f"{listing}\n100644 blob {blob}\twork.txt\n".encode())
        return await git.line("commit-tree", tree, "-p", start, input_=b"work")

    def owner() -> Target:
        return Target(hub, git, source, branch="main", start=start, ref=internal_ref_name("r", "target"))

    zombie, successor = owner(), owner()
    async with hold_merge_lease(source, "main") as lease:
        old_merge = await zombie.prepare(lease, "r/task", await work_of(1), start)
    async with hold_merge_lease(source, "main") as lease:
        new_merge = await successor.prepare(lease, "r/task", await work_of(2), start)
        assert isinstance(old_merge, PreparedMerge)
        assert isinstance(new_merge, PreparedMerge)
        # The previous owner's push arrives only now.
        pushed = await source.push(old_merge.new, "main", old_merge.old, ())
        assert pushed.moved
        assert await successor.move(lease, [new_merge]) == StaleTarget()
        again = await successor.prepare(lease, "r/task", await work_of(2), start, intended=[old_merge.new])
    assert again == Landed(old_merge.new)
    assert repository.git("rev-list", "--first-parent", "--count", f"{start}..main") == "1"


@pytest.mark.extended
async def test_resume_waits_for_a_push_that_outlives_its_owner(repository: Repository, tmp_path: Path) -> None:
    """The owner is killed during a push that continues; resume waits for it and lands nothing twice."""
    pid, armed = tmp_path / "pid", tmp_path / "armed"
    once = ONCE.format(armed=armed, kill=f'kill -9 "$(cat "{pid}")"; sleep 2')
    plant(repository.top / ".git/hooks/update", once)
    repository.remember()
    config = repository.configure([{"id": "slow", "prompt": "write slow.txt s"}])
    run_armed(repository, config, pid, armed)
    started = SystemClock().now()
    ended = repository.council("resume", "--json")
    assert ended.states == {"slow": "landed"}, ended
    assert SystemClock().now() - started > 1, "the resume did not wait for the push"
    await repository.assert_invariants()


async def test_conflict_preserves_both_sides_and_the_target(repository: Repository) -> None:
    """The second of two tasks that change one line ends as conflict, with paths and a branch that has both sides."""
    config = repository.configure(
        [
            {"id": "left", "prompt": "write README.md left"},
            {"id": "right", "prompt": "write README.md right"},
        ]
    )
    ended = repository.council("run", str(config), "--json")
    assert ended.code == 1
    assert sorted(ended.states.values()) == ["conflict", "landed"], ended
    task = next(task for task in ended.result["tasks"] if task["status"] == "conflict")
    assert task["paths"] == ["README.md"]
    where = repository.council("where", "--json").result
    shown = subprocess.run(
        ["git", "show", f"{task['branch']}:README.md"], cwd=where["trusted"], check=True, capture_output=True, text=True
    ).stdout
    assert "left\n" in shown
    assert "right\n" in shown
    # The markers name the target branch and the task, as the user knows them.
    assert "<<<<<<< main\n" in shown
    assert f">>>>>>> {ended.result['run']}/{task['id']}\n" in shown
    await repository.assert_invariants()


@pytest.mark.parametrize("staged", [pytest.param(False, marks=pytest.mark.slow), True])
async def test_dirty_target_is_rejected_unless_deferred(repository: Repository, staged: bool) -> None:
    """A run with a dirty target checkout is rejected at its start; if allowed, it lands on resume."""
    (repository.top / "README.md").write_text("mine\n")
    if staged:
        repository.git("add", "README.md")
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    refused = repository.council("run", str(config), "--json")
    assert refused.code == 2
    assert "README.md" in refused.result["error"]

    deferred = repository.council("run", str(config), "--json", "--allow-deferred")
    assert (deferred.code, deferred.states) == (1, {"one": "queued"})
    assert (repository.top / "README.md").read_text() == "mine\n"

    repository.git("checkout", "HEAD", "--", "README.md")
    resumed = repository.council("resume", "--json")
    assert (resumed.code, resumed.states) == (0, {"one": "landed"})
    await repository.assert_invariants()


async def test_work_that_can_not_be_staged_is_preserved(repository: Repository, tmp_path: Path) -> None:
    """Other files are on a branch, and the worktree stays at the path in the reason."""
    prompt = "write good.txt good\ngit init --quiet inner\nwrite inner/file.txt x"  # a repository without a commit
    config = repository.configure([{"id": "half", "prompt": prompt, "attempts": 1}])
    task = repository.council("run", str(config), "--json").result["tasks"][0]
    assert task["status"] == "failed"
    trusted = repository.council("where", "--json").result["trusted"]
    shown = subprocess.run(["git", "show", f"{task['branch']}:good.txt"], cwd=trusted, capture_output=True, check=True)
    assert shown.stdout == b"good\n"
    kept = next((tmp_path / "council-home").glob("*/sessions/*/half.1/slot/tree"))
    assert str(kept.resolve()) in task["reason"]
    assert (kept / "inner/file.txt").exists()


@pytest.mark.extended
async def test_reverted_changes_of_an_agent_do_not_land(repository: Repository) -> None:
    """An older commit on its branch has changes that the checkout does not have any more."""
    config = repository.configure([{"id": "undo", "prompt": "write x.txt x\ncommit x\ndelete x.txt"}])
    assert repository.council("run", str(config), "--json").states == {"undo": "no_change"}
    await repository.assert_invariants()


async def test_replaced_worktree_is_not_followed(repository: Repository, tmp_path: Path) -> None:
    """A checkout that became a link to another folder is neither read nor landed."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private/secret.txt").write_text("canary-77\n")
    shell = {"use": "command", "argv": ["sh", "-c", f"cd .. && mv tree real && ln -s {tmp_path}/private tree"]}
    tasks = [{"id": "link", "prompt": "x", "attempts": 1}]
    config = repository.configure(tasks, adapters={"sh": shell}, sandbox="off")
    task = repository.council("run", str(config), "--json").result["tasks"][0]
    assert task["status"] == "failed"
    assert "replaced" in task["reason"]
    assert not list((tmp_path / "council-home").glob("*/hub.git/objects/*/secret*"))
    await_free = repository.git("log", "--all", "--oneline", "--", "secret.txt")
    assert await_free == ""


@pytest.mark.extended
async def test_conflict_in_a_non_utf8_name_is_reported(repository: Repository) -> None:
    """The name is printed with escapes; the run ends normally."""
    shell = {"use": "command", "argv": ["sh", "{prompt_file}"]}
    script = "printf '{}\\n' > \"$(printf 'caf\\351.txt')\""
    tasks = [{"id": name, "prompt": script.format(name)} for name in ("left", "right")]
    config = repository.configure(tasks, adapters={"sh": shell})
    ended = repository.council("run", str(config), "--json")
    assert sorted(ended.states.values()) == ["conflict", "landed"], ended
    conflict = next(task for task in ended.result["tasks"] if task["status"] == "conflict")
    assert conflict["paths"] == ["caf\\xe9.txt"]


@pytest.mark.extended
async def test_interrupted_rejected_push_keeps_the_users_changes(repository: Repository, tmp_path: Path) -> None:
    """Changes that the user made before a landing are theirs, even if they look like the landing's."""
    repository.commit({"a.txt": "one\ntwo\n", "b.txt": "b\n", "c.txt": "c\n"}, "files")
    prompt = "write a.txt one\nappend a.txt two\nappend a.txt three\nwrite b.txt bb\nwrite c.txt cc\nwrite new.txt n"
    config = repository.configure([{"id": "edit", "prompt": prompt}])
    (repository.top / "a.txt").write_text("one\n")
    (repository.top / "b.txt").write_text("")
    (repository.top / "c.txt").unlink()
    (repository.top / "new.txt").write_text("")
    killed = repository.council("run", str(config), "--allow-deferred", failpoints="landing.merged=kill")
    assert killed.code == -signal.SIGKILL
    ended = repository.council("resume", "--json")
    assert ended.states == {"edit": "queued"}, ended
    assert (repository.top / "a.txt").read_text() == "one\n"
    assert (repository.top / "b.txt").read_text() == ""
    assert not (repository.top / "c.txt").exists()
    assert (repository.top / "new.txt").read_text() == ""


@pytest.mark.extended
async def test_changes_during_a_rejected_push_survive_recovery(repository: Repository, tmp_path: Path) -> None:
    """A push that a hook rejects has written no file: differences after a kill are the user's, and stay."""
    pid, armed = tmp_path / "pid", tmp_path / "armed"
    kill = f'kill -9 "$(cat "{pid}")"; exit 1'
    plant(repository.top / ".git/hooks/update", ONCE.format(armed=armed, kill=kill))
    repository.commit({"a.txt": "one\ntwo\n"}, "files")
    config = repository.configure([{"id": "edit", "prompt": "write a.txt other\nwrite b.txt b"}])
    run_armed(repository, config, pid, armed)
    (repository.top / "a.txt").unlink()
    ended = repository.council("resume", "--json")
    assert ended.states == {"edit": "queued"}, ended
    assert not (repository.top / "a.txt").exists()


@pytest.mark.extended
async def test_stray_folder_and_stale_locks_do_not_block_a_run(repository: Repository, tmp_path: Path) -> None:
    """Folders that belong to no attempt are skipped; locks of our killed git commands are removed."""
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    assert repository.council("run", str(config), failpoints="worktree.created=kill").code == -signal.SIGKILL
    hub = next(path for path in (tmp_path / "council-home").iterdir() if path.is_dir())
    run = next((hub / "sessions").iterdir())
    (run / "notes").mkdir()
    (run / "other.1").mkdir()
    (hub / "trusted.git/packed-refs.lock").touch()
    (hub / f"trusted.git/refs/council/{run.name}/target.lock").touch()
    ended = repository.council("resume", "--json")
    assert ended.states == {"one": "landed"}, ended


@pytest.mark.extended
async def test_work_merged_by_the_user_is_not_merged_again(repository: Repository) -> None:
    """A preserved branch that the user merged and then repaired is detected; the repair stays."""
    (repository.top / "README.md").write_text("mine\n")
    config = repository.configure([{"id": "one", "prompt": "write a.txt a\nwrite b.txt b"}])
    deferred = repository.council("run", str(config), "--json", "--allow-deferred")
    assert deferred.states == {"one": "queued"}
    repository.git("checkout", "--", "README.md")
    branch = deferred.result["tasks"][0]["branch"]
    repository.git("fetch", "--quiet", deferred.result["repository"], f"{branch}:kept")
    repository.git("merge", "--quiet", "--no-ff", "--message", "by hand", "kept")
    repository.git("rm", "--quiet", "b.txt")
    repair = repository.commit({"a.txt": "better\n"}, "repair it")
    resumed = repository.council("resume", "--json")
    assert resumed.states == {"one": "landed"}, resumed
    assert repository.git("rev-parse", "main") == repair
    assert not (repository.top / "b.txt").exists()


@pytest.mark.extended
async def test_folder_that_becomes_a_link_lands(repository: Repository) -> None:
    """A folder that is replaced by a file or a link lands on a clean checkout."""
    repository.commit({"d/one.txt": "1\n", "f/two.txt": "2\n"}, "folders")
    repository.remember()
    shell = {"use": "command", "argv": ["sh", "{prompt_file}"]}
    script = "mv d e && ln -s e d && rm -r f && echo now-a-file > f"
    config = repository.configure([{"id": "link", "prompt": script}], adapters={"sh": shell})
    assert repository.council("run", str(config), "--json").states == {"link": "landed"}
    assert (repository.top / "d").is_symlink()
    assert (repository.top / "f").read_text() == "now-a-file\n"
    await repository.assert_invariants()


async def test_push_killed_in_the_middle_is_undone_immediately(repository: Repository, tmp_path: Path) -> None:
    """The push is killed while it writes files, and the checkout is restored before the run continues."""
    armed = tmp_path / "armed"
    plant(
        tmp_path / "smudge", f'if [ "$1" = c.cut ] && [ -e {armed} ]; then rm {armed}; kill -TERM 0; sleep 5; fi; cat'
    )
    repository.git("config", "filter.cut.smudge", f"{tmp_path}/smudge %f")
    repository.commit({".gitattributes": "*.cut filter=cut\n", "a.cut": "a\n", "b.cut": "b\n", "c.cut": "c\n"}, "files")
    repository.remember()
    config = repository.configure([{"id": "cut", "prompt": "write a.cut aa\nwrite b.cut bb\nwrite c.cut cc"}])
    armed.touch()
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"cut": "landed"}, ended
    assert not armed.exists()
    assert (repository.top / "c.cut").read_text() == "cc\n"
    await repository.assert_invariants()
