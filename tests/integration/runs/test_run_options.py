"""Options of `council run`: prompts on the command line, selected tasks, capacity."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest

from orchestrator.cli.core.run_source import is_prompt, load_run_config
from orchestrator.config.inline import InlineTasks
from orchestrator.engine.state.records import task_key
from orchestrator.errors import RefusedError
from orchestrator.plugins import Plugins
from orchestrator.project import Project
from orchestrator.protocols import Commit, Write
from orchestrator.state.stores.file import open_file_store
from orchestrator.system.clock import SystemClock
from tests.conftest import Repository
from tests.integration.runs.test_control import has_begun
from tests.unit.test_inline_task import TYPES, _Free
from tests.waiting import wait_for

CHAIN: list[dict[str, Any]] = [
    {"id": "a", "prompt": "write a.txt a"},
    {"id": "b", "prompt": "write b.txt b", "needs": ["a"]},
    {"id": "c", "prompt": "write c.txt c", "needs": ["b"]},
    {"id": "d", "prompt": "write d.txt d"},
]


def write_config(repository: Repository, tasks: list[dict[str, Any]]) -> None:
    """Write council.yaml at the top of the repository, with a target for each run."""
    written = json.loads(repository.configure(tasks).read_text())
    del written["target"]
    (repository.top / "council.yaml").write_text(json.dumps({**written, "repo": "."}))


@pytest.mark.extended
async def test_prompt_argument_equals_the_option(repository: Repository) -> None:
    """`run "..."` equals `run --task "..."`, with the file's settings; both together are two tasks."""
    write_config(repository, CHAIN)
    words, option = (
        repository.council("run", *form, "--json") for form in (["write x.txt 1"], ["--task", "write x.txt 1"])
    )
    assert words.states == option.states == {"task-1": "landed"}
    both = repository.council("run", "write x.txt 1", "--task", "write y.txt 2", "--dry-run", "--json").result
    assert [task["id"] for task in both["waves"][0]["tasks"]] == ["task-1", "task-2"]


@pytest.mark.parametrize(("text", "expected"), [
    ("fix the bug", True), ("a file.yaml", False), ("gone.yml", False), ("there", False), ("is there", False),
])  # fmt: skip
def test_existing_or_yaml_path_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    (tmp_path / "is there").touch()
    assert is_prompt(text) is expected


def test_single_word_may_be_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file name without its extension starts no session."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "night.yaml").touch()
    with pytest.raises(click.UsageError, match=r"did you mean 'night.yaml'\?.*--task night"):
        is_prompt("night")


@pytest.mark.parametrize("words", [("",), ("--task", " ")])
def test_empty_prompt_is_rejected_without_naming_the_file(repository: Repository, words: tuple[str, ...]) -> None:
    write_config(repository, CHAIN)
    refused = repository.council("run", *words)
    assert refused.code == 2
    assert "the prompt is empty" in refused.stderr
    assert "council.yaml" not in refused.stderr


async def test_only_installed_adapter_runs_without_a_file(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several adapters one has to be chosen."""
    monkeypatch.chdir(repository.top)
    programs = repository.top.parent / "programs"
    programs.mkdir()
    (programs / "free").write_text("#!/bin/sh\n")
    (programs / "free").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{repository.environ['PATH']}")
    types = dict(TYPES)
    monkeypatch.setattr("orchestrator.cli.core.run_source.load_plugins", lambda *_: Plugins(adapters=types))
    _, config = await load_run_config(None, InlineTasks(("Do it.",)))
    assert [task.adapter for task in config.tasks] == ["free"]
    types["free-too"] = _Free
    with pytest.raises(RefusedError, match="choose one with --adapter: free, free-too"):
        await load_run_config(None, InlineTasks(("Do it.",)))


async def test_only_option_runs_tasks_with_their_needs(repository: Repository) -> None:
    """In the file's order; an unknown name suggests the nearest, and other tasks are not required."""
    config = str(repository.configure(CHAIN))
    reported = repository.council("run", config, "--only", "b", "--dry-run", "--json").result
    assert [[task["id"] for task in wave["tasks"]] for wave in reported["waves"]] == [["a"], ["b"]]
    ended = repository.council("run", config, "--only", "d", "--only", "a", "--json")
    assert ended.states == {"a": "landed", "d": "landed"}
    wrong = repository.council("run", config, "--only", "e")
    assert (wrong.code, "the file has no task 'e'" in wrong.stderr) == (2, True)
    assert repository.council("run", config, "--only", "a", "--task", "x y").code == 2


@pytest.mark.extended
async def test_capacity_option_overrides_the_file(repository: Repository) -> None:
    """The run records the option; the difference is no change of the file."""
    tasks = [{"id": f"t{n}", "prompt": f"attempt 1 exit 1\nwrite {n} {n}", "attempts": 1} for n in range(3)]
    config = str(repository.configure(tasks))
    ended = repository.council("run", config, "-j", "1", "--json")
    assert ended.code == 1
    assert re.search(r"capacity +1$", repository.council("state", "show").stdout, re.MULTILINE)
    assert repository.council("retry", "t0", "t1", "t2").code == 0
    resumed = repository.council("resume", "--capacity", "2", "--json")
    assert set(resumed.states.values()) == {"landed"}
    assert not [line for line in resumed.lines if line.get("event") == "run.file_changed"]
    assert repository.council("run", config, "-j", "0").code == 2


@pytest.mark.extended
async def test_resume_names_older_interrupted_runs(repository: Repository) -> None:
    """If no run is given; a finished one is not named."""
    child = repository.start("run", str(repository.configure([{"id": "long", "prompt": "attempt 1 hang\nwrite l l"}])))
    has_begun(repository, "long")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    older = repository.council("status", "--json").result["run"]
    newer = repository.council("run", str(repository.configure([])), "--task", "write x.txt x", "--json").result["run"]
    resumed = repository.council("resume")
    assert resumed.stdout.startswith(f"run {newer}: landed"), resumed
    assert resumed.stderr == f"also interrupted or halted: {older} (`council runs`)\n", resumed
    assert "also interrupted" not in repository.council("resume", older).stderr
    assert "also interrupted" not in repository.council("resume").stderr


def test_resume_of_a_finished_run_suggests_retry(repository: Repository) -> None:
    """It reports that nothing can be resumed; the totals name the blockers of a task."""
    tasks: list[dict[str, Any]] = [
        {"id": "need", "prompt": "exit 3", "attempts": 1},
        {"id": "after", "prompt": "write a a", "needs": ["need"]},
    ]
    ended = repository.council("run", str(repository.configure(tasks)))
    assert "  after blocked: needs 'need', which did not land" in ended.stdout.splitlines(), ended
    resumed = repository.council("resume")
    assert (resumed.code, resumed.stderr) == (1, ""), resumed
    assert resumed.stdout.splitlines()[-1] == "The run has ended. To retry a task: council retry TASK", resumed
    assert repository.council("resume", "--detach") == resumed


async def test_detached_run_continues_in_its_own_session(repository: Repository) -> None:
    """The command returns at once with the process id; a signal stops the run, `resume --detach` resumes it."""
    gate = repository.spawns.parent / "gate"
    prompt = f"while ! test -e {gate}; do sleep 0.05; done; echo x > x.txt"
    config = repository.configure(
        [{"id": "t", "prompt": prompt}],
        adapters={"sh": {"use": "command", "argv": ["sh", "{prompt_file}"]}},
        readable=[str(gate.parent)],
    )
    started = repository.council("run", str(config), "--detach", "--json").result
    assert os.getsid(started["pid"]) == started["pid"] != os.getsid(0)
    wait_for(lambda: repository.council("status", "--json").states["t"] == "running")
    os.kill(started["pid"], signal.SIGINT)
    wait_for(lambda: repository.council("status", "--json").result["status"] == "interrupted")
    assert repository.council("status", "--json").result["background"] is None
    text = repository.council("resume", "--detach", "-j", "1").stdout
    assert f"council watch {started['run']}" in text
    wait_for(lambda: repository.council("status", "--json").states["t"] == "running")
    pipe = subprocess.PIPE
    with subprocess.Popen(["council", "watch"], cwd=repository.top, env=repository.environ, stdout=pipe) as watch:
        assert watch.stdout is not None
        shown = [watch.stdout.readline().split()[:2] for _ in range(2)]
        gate.touch()
    assert shown == [[b"run", f"{started['run']}:".encode()], [b"t", b"running"]]
    assert repository.council("watch", "--json").states == {"t": "landed"}


@pytest.mark.extended
async def test_active_run_is_not_detached_again(repository: Repository) -> None:
    """The new process could not take it over, and the printed process id would be wrong."""
    config = repository.configure([{"id": "t", "prompt": "hang"}])
    started = repository.council("run", str(config), "--detach", "--json").result
    has_begun(repository, "t")
    again = repository.council("resume", "--detach")
    assert (again.code, again.stdout) == (2, ""), again
    assert f"run {started['run']} is already running: `council watch {started['run']}`" in again.stderr
    os.kill(started["pid"], signal.SIGINT)
    wait_for(lambda: repository.council("status", "--json").result["status"] == "interrupted")


@pytest.mark.extended
async def test_error_of_a_detached_run_is_in_its_status(repository: Repository) -> None:
    """A background process has no terminal to print it on."""
    child = repository.start("run", str(repository.configure([{"id": "t", "prompt": "hang"}])))
    has_begun(repository, "t")
    child.send_signal(signal.SIGINT)
    child.communicate()
    run = repository.council("status", "--json").result["run"]
    log = repository.top / ".council/logs" / run / "background.log"
    log.write_text("a notice\ncouncil: the disk is full\n")
    assert repository.council("status", "--json").result["background"] == "the disk is full"
    assert "The background process ended with an error: the disk is full" in repository.council("status").stdout


@pytest.mark.extended
async def test_merge_lands_a_runs_own_branch_on_its_base(repository: Repository) -> None:
    """With the checks of its tasks on the merge, and the user's newer commits; a second merge is empty."""
    checks = {"checks": ["test -e a.txt", "test ! -e forbidden"], "allow_failing_base": True}
    write_config(repository, [{**CHAIN[0], **checks}, CHAIN[3]])
    repository.commit({".gitignore": "council.yaml\n"})
    run = repository.council("run")
    assert run.stdout.splitlines()[-1].startswith("Next: council merge 2"), run
    name = repository.council("status", "--json").result["run"]
    repository.commit({"own.txt": "own"})
    merged = repository.council("merge", "--json")
    assert (merged.code, merged.states, merged.result["target"]) == (0, {"merge": "landed"}, "main"), merged
    assert {path.name for path in repository.top.glob("*.txt")} == {"a.txt", "d.txt", "own.txt"}
    again = repository.council("merge", name)
    assert (again.code, "'main' already contains" in again.stdout, again.stdout.count("\n")) == (0, True, 1), again
    merge = merged.result["run"]
    assert repository.council("status", name, "--json").result["merged_by"] == merge
    listed = " ".join(repository.council("runs").stdout.split())
    assert (f"merged by run {merge}" in listed, f"merge of run {name}" in listed) == (True, True), listed
    for command in ("status", "resume"):
        assert "council merge" not in repository.council(command, name).stdout
    for given, meant in (([], name), (["latest"], name), ([merge], merge)):
        assert repository.council("status", *given, "--json").result["run"] == meant
    for command in ("logs", "show", "diff"):
        refused = repository.council(command, "merge")
        assert (refused.code, f"add --run {merge}" in refused.stderr) == (2, True), refused
        shown = repository.council(command, "merge", "--run", merge)
        assert (shown.code, "session" in shown.stdout) == (0, False), shown
    assert repository.git("log", "-1", "--format=%s", "main") == f"Land run {name}"
    details = repository.council("show", "merge", "--run", merge, "--json").result
    assert (details["adapter"], details["phases"], details["sessions"], details["usage"]["sessions"]) == (
        None,
        [],
        [],
        0,
    )
    read = repository.council("show", "merge", "--run", merge).stdout
    assert not [part for part in ("fake", "session", ".stdout", "build") if part in read], read
    await repository.assert_invariants()


@pytest.mark.extended
def test_unlanded_merge_is_continued(repository: Repository) -> None:
    """By the next `council merge`, as the same run; until then all commands show it as queued."""
    write_config(repository, [CHAIN[0]])
    repository.commit({".gitignore": "council.yaml\n"})
    assert repository.council("run").code == 0
    (repository.top / "a.txt").write_text("in the way")
    first = repository.council("merge", "--json")
    assert (first.code, first.states) == (1, {"merge": "queued"}), first
    assert "0 of 1 landed on main, 1 queued" in repository.council("runs").stdout
    assert ", 1 queued" in repository.council("state", "show", first.result["run"]).stdout
    (repository.top / "a.txt").unlink()
    second = repository.council("merge", "--json")
    assert (second.code, second.states) == (0, {"merge": "landed"}), second
    assert second.result["run"] == first.result["run"]
    assert len(repository.council("runs", "--json").result["runs"]) == 2


def _has_landed(repository: Repository) -> bool:
    tasks = repository.council("status", "--json").result.get("tasks", [])  # absent until the run is created
    return any(task["status"] == "landed" for task in tasks)


@pytest.mark.extended
async def test_merge_does_not_merge_a_branch_while_its_work_is_queued(repository: Repository) -> None:
    """The exit code is 1 and the base is unchanged until the queued work has landed."""
    gate = repository.spawns.parent / "gate"
    write_config(repository, [CHAIN[0], {"id": "d", "prompt": f"await {gate}\nwrite d.txt d"}])
    repository.commit({".gitignore": "council.yaml\n", "README.md": "read me\n"})
    before = repository.git("rev-parse", "main")
    with repository.start("run") as child:
        wait_for(lambda: _has_landed(repository))
        repository.git("switch", "--quiet", repository.council("status", "--json").result["target"])
        (repository.top / "README.md").write_text("my own change\n")
        gate.touch()
        assert child.wait(60) == 1
    for _ in range(2):
        merged = repository.council("merge", "--json")
        assert (merged.code, merged.states) == (1, {"a": "landed", "d": "queued"}), merged
        assert repository.git("rev-parse", "main") == before
    repository.git("checkout", "--quiet", "README.md")
    repository.git("switch", "--quiet", "main")
    landed = repository.council("merge", "--json")
    assert (landed.code, landed.states) == (0, {"merge": "landed"}), landed
    assert (repository.top / "d.txt").exists()
    await repository.assert_invariants()


@pytest.mark.extended
async def test_merge_of_an_interrupted_run_names_the_resume_of_its_unfinished_tasks(repository: Repository) -> None:
    write_config(repository, [CHAIN[0], {"id": "d", "prompt": "hang"}])
    repository.commit({".gitignore": "council.yaml\n"})
    with repository.start("run") as child:
        wait_for(lambda: _has_landed(repository))
        child.terminate()
    run = repository.council("status", "--json").result["run"]
    merged = repository.council("merge")
    assert (merged.code, f"`council resume {run}` continues them" in merged.stderr) == (0, True), merged
    await repository.assert_invariants()


@pytest.mark.extended
async def test_merge_into_a_dirty_checkout_is_rejected_before_a_run(repository: Repository) -> None:
    write_config(repository, [CHAIN[0]])
    repository.commit({".gitignore": "council.yaml\n"})
    assert repository.council("run").code == 0
    (repository.top / ".gitignore").write_text("mine\n")
    for _ in range(2):
        refused = repository.council("merge")
        assert (refused.code, "commit or stash them, then `council merge`" in refused.stderr) == (2, True), refused
    assert len(repository.council("runs", "--json").result["runs"]) == 1
    (repository.top / ".gitignore").write_text("council.yaml\n")
    assert repository.council("merge", "--json").states == {"merge": "landed"}


@pytest.mark.extended
async def test_merge_that_fails_its_checks_moves_nothing(repository: Repository) -> None:
    """No session follows; the unmerged work is preserved."""
    write_config(repository, [{**CHAIN[0], "checks": ["test ! -e forbidden"]}])
    repository.commit({".gitignore": "council.yaml\n"})
    assert repository.council("run").code == 0
    before = repository.commit({"forbidden": "x"})
    spawned = repository.spawns.read_text()
    merged = repository.council("merge", "--json")
    assert (merged.code, merged.states) == (1, {"merge": "failed"}), merged
    assert repository.git("rev-parse", "main") == before
    assert repository.spawns.read_text() == spawned


@pytest.mark.extended
@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (
            "forbidden",
            [
                "next: council logs merge --run {merge}",
                "then: fix main or council/{run}, and commit the fix",
                "then: council merge {run}",
            ],
        ),
        (
            "a.txt",
            [
                "next: git switch council/{run} && git merge main",
                "then: resolve the conflicts, and `git commit --all --no-edit`",
                "then: council merge {run}",
            ],
        ),
    ],
)
def test_failed_merge_has_its_next_commands(repository: Repository, theirs: str, expected: list[str]) -> None:
    """A retry would merge the same commits again. The printed commands work as printed."""
    write_config(repository, [{**CHAIN[0], "checks": ["test ! -e forbidden"]}])
    repository.commit({".gitignore": "council.yaml\n"})
    assert repository.council("run").code == 0
    name = repository.council("status", "--json").result["run"]
    repository.commit({theirs: "x"})
    merged = repository.council("merge")
    assert "assigned to worker" not in merged.stdout
    [merge] = {one["run"] for one in repository.council("runs", "--json").result["runs"]} - {name}
    left = repository.council("salvage", "list", "--run", merge, "--json").result["preserved"]
    assert "merge/1" in [one["name"] for one in left]
    steps = [step.format(run=name, merge=merge) for step in expected]
    for shown in (merged.stdout, repository.council("status", merge).stdout):
        assert [line.strip() for line in shown.splitlines() if line.strip() in steps] == steps, shown
        assert "retry" not in shown
    if theirs == "forbidden":
        assert repository.council("logs", "merge", "--run", merge).code == 0
        (repository.top / theirs).unlink()
        repository.git("commit", "--quiet", "--all", "--message", "fixed")
    else:
        typed = steps[0].removeprefix("next: ")
        identity = {"GIT_COMMITTER_NAME": "U", "GIT_COMMITTER_EMAIL": "u@example.org"}
        environ = {**repository.environ, **identity, "GIT_AUTHOR_NAME": "U", "GIT_AUTHOR_EMAIL": "u@example.org"}
        conflict = subprocess.run(
            ["sh", "-c", typed], check=False, cwd=repository.top, env=environ, capture_output=True, text=True
        )
        assert (conflict.returncode, "CONFLICT" in conflict.stdout) == (1, True), conflict
        (repository.top / theirs).write_text("both\n")
        repository.git(*steps[1].partition("`git ")[2].rstrip("`").split())
    again = repository.council(*steps[2].removeprefix("then: council ").split(), "--json")
    assert again.states == {"merge": "landed"}, again
    assert repository.council("salvage", "list", "--run", merge, "--json").result["preserved"] == []


async def test_merge_lands_queued_work_and_starts_nothing(repository: Repository) -> None:
    """Work held up by changes in the checkout lands; pending tasks are left to `resume`."""
    tasks: list[dict[str, Any]] = [
        {"id": "built", "prompt": "write README.md changed"},
        {"id": "later", "prompt": "write later.txt x", "needs": ["built"]},
    ]
    config = str(repository.configure(tasks))
    (repository.top / "README.md").write_text("my own change")
    run = repository.council("run", config, "--allow-deferred")
    assert "Next: council resume" in run.stdout, run
    repository.git("checkout", "--quiet", "README.md")
    merged = repository.council("merge", "--json")
    assert merged.states == {"built": "landed", "later": "pending"}, merged
    assert repository.council("resume", "--json").states == {"built": "landed", "later": "landed"}
    nothing = repository.council("merge")
    assert (nothing.code, "has nothing to merge" in nothing.stdout, nothing.stdout.count("\n")) == (0, True, 1)
    assert repository.council("merge", "--json").result["exit"] == 0


@pytest.mark.extended
def test_queue_of_an_inactive_run_shows_the_recorded_reason(repository: Repository) -> None:
    """Together with the command that lands the work."""
    config = str(repository.configure([{"id": "built", "prompt": "write README.md changed"}]))
    (repository.top / "README.md").write_text("my own change")
    ended = repository.council("run", config, "--allow-deferred", "--json")
    [queued] = repository.council("queue", "--json").result["queue"]
    assert ended.result["tasks"][0]["reason"] in queued["reason"]
    assert queued["reason"].endswith(f"`council merge {ended.result['run']}` lands it")
    assert f"Next: council merge {ended.result['run']}" in repository.council("status").stdout
    assert repository.council("resume", "--json").states == {"built": "queued"}
    repository.git("checkout", "--quiet", "README.md")
    assert repository.council("merge", "--json").states == {"built": "landed"}


@pytest.mark.extended
def test_merge_without_a_name_reports_older_unmerged_runs(repository: Repository) -> None:
    write_config(repository, [CHAIN[0]])
    repository.commit({".gitignore": "council.yaml\n"})
    older = repository.council("run", "--json").result["run"]
    assert repository.council("run", "--task", "none").code == 1
    nothing = repository.council("merge")
    assert (nothing.code, f"also not merged: {older} (`council runs`)" in nothing.stderr) == (0, True), nothing
    named = repository.council("merge", older)
    assert (named.code, "also" in named.stderr) == (0, False), named


@pytest.mark.extended
async def test_merge_run_never_starts_a_session(repository: Repository) -> None:
    """A retry of its task is rejected with the commands that merge again; a resume changes nothing."""
    write_config(repository, [CHAIN[0]])
    repository.commit({".gitignore": "council.yaml\n"})
    assert repository.council("run").code == 0
    name = repository.council("status", "--json").result["run"]
    before = repository.commit({"a.txt": "mine"})
    spawned = repository.spawns.read_text()
    merge = repository.council("merge", "--json").result["run"]
    for more in ([], ["--reload"]):
        refused = repository.council("retry", "merge", "--run", merge, *more)
        assert (refused.code, f"`council merge {name}`" in refused.stderr) == (2, True), refused
        assert f"git switch council/{name}" in refused.stderr, refused
    assert repository.council("resume", merge, "--json").states == {"merge": "conflict"}
    assert repository.spawns.read_text() == spawned
    assert repository.git("rev-parse", "main") == before


@pytest.mark.extended
async def test_merge_run_with_a_pending_task_starts_no_session(repository: Repository) -> None:
    """Even if another process, such as a checkpoint restore, has made its task pending."""
    write_config(repository, [CHAIN[0]])
    repository.commit({".gitignore": "council.yaml\n"})
    assert repository.council("run").code == 0
    repository.commit({"a.txt": "mine"})
    spawned = repository.spawns.read_text()
    merge = repository.council("merge", "--json").result["run"]
    key = task_key(merge, "merge")
    async with open_file_store(Project(repository.top).store(), SystemClock()) as store:
        found = await store.get(key)
        assert found is not None
        await store.commit(Commit([Write(key, found.version, {**found.value, "status": "pending"})], []))
    resumed = repository.council("resume", merge, "--json")
    assert (resumed.code, resumed.states) == (1, {"merge": "failed"}), resumed
    assert repository.spawns.read_text() == spawned


def printed_next(repository: Repository) -> list[str]:
    """Return the next commands that `status` and `runs` print."""
    shown = "".join(repository.council(command).stdout for command in ("status", "runs"))
    return [line.strip() for line in shown.splitlines() if "next:" in line.lower()]


@pytest.mark.extended
@pytest.mark.parametrize("how", ["merged", "deleted", "squashed", "lost"])
async def test_branch_merged_or_deleted_by_the_user_is_not_awaited(repository: Repository, how: str) -> None:
    """`status` and `runs` print no next command any more, and `council merge` has nothing to merge."""
    write_config(repository, [CHAIN[0]])
    repository.commit({".gitignore": "council.yaml\n"})
    assert repository.council("run").code == 0
    name = repository.council("status", "--json").result["run"]
    assert printed_next(repository) == [f"Next: council merge {name}", f"next: council merge {name}"]
    branch = f"council/{name}"
    tip = repository.git("rev-parse", branch)
    if how == "squashed":
        repository.git("merge", "--quiet", "--squash", branch)
        repository.git("commit", "--quiet", "--message", "squashed")
    elif how != "lost":
        repository.git("merge", "--quiet", "--no-ff", "--no-edit", branch)
    if how != "merged":
        repository.git("branch", "--quiet", "-D", branch)
    assert printed_next(repository) == []
    assert repository.council("status", "--json").result["awaits_merge"] is False
    merged = repository.council("merge")
    if how == "lost":
        assert (merged.code, f"`git branch {branch} {tip}`" in merged.stderr) == (2, True), merged
    else:
        assert (merged.code, "'main' already contains" in merged.stdout) == (0, True), merged
    assert len(repository.council("runs", "--json").result["runs"]) == 1


@pytest.mark.extended
@pytest.mark.parametrize("has_more", [False, True], ids=["all", "more"])
async def test_merge_blocked_by_a_dirty_checkout_names_the_obstacle(repository: Repository, has_more: bool) -> None:
    """It was not interrupted: the exit code is 1, and the next command works once the checkout is clean."""
    later = [{"id": "later", "prompt": "write later.txt x", "needs": ["built"]}] if has_more else []
    config = str(repository.configure([{"id": "built", "prompt": "write README.md changed"}, *later]))
    (repository.top / "README.md").write_text("my own change")
    ended = repository.council("run", config, "--allow-deferred")
    name = repository.council("status", "--json").result["run"]
    for command in ("merge", "resume", "merge"):
        blocked = repository.council(command)
        assert blocked.code == 1, blocked
        assert "interrupted" not in blocked.stdout + blocked.stderr, blocked
        assert "README.md): commit or stash them" in " ".join(blocked.stdout.split()), blocked
    step = "resume" if has_more else "merge"
    last = repository.council("status").stdout.splitlines()[-1]
    assert last == f"Next: council {step} {name}", ended
    repository.git("checkout", "--quiet", "README.md")
    merged = repository.council("merge", "--json")
    assert merged.states["built"] == "landed", merged
    assert (merged.code, merged.result["status"]) == ((1, "incomplete") if has_more else (0, "landed"))
    if has_more:
        assert repository.council("status").stdout.splitlines()[-1] == f"Next: council resume {name}"


@pytest.mark.parametrize("option", ["--base", "--target"])
def test_invalid_branch_is_a_mistake_of_the_option(repository: Repository, option: str) -> None:
    write_config(repository, CHAIN)
    wrong = repository.council("run", "echo x", option, "nope..x")
    assert (wrong.code, f"'{option}': 'nope..x' can't be a branch" in wrong.stderr) == (2, True), wrong
    assert "council.yaml" not in wrong.stderr


def test_run_warns_of_files_that_sessions_cannot_see(repository: Repository) -> None:
    """Before the session that lacks the file fails, and not again once the file is committed."""
    script = repository.top / "agent.sh"
    script.write_text("echo x > x.txt\n")
    adapters = {"own": {"use": "command", "argv": ["sh", "agent.sh"]}}
    config = str(repository.configure([{"id": "a", "prompt": "x", "adapter": "own", "attempts": 1}], adapters=adapters))
    lacking = repository.council("run", config)
    assert lacking.code == 1, lacking
    assert "agent.sh: in your checkout, but not in main, where sessions start" in " ".join(lacking.stderr.split())
    repository.commit({"agent.sh": script.read_text()})
    ended = repository.council("run", config)
    assert (ended.code, ended.stderr) == (0, ""), ended


@pytest.mark.extended
def test_run_from_elsewhere_names_the_folder_of_its_commands(repository: Repository, tmp_path: Path) -> None:
    """The printed commands find the run in that folder; within the repository nothing more is printed."""
    write_config(repository, [CHAIN[0]])
    repository.commit({".gitignore": "council.yaml\n"})
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    command = ["council", "run", str(repository.top / "council.yaml")]
    ran = subprocess.run(command, check=False, cwd=folder, env=repository.environ, capture_output=True, text=True)
    last = ran.stdout.splitlines()[-1]
    assert last == f"Run commands about this run in its folder: cd {repository.top.resolve()}", ran
    status = repository.council("status").stdout
    assert "Next: council merge" in status
    assert "in its folder" not in status
