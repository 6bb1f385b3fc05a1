"""A YAML file runs on a real repository: each task lands once, and everything else stays unchanged."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandResult, Repository
from tests.fingerprint import Fingerprint
from tests.waiting import wait_for


async def test_chain_and_independent_tasks_land_once_each(repository: Repository) -> None:
    """On the checked-out target, each based on the landings that it needs."""
    config = repository.configure(
        [
            {"id": "models", "prompt": "write src/models.py class User: pass"},
            {"id": "docs", "prompt": "append README.md More words."},
            {"id": "api", "prompt": "append src/models.py # used by the api", "needs": ["models"]},
        ]
    )
    ended = repository.council("run", str(config), "--json")
    assert ended.code == 0, ended
    assert ended.states == {"models": "landed", "docs": "landed", "api": "landed"}
    assert (repository.top / "src/models.py").read_text() == "class User: pass\n# used by the api\n"
    assert (repository.top / "README.md").read_text() == "# Project\nMore words.\n"
    await repository.assert_invariants()


async def test_every_final_status_is_reached_in_one_run(repository: Repository) -> None:
    """Success after a failure, no change, a limit, a crash and a blocked task, with work preserved."""
    config = repository.configure(
        [
            {"id": "second-try", "prompt": "attempt 1 exit 3\nwrite a.txt a"},
            {"id": "idle", "prompt": "print nothing to do"},
            {"id": "slow", "prompt": "write half.txt half\nhang", "timeout": "3s", "attempts": 2},
            {"id": "broken", "prompt": "write b.txt b\nexit 7", "attempts": 2},
            {"id": "dependent", "prompt": "write c.txt c", "needs": ["broken"]},
        ]
    )
    ended = repository.council("run", str(config), "--json")
    tasks = {task["id"]: task for task in ended.result["tasks"]}
    assert (ended.code, ended.result["exit"], ended.result["status"]) == (1, 1, "incomplete")
    assert ended.states == {
        "second-try": "landed", "idle": "no_change", "slow": "failed", "broken": "failed", "dependent": "blocked",
    }  # fmt: skip
    assert {name: task["attempts"] for name, task in tasks.items()} == {
        "second-try": 2, "idle": 1, "slow": 2, "broken": 2, "dependent": 0,
    }  # fmt: skip
    assert "limit" in tasks["slow"]["reason"]
    assert "exit code 7" in tasks["broken"]["reason"]
    assert "broken" in tasks["dependent"]["reason"]
    trusted = repository.council("where", "--json").result["trusted"]
    for name, file in (("slow", "half.txt"), ("broken", "b.txt")):
        subprocess.run(["git", "cat-file", "-e", f"{tasks[name]['branch']}:{file}"], cwd=trusted, check=True)
    await repository.assert_invariants()


@pytest.mark.extended
async def test_retry_waits_for_the_cleanup_of_its_predecessor(repository: Repository, tmp_path: Path) -> None:
    """However slow the removal of a worktree, a task never has two sessions, and capacity is respected."""
    slow = tmp_path / "bin" / "rm"
    slow.parent.mkdir()
    slow.write_text('#!/bin/sh\nsleep 0.3\nexec /bin/rm "$@"\n')
    slow.chmod(0o755)
    repository.environ["PATH"] = f"{slow.parent}:{repository.environ['PATH']}"
    steps = "attempt 1 exit 1\nattempt 2 exit 1\nwrite {0}.txt {0}"
    config = repository.configure([{"id": name, "prompt": steps.format(name)} for name in ("a", "b", "c", "d")])
    ended = repository.council("run", str(config), "--json")
    assert ended.code == 0, ended
    assert [task["attempts"] for task in ended.result["tasks"]] == [3, 3, 3, 3]
    await repository.assert_invariants()


async def test_default_target_is_the_runs_own_branch(repository: Repository) -> None:
    """`council/<run>`; the checkout stays unchanged."""
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}], target=None)
    text = json.loads(config.read_text())
    del text["target"]
    config.write_text(json.dumps(text))
    ended = repository.council("run", str(config), "--json")
    assert ended.code == 0, ended
    assert ended.result["target"] == f"council/{ended.result['run']}"
    assert repository.git("show", f"{ended.result['target']}:one.txt") == "1"
    assert not (repository.top / "one.txt").exists()
    await repository.assert_invariants(target_checked_out=False)


async def test_bare_repository_by_url_is_fetched_and_pushed(repository: Repository, tmp_path: Path) -> None:
    """A URL needs no checkout: the state is next to the file, and the work lands at the remote."""
    remote = tmp_path / "remote.git"
    repository.git("clone", "--quiet", "--bare", str(repository.top), str(remote))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    config = repository.configure(
        [{"id": "one", "prompt": "write one.txt 1"}, {"id": "two", "prompt": "append one.txt 2", "needs": ["one"]}],
        repo=f"file://{remote}",
    ).rename(folder / "council.yaml")
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"one": "landed", "two": "landed"}, ended
    shown = subprocess.run(["git", "show", "main:one.txt"], cwd=remote, capture_output=True, check=True)
    assert shown.stdout == b"1\n2\n"
    assert (folder / ".council/state").is_dir()
    assert Fingerprint.of(repository.top) == repository.before[0]


async def test_moving_target_is_merged(repository: Repository) -> None:
    """User commits to the target during the run are kept, and the work lands on top."""
    config = repository.configure([{"id": "one", "prompt": "git --version\nattempt 1 exit 1\nwrite one.txt 1"}],
                                  defaults={"backoff": {"initial": "1s", "max": "1s", "jitter": False}})  # fmt: skip
    child = repository.start("run", str(config), "--json")
    wait_for(repository.spawns.exists)
    moved = repository.commit({"mine.txt": "mine\n"}, "while it runs")
    stdout, stderr = child.communicate(timeout=60)
    assert CommandResult(child.returncode, stdout, stderr).states == {"one": "landed"}
    assert repository.git("merge-base", "--is-ancestor", moved, "main") == ""
    assert (repository.top / "mine.txt").read_text() == "mine\n"
    repository.before.clear()
    await repository.assert_invariants()


@pytest.mark.extended
async def test_two_concurrent_runs_do_not_interfere(repository: Repository, tmp_path: Path) -> None:
    """Two commands on one repository and one target land all tasks of both."""
    tasks = [{"id": f"t{index}", "prompt": f"write {{}}/{index}.txt {index}"} for index in range(5)]
    children = []
    for name in ("left", "right"):
        config = repository.configure([{**task, "prompt": task["prompt"].format(name)} for task in tasks])
        children.append(repository.start("run", str(config.rename(tmp_path / f"{name}.yaml")), "--json"))
    ends = [CommandResult(child.wait(), *child.communicate(timeout=90)) for child in children]
    assert [ended.code for ended in ends] == [0, 0], ends
    assert ends[0].result["run"] != ends[1].result["run"]
    for name in ("left", "right"):
        assert len(list((repository.top / name).iterdir())) == 5
    assert repository.git("rev-list", "--count", "--first-parent", "main") == "11"
    await repository.assert_invariants()


async def test_live_run_is_shown_and_not_taken(repository: Repository) -> None:
    """`status` in another terminal shows it, `resume` rejects it, a signal ends it."""
    config = repository.configure([{"id": "long", "prompt": "hang"}])
    child = repository.start("run", str(config), "--json")
    wait_for(repository.spawns.exists)
    seen = repository.council("status", "--json")
    assert (seen.code, seen.result["status"], seen.states) == (1, "running", {"long": "running"})
    refused = repository.council("resume", "--json")
    assert refused.code == 2
    assert str(child.pid) in refused.result["error"]
    child.terminate()
    child.communicate(timeout=30)
    assert child.returncode == 130
    assert repository.council("status", "--json").result["status"] == "interrupted"
    await repository.assert_invariants()


async def test_session_sees_only_what_is_allowed(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret of the user reaches neither the program nor any log or document, unless it is named."""
    repository.environ.update({"SECRET_CANARY": "canary-1f9e", "NAMED": "named-value"})
    shell = {"use": "command", "argv": ["sh", "{prompt_file}"], "env": ["NAMED"]}
    config = repository.configure([{"id": "look", "prompt": "env | sort > seen.txt"}], adapters={"sh": shell})
    ended = repository.council("run", str(config), "--json")
    assert ended.code == 0, ended
    seen = dict(line.split("=", 1) for line in (repository.top / "seen.txt").read_text().splitlines())
    run = ended.result["run"]
    assert seen["NAMED"] == "named-value"
    assert (seen["COUNCIL_RUN"], seen["COUNCIL_TASK"], seen["COUNCIL_ATTEMPT"]) == (run, "look", "1")
    assert Path(seen["COUNCIL_PROMPT_FILE"]).name == "prompt.md"
    allowed = {"PATH", "LC_ALL", "PWD", "OLDPWD", "SHLVL", "_", "NAMED", "GIT_CEILING_DIRECTORIES", "TMPDIR"}
    assert {name for name in seen if not name.startswith("COUNCIL_")} <= allowed
    grep = subprocess.run(["grep", "-r", "canary-1f9e", str(repository.top.parent)], capture_output=True, check=False)
    assert grep.stdout == b""


async def test_each_missing_program_has_its_own_remedy(repository: Repository) -> None:
    """Each installation hint follows its program."""
    adapters = {"a": {"use": "claude-code", "bin": "no-claude"}, "b": {"use": "command", "argv": ["no-such-program"]}}
    tasks = [{"id": name, "prompt": "x", "adapter": name} for name in adapters]
    reported = repository.council("run", str(repository.configure(tasks, adapters=adapters)), "--json").result["error"]
    first, second = reported.split("; ")
    assert re.fullmatch(r"adapter 'a' runs 'no-claude', which is not on PATH \(install it .*npm.*\)", first), reported
    assert second == "adapter 'b' runs 'no-such-program', which is not on PATH (install it, or correct the adapter)"


def test_program_that_is_not_executable_is_not_called_missing(repository: Repository, tmp_path: Path) -> None:
    program = tmp_path / "plain"
    program.write_text("#!/bin/sh\n")
    repository.environ["PATH"] += f"{os.pathsep}{tmp_path}"
    adapters = {"a": {"use": "command", "argv": ["plain"]}}
    config = repository.configure([{"id": "one", "prompt": "x", "adapter": "a"}], adapters=adapters)
    ended = repository.council("run", str(config), "--json")
    assert ended.result["error"] == f"adapter 'a' runs 'plain', which is not executable ({program})", ended
    assert ended.result["remedy"].startswith(f"`chmod +x {program}`")


@pytest.mark.extended
async def test_prompt_on_stdin_is_passed(repository: Repository) -> None:
    prompt = "-x\n`id` $HOME \u2603\n"
    cat = {"use": "command", "argv": ["sh", "-c", "cat > got.txt"], "prompt": "stdin"}
    config = repository.configure([{"id": "cat", "prompt": prompt}], adapters={"cat": cat})
    ended = repository.council("run", str(config), "--json")
    assert ended.code == 0, ended
    assert (repository.top / "got.txt").read_text() == prompt
    await repository.assert_invariants()


@pytest.mark.extended
async def test_output_is_kept_in_files(repository: Repository) -> None:
    """The log of the attempt has the output of the program."""
    config = repository.configure([{"id": "one", "prompt": "print hello there\nwrite one.txt 1"}])
    run = repository.council("run", str(config), "--json").result["run"]
    assert (repository.top / f".council/logs/{run}/one.1.stdout").read_text() == "hello there\n"


def _unborn(repository: Repository) -> None:
    repository.git("checkout", "--quiet", "--orphan", "empty")
    repository.git("branch", "--delete", "--force", "main")


def _unrelated(repository: Repository) -> None:
    repository.git("checkout", "--quiet", "--orphan", "other")
    repository.git("commit", "--quiet", "--message", "no history in common")
    repository.git("checkout", "--quiet", "main")


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("prepare", "settings", "fragment"),
    [
        (_unborn, {}, "no commits yet"),
        (lambda repository: None, {"base": "develop", "target": "main"}, "no base branch 'develop'"),
        (_unrelated, {"target": "other"}, "no common history"),
        (lambda repository: None, {"target": "main/sub"}, "conflicts with the name of the branch 'main'"),
        (lambda repository: None, {"repo": "/"}, "not a git repository"),
        (lambda repository: None, {"repo": "file:///nonexistent.git"}, "can't be read"),
        (lambda repository: None, {"adapters": {"x": {"use": "command", "argv": ["no-such-program"]}}}, "not on PATH"),
    ],
    ids=["unborn", "no base", "unrelated", "name taken", "no repository", "no remote", "no program"],
)
async def test_impossible_run_is_rejected_before_anything_starts(
    repository: Repository, prepare: object, settings: dict[str, object], fragment: str
) -> None:
    """Exit code 2 with the reason and the remedy; no program has run."""
    assert callable(prepare)
    prepare(repository)
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}], **settings)
    ended = repository.council("run", str(config), "--json")
    assert (ended.code, ended.result["exit"], ended.result["status"]) == (2, 2, "refused"), ended
    assert fragment in ended.result["error"]
    assert ended.result["remedy"]
    assert not repository.spawns.exists()


async def test_invalid_file_is_rejected_with_every_mistake(repository: Repository) -> None:
    """Text and JSON name each mistake with its position; the exit code is 2."""
    config = repository.top / "bad.yaml"
    config.write_text("version: 1\nrepositry: .\ntasks:\n  - id: a\n    needs: [b]\n    prompt: x\n")
    text = repository.council("run", str(config))
    assert text.code == 2
    assert f"{config}:2:1: " in text.stderr
    assert f"{config}:5:13: " in text.stderr
    as_json = repository.council("run", str(config), "--json")
    assert (as_json.code, as_json.result["status"]) == (2, "invalid")
    assert {(problem["line"], problem["column"]) for problem in as_json.result["errors"]} >= {(2, 1), (5, 13)}


@pytest.mark.extended
async def test_closed_output_does_not_end_the_run(repository: Repository) -> None:
    """`council run … | head -1` lands everything, with the exit code of success."""
    config = repository.configure([{"id": name, "prompt": f"write {name}.txt x"} for name in ("a", "b", "c")])
    child = repository.start("run", str(config), "--json")
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.wait(timeout=60) == 0
    assert child.stderr is not None
    assert child.stderr.read() == ""
    child.stderr.close()
    await repository.assert_invariants()


async def test_run_without_its_repositories_is_rejected(repository: Repository) -> None:
    """After our own repositories were deleted."""
    config = repository.configure([{"id": "long", "prompt": "hang"}])
    child = repository.start("run", str(config))
    wait_for(repository.spawns.exists)
    child.terminate()
    child.communicate(timeout=30)
    Path(repository.environ["COUNCIL_HOME"]).rename(repository.top.parent / "moved")
    ended = repository.council("resume", "--json")
    assert (ended.code, ended.result["status"]) == (2, "refused")


async def test_resume_without_a_run_is_rejected(repository: Repository) -> None:
    """Commands outside of any project, and unknown names, are rejected with the remedy."""
    assert repository.council("status", "--json").code == 2
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    assert repository.council("run", str(config)).code == 0
    unknown = repository.council("resume", "nonsense", "--json")
    assert (unknown.code, unknown.result["status"]) == (2, "refused")


async def test_names_with_spaces_and_unicode_work(tmp_path: Path, environ: dict[str, str]) -> None:
    """Of the repository, its files and its prompts."""
    top = tmp_path / "mein Projekt \u00fc 'x' $y"
    top.mkdir()
    repository = Repository(top, environ, tmp_path / "ledger" / "spawns")
    repository.spawns.parent.mkdir()  # not in a hidden folder: Landlock makes no exceptions there
    repository.git("init", "--quiet", "--initial-branch=main")
    repository.commit({"a b\u00e9.txt": "x\n"}, "first")
    repository.remember()
    config = repository.configure([{"id": "one", "prompt": "write 'n\u00e9w d/\u2603 f.txt' hi"}])
    ended = repository.council("run", str(config), "--json")
    assert ended.code == 0, ended
    assert (top / "n\u00e9w d/\u2603 f.txt").exists()
    await repository.assert_invariants()


@pytest.mark.extended
async def test_landing_rewritten_by_the_user_is_not_landed(repository: Repository) -> None:
    """A landed commit that the user removes from the target during the run is reported, and its work kept."""
    tasks: list[dict[str, Any]] = [
        {"id": "lost", "prompt": "write lost.txt l"},
        {"id": "slow", "prompt": "hang", "timeout": "8s", "attempts": 1},
    ]
    config = repository.configure(tasks, target="out")
    child = repository.start("run", str(config), "--json")

    def has_landed() -> bool:
        # Recorded, not only pushed: a rewrite before the record would just cause another landing.
        shown = repository.council("status", "--json").result
        return bool(shown.get("tasks")) and shown["tasks"][0]["status"] == "landed"

    wait_for(has_landed)
    repository.git("branch", "--force", "out", "main")
    stdout, stderr = child.communicate(timeout=60)
    ended = CommandResult(child.returncode, stdout, stderr)
    lost = ended.result["tasks"][0]
    assert (ended.code, lost["status"], lost["landed"]) == (1, "failed", None)
    assert "rewritten" in lost["reason"]
    trusted = ended.result["repository"]
    shown = subprocess.run(["git", "show", f"{lost['branch']}:lost.txt"], cwd=trusted, capture_output=True, check=True)
    assert shown.stdout == b"l\n"


async def test_signal_before_the_run_starts_exits_with_130(repository: Repository) -> None:
    config = repository.configure([{"id": "one", "prompt": "hang"}])
    child = repository.start("run", str(config), "--json")
    wait_for((repository.top / ".council").exists)
    child.terminate()
    stdout, _ = child.communicate(timeout=30)
    assert child.returncode == 130
    assert json.loads(stdout.splitlines()[-1])["exit"] == 130
