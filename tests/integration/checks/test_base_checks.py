"""Checks run on the base before any session: a check that fails there would fail every task."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandResult, Repository
from tests.sandboxes import needs_sandbox
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest

#: Passes if `code` is good.
GOOD = "grep -qx good code"
#: A failed check ends the task.
FAIL = {"on_checks_failed": "fail"}


def configure(repository: Repository, *prompts: str, checks: list[str], **settings: Any) -> Path:
    """Configure tasks whose checks must pass on the base."""
    tasks = [{"id": f"t{number}", "prompt": prompt} for number, prompt in enumerate(prompts, 1)]
    backoff = {"initial": "10ms", "max": "10ms", "jitter": False}
    defaults = {"checks": checks, "backoff": backoff, "timeout": "60s", **settings.pop("defaults", {})}
    return repository.configure(tasks, defaults=defaults, **settings)


def commit_script(repository: Repository, path: str, text: str) -> None:
    """Commit an executable file."""
    repository.commit({path: text}, "script")
    repository.git("update-index", "--chmod=+x", path)
    repository.git("commit", "--quiet", "--message", "executable")
    repository.git("reset", "--quiet", "--hard")


def types(ended: CommandResult) -> list[str]:
    """Return the types of the events that a command printed."""
    return [line["event"] for line in ended.lines if "event" in line]


def sessions(repository: Repository) -> int:
    """Return how many sessions of the fake CLI were started."""
    return len(repository.spawns.read_text().splitlines()) if repository.spawns.exists() else 0


async def test_check_failing_on_the_base_ends_the_run_before_any_session(repository: Repository) -> None:
    """One message names the check, its exit code, its last output and the fix; nothing is lost."""
    repository.commit({"code": "bad\n"}, "broken")
    repository.remember()
    check = f"echo looking at it; {GOOD} || {{ echo the code is bad; exit 3; }}"
    config = configure(repository, "write a.txt a", "write b.txt b", checks=[check])
    ended = repository.council("run", str(config))
    assert ended.code == 1, ended
    message = " ".join(ended.stdout.partition("Halted: ")[2].split())
    for part in (GOOD, "fails on main", "exit code 3", "--allow-failing-base: `council resume"):
        assert part in message, message
    assert sessions(repository) == 0
    for command in ("logs", "diff"):
        refused = repository.council(command, "t2").stderr
        assert "has not started yet: the run is halted: check `echo looking at it" in refused
        assert "t1.0.check1" in refused
    shown = repository.council("status").stdout
    assert (".check1" in shown, shown.count("`council resume"), "next:" in shown) == (True, 1, False), shown
    retried = repository.council("retry", "t1")
    assert (retried.code, "(state: pending)" in retried.stderr) == (2, True)
    status = repository.council("status", "--json")
    run = status.result["run"]
    assert f"no process is active in the run: continue it with `council resume {run}`" in retried.stderr, retried
    assert f"`council retry t1 --reload --run {run}`" in retried.stderr, retried
    assert status.states == {"t1": "pending", "t2": "pending"}
    assert (status.result["status"], status.result["halt_cause"]) == ("halted", "base")
    assert "looking at it\nthe code is bad\n" in status.result["halted"]
    assert [task["attempts"] for task in status.result["tasks"]] == [0, 0]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_resume_checks_again_and_continues_on_a_fixed_base(repository: Repository) -> None:
    """The user fixes the base between run and resume."""
    repository.commit({"code": "bad\n"}, "broken")
    config = configure(repository, "write a.txt a", checks=[GOOD])
    assert repository.council("run", str(config)).code == 1
    again = repository.council("resume", "--json")
    assert (again.code, again.result["status"]) == (1, "halted"), again
    repository.commit({"code": "good\n"}, "fixed")
    repository.remember()
    ended = repository.council("resume", "--json")
    assert ended.states == {"t1": "landed"}, ended
    assert types(ended).index("base.passed") < types(ended).index("task.started")
    assert sessions(repository) == 1
    await repository.assert_invariants()


@pytest.mark.extended_variants
@pytest.mark.parametrize("how", ["run", "resume", "file"])
async def test_task_that_fixes_the_failing_base_can_run(repository: Repository, how: str) -> None:
    """By the option of either command, and by the key of the file."""
    repository.commit({"code": "bad\n"}, "broken")
    repository.remember()
    defaults = {"allow_failing_base": True} if how == "file" else {}
    config = configure(repository, "write code good", checks=[GOOD], defaults=defaults)
    options = ["--allow-failing-base"] if how == "run" else []
    ended = repository.council("run", str(config), *options, "--json")
    if how == "resume":
        assert ended.result["status"] == "halted"
        ended = repository.council("resume", "--allow-failing-base", "--json")
    assert ended.states == {"t1": "landed"}, ended
    assert "base.checking" not in types(ended)
    await repository.assert_invariants()


@pytest.mark.extended
async def test_base_is_checked_once_for_tasks_with_the_same_checks(repository: Repository) -> None:
    """Tasks with other checks have theirs run; a task without checks needs none."""
    repository.commit({"code": "good\n"}, "code")
    repository.remember()
    tasks: list[dict[str, Any]] = [
        {"id": "a", "prompt": "write a.txt a"},
        {"id": "b", "prompt": "write b.txt b"},
        {"id": "c", "prompt": "write c.txt c", "checks": ["test -e code"]},
        {"id": "d", "prompt": "write d.txt d", "checks": []},
    ]
    ended = repository.council("run", str(repository.configure(tasks, defaults={"checks": [GOOD]})), "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    checked = [line["checks"] for line in ended.lines if line.get("event") == "base.checking"]
    assert checked == [[GOOD], ["test -e code"]]
    assert types(ended).count("base.passed") == 2
    await repository.assert_invariants()


@pytest.mark.extended
async def test_killed_run_does_not_repeat_passed_base_checks(repository: Repository) -> None:
    """Neither for the base that passed, nor for a landing that passed the same checks."""
    repository.commit({"code": "good\n"}, "code")
    trace = repository.spawns.parent / "checked"
    check = f"{GOOD} && echo x >> {trace}"
    config = configure(
        repository, "write a.txt a", "write b.txt b", checks=[check], capacity=1, writable=[str(trace.parent)]
    )
    repository.remember()
    killed = repository.council("run", str(config), failpoints="landing.recorded=kill")
    assert killed.code == -signal.SIGKILL, killed
    assert len(trace.read_text().splitlines()) == 2  # the base, the merge
    ended = repository.council("resume", "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    assert "base.checking" not in types(ended)
    assert len(trace.read_text().splitlines()) == 3
    await repository.assert_invariants()


@pytest.mark.extended
async def test_signal_ends_the_base_checks(repository: Repository) -> None:
    """No session has started, and a resume starts from scratch."""
    flag = repository.spawns.parent / "flag"
    check = f"test -e {flag} || {{ touch {flag}; sleep 600; }}"
    config = configure(repository, "write a.txt a", checks=[check], writable=[str(flag.parent)])
    child = repository.start("run", str(config), "--json")
    wait_for(flag.exists)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=30)
    assert child.returncode == 130
    assert sessions(repository) == 0
    await repository.assert_invariants()
    assert repository.council("resume", "--json").states == {"t1": "landed"}
    await repository.assert_invariants()


@pytest.mark.extended
async def test_corrected_check_is_reported_and_adopted_by_the_named_commands(repository: Repository) -> None:
    """A resume that halts again reports the changed file; the printed commands end the halt."""
    repository.remember()
    config = configure(repository, "write a.txt a", "write b.txt b", checks=["false"])
    halted = repository.council("run", str(config), "--json")
    assert "run.file_changed" not in types(halted)
    configure(repository, "write a.txt a", "write b.txt b", checks=["true"])
    again = repository.council("resume", "--json")
    assert types(again).index("run.file_changed") < types(again).index("base.checking")
    reload, resume = f"retry t1 t2 --reload --run {again.result['run']}", f"resume {again.result['run']}"
    assert {f"`council {command}`" in again.result["halted"] for command in (reload, resume)} == {True}
    assert repository.council(*reload.split()).code == 0
    ended = repository.council(*resume.split(), "--json")
    assert set(ended.states.values()) == {"landed"}, ended
    await repository.assert_invariants()


def own_branch(repository: Repository, tasks: list[dict[str, Any]], **settings: Any) -> Path:
    """Configure tasks that land on the run's own branch."""
    file = repository.configure(tasks, **settings)
    written = json.loads(file.read_text())
    del written["target"]
    file.write_text(json.dumps(written))
    return file


@pytest.mark.extended
async def test_fixed_base_reaches_tasks_that_start_from_it(repository: Repository) -> None:
    """The run has landed on its own branch, which gets the fix only when the task lands."""
    one, two = {"id": "one", "prompt": "write a.txt a"}, {"id": "two", "prompt": "exit 1 no", "attempts": 1}
    run = repository.council("run", str(own_branch(repository, [one, two])), "--json")
    assert run.states == {"one": "landed", "two": "failed"}
    own_branch(repository, [one, {**two, "prompt": "write b.txt b", "checks": ["test -f z"]}])
    assert repository.council("retry", "two", "--reload").code == 0
    halted = repository.council("resume", "--json").result["halted"]
    assert f"fails on {run.result['target']} (" in halted
    assert "\nfix main or" in halted
    assert "before any session" not in halted
    repository.commit({"z": ""}, "fix")
    repository.remember()
    ended = repository.council("resume", "--json")
    assert ended.states == {"one": "landed", "two": "landed"}, ended
    assert sessions(repository) == 3
    await repository.assert_invariants(target_checked_out=False)


@pytest.mark.extended
@pytest.mark.parametrize("has_landed", [True, False])
async def test_named_command_merges_the_fix_into_the_runs_own_branch(repository: Repository, has_landed: bool) -> None:
    """A task that starts from the target gets a fix of the base only from the target."""
    two: dict[str, Any] = {"id": "two", "prompt": "write b.txt b", "owns": ["b.txt"], "checks": ["test -f z"]}
    if has_landed:
        one = {"id": "one", "prompt": "write a.txt a"}
        failing = {"id": "two", "prompt": "exit 1 no", "owns": ["b.txt"], "attempts": 1}
        repository.council("run", str(own_branch(repository, [one, failing])))
        own_branch(repository, [one, {**two, "attempts": 1}])
        assert repository.council("retry", "two", "--reload").code == 0
        halted = repository.council("resume", "--json").result["halted"]
    else:
        halted = repository.council("run", str(own_branch(repository, [two])), "--json").result["halted"]
    repository.commit({"z": ""}, "fix")
    assert repository.council("resume", "--json").result["status"] == "halted"
    [command] = re.findall(r"fix main and merge that into council/\S+ \(`(.*)`\)", halted)
    identity = {f"GIT_{who}_{what}": "user" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environ = {**repository.environ, **identity}
    subprocess.run(["sh", "-c", command], cwd=repository.top, env=environ, check=True, capture_output=True)
    repository.remember()
    ended = repository.council("resume", "--json")
    assert ended.states["two"] == "landed", ended
    await repository.assert_invariants(target_checked_out=False)


@pytest.mark.extended
async def test_dependents_get_the_base_of_their_need(repository: Repository) -> None:
    """A task that starts from the target after one that starts from the base is not blocked by the old target."""
    tasks: list[dict[str, Any]] = [
        {"id": "one", "prompt": "write a.txt a"},
        {"id": "two", "prompt": "write b.txt b", "needs": ["one"], "checks": ["test -f z"]},
    ]
    assert repository.council("run", str(own_branch(repository, tasks)), "--json").result["status"] == "halted"
    repository.commit({"z": ""}, "fix")
    repository.remember()
    assert repository.council("resume", "--json").states == {"one": "landed", "two": "landed"}
    await repository.assert_invariants(target_checked_out=False)


async def test_remedy_for_tasks_outside_of_a_file_is_a_new_run(repository: Repository) -> None:
    """`retry --reload` rejects these tasks before it asks to trust the file."""
    file = configure(repository, "write a.txt a", checks=["false"])
    (repository.top / "council.yaml").write_text(file.read_text())
    halted = repository.council("run", "write a.txt a", "--json").result["halted"]
    assert "or correct the check and start a new run" in halted
    assert "--reload" not in halted
    del repository.environ["COUNCIL_TRUST"]
    refused = repository.council("retry", "task-1", "--reload")
    assert refused.code == 2
    assert "not from a file: start a new run to change them" in " ".join(refused.stderr.split())


def test_check_that_exits_with_127_by_itself_is_an_ordinary_failure(repository: Repository) -> None:
    """The shell was found, and nothing names a missing program."""
    config = repository.configure([{"id": "one", "prompt": "write a.txt a", "checks": ["sh -c 'exit 127'"]}])
    ended = repository.council("run", str(config))
    assert ended.code == 1, ended
    assert "ended with exit code 127" in ended.stdout
    assert "not found" not in ended.stdout
    assert "--allow-failing-base" in ended.stdout


async def test_halt_report_has_the_end_of_the_output_and_the_log(repository: Repository) -> None:
    """At most ten lines of 80 columns for four tasks; the event's line is one short sentence."""
    check = "python3 -c 'import json; print(1); json.loads(\"x\")'"
    tasks = [{"id": name, "prompt": "write a.txt a"} for name in ("one", "two", "bad", "three")]
    ended = repository.council("run", str(repository.configure(tasks, defaults={"checks": [check]})))
    [event] = [line for line in ended.stdout.splitlines() if " halted: " in line]
    assert re.fullmatch(r"\S+ halted: check `.*` fails on main \(\w{10}\): ended with exit code 1", event)
    report = ended.stdout.splitlines()[ended.stdout.splitlines().index(event) + 1 :]
    assert len(report) <= 10, report
    [log] = [line for line in report if line.startswith("log: ")]
    assert Path(log.removeprefix("log: ")).exists()
    assert any(line.startswith("json.decoder.JSONDecodeError: ") for line in report)
    assert report[-1].startswith("`council retry one two bad three --reload --run ")
    assert all(len(line) <= 80 for line in report if "`" not in line and line != log), report


async def test_failed_setup_on_the_base_suggests_a_new_run(repository: Repository) -> None:
    """A run keeps its setup, so no command reloads a corrected one; --allow-failing-base does not help either."""
    repository.remember()
    config = configure(repository, "write a.txt a", checks=["true"], worktrees={"setup": ["exit 3"]})
    halted = repository.council("run", str(config), "--json").result["halted"]
    assert "setup `exit 3` fails" in halted
    assert "correct `worktrees.setup` in the configuration file, then start a new run" in halted
    assert "--reload" not in halted
    assert "--allow-failing-base" not in halted
    await repository.assert_invariants()


async def test_allowed_failing_base_is_checked_for_programs_only(repository: Repository) -> None:
    """A check whose programs all exist is not run; one that finds its program elsewhere passes."""
    commit_script(repository, "bin/own-tool", "#!/bin/sh\nexit 1\n")
    trace = repository.spawns.parent / "checked"
    checks = [f"echo x >> {trace}; test -e a.txt", "PATH=$PWD/bin:$PATH; own-tool || test -e a.txt"]
    config = configure(repository, "write a.txt a", checks=checks, writable=[str(trace.parent)])
    repository.remember()
    ended = repository.council("run", str(config), "--allow-failing-base", "--json")
    assert ended.states == {"t1": "landed"}, ended
    assert len(trace.read_text().splitlines()) == 1
    await repository.assert_invariants()


@pytest.mark.extended_variants
@pytest.mark.parametrize("options", [[], ["--allow-failing-base"]])
async def test_missing_program_of_a_check_is_not_a_failure_of_the_task(
    repository: Repository, options: list[str]
) -> None:
    """The message names the program and the searched folders; no session starts, even if the base may fail."""
    folder = repository.spawns.parent / "bin"
    folder.mkdir()
    config = configure(repository, "write a.txt a", checks=["no-such-tool --all"], writable=[str(folder)])
    ended = repository.council("run", str(config), *options, "--json")
    assert ended.code == 1, ended
    assert (ended.result["status"], ended.states["t1"]) == ("halted", "pending")
    first = repository.environ["PATH"].split(os.pathsep)[0]
    [event] = [line["reason"] for line in ended.lines if line.get("event") == "run.halted"]
    assert event.splitlines()[0].endswith("program 'no-such-tool' was not found on PATH")
    for part in ("no-such-tool", "exit code 127", "was not found on PATH", first, "council retry t1 --reload"):
        assert part in ended.result["halted"]
    assert sessions(repository) == 0
    assert not any(line.get("outcome") for line in ended.lines if line.get("event") == "task.retrying")
    await repository.assert_invariants()
    tool = folder / "no-such-tool"
    tool.write_text("#!/bin/sh\nexit 0\n")
    tool.chmod(0o755)
    repository.environ["PATH"] += f":{folder}"
    again = repository.council("resume", "--json")
    assert again.states == {"t1": "landed"}, again
    assert again.result["tasks"][0]["attempts"] == 1
    await repository.assert_invariants()


@pytest.mark.extended
def test_missing_programs_of_all_tasks_are_named(repository: Repository) -> None:
    """Those of other checks too, within ten lines of 80 columns; the printed reload names all of these tasks."""
    checks = {"a": ["no-such-a"], "b": ["true", "no-such-b --all"], "c": ["true"], "d": ["no-such-a", "no-such-d"]}
    tasks = [{"id": name, "prompt": f"write {name}.txt x", "checks": check} for name, check in checks.items()]
    ended = repository.council("run", str(repository.configure(tasks)))
    lines = ended.stdout.rpartition("\nrun ")[2].splitlines()
    halted = repository.council("status", "--json").result["halted"]
    assert halted.splitlines()[0] == "3 commands can't be run: `no-such-a`, `no-such-b --all`, `no-such-d`"
    for program in ("no-such-a", "no-such-b", "no-such-d"):
        assert f"install {program} where sessions see it" in halted
    assert "`council retry a b d --reload --run " in halted
    wide = [line for line in lines if len(line) > 80 and not line.startswith("log: ")]
    assert (len(lines) <= 10, wide) == (True, []), lines
    assert halted.splitlines()[0] in " ".join(lines), lines


def test_printed_command_with_many_long_names_fits_in_a_line(repository: Repository) -> None:
    """Its names are then left out."""
    tasks = [{"id": f"a-long-name-of-a-task-{number}", "prompt": f"write {number}.txt x"} for number in range(4)]
    ended = repository.council("run", str(repository.configure(tasks, defaults={"checks": ["false"]})))
    last = ended.stdout.splitlines()[-1]
    assert last.startswith("`council retry TASK... --reload --run "), ended
    assert len(last) <= 80


@needs_sandbox
def test_check_of_a_hidden_program_needs_a_new_run(repository: Repository) -> None:
    """A run keeps its `readable`: neither a resume nor a reload is named as a fix for the folder."""
    tool = repository.top / "tools/tool"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    repository.commit({".gitignore": "tools/\n"})
    config = configure(repository, "write a.txt a", checks=[f"{tool} --version"])
    ended = repository.council("run", str(config), "--json")
    headline, *_, remedy, correction = ended.result["halted"].splitlines()
    assert headline.endswith(f"(hidden from sessions: {tool.parent})")
    assert "PATH" not in ended.result["halted"]
    assert remedy == f"start a new run with {tool.parent} in `readable`"
    assert correction.endswith(f"`council retry t1 --reload --run {ended.result['run']}`")


@pytest.mark.extended_variants
@pytest.mark.parametrize("options", [[], ["--allow-failing-base"]])
async def test_unexecutable_check_is_not_a_failure_of_the_task(repository: Repository, options: list[str]) -> None:
    """A committed script without the executable bit: the message says so, even if the base may fail."""
    repository.commit({"check.sh": "#!/bin/sh\n"}, "script")
    repository.remember()
    ended = repository.council(
        "run", str(configure(repository, "write a.txt a", checks=["./check.sh"])), *options, "--json"
    )
    assert ended.code == 1
    for part in ("./check.sh", "exit code 126", "cannot be executed", "`chmod +x check.sh` and commit it"):
        assert part in ended.result["halted"]
    assert f"then `council resume {ended.result['run']}`" in ended.result["halted"]
    assert "install" not in ended.result["halted"]
    assert sessions(repository) == 0
    await repository.assert_invariants()


@pytest.mark.extended_variants
@pytest.mark.parametrize("options", [[], ["--allow-failing-base"]])
async def test_unrunnable_checks_are_reported_at_once(repository: Repository, options: list[str]) -> None:
    """One message has all fixes; runnable checks are not named."""
    repository.commit({"noexec.sh": "#!/bin/sh\n"}, "script")
    config = configure(repository, "write a.txt a", checks=["no-such-tool --all", "true", "./noexec.sh"])
    halted = repository.council("run", str(config), *options, "--json").result["halted"]
    assert halted.startswith("2 commands can't be run: `no-such-tool --all`, `./noexec.sh`\n")
    for part in (
        "exit code 127",
        "exit code 126",
        "\ninstall no-such-tool",
        ", `chmod +x noexec.sh` and commit it, then",
    ):
        assert part in halted, halted
    assert "true" not in halted
    assert "sessions start" not in repository.council("resume", "--allow-failing-base").stdout
    assert sessions(repository) == 0


@pytest.mark.extended
async def test_task_may_add_the_script_of_its_check(repository: Repository) -> None:
    """If the base may fail: an attempt that adds no script, or one without the executable bit, has failed."""
    commit_script(repository, "bin/own-tool", "#!/bin/sh\n")
    repository.remember()
    prompt = "write a.txt a\nattempt 2 write check.sh x\nattempt 3 git mv -f bin/own-tool check.sh"
    config = configure(repository, prompt, checks=["./check.sh"], defaults={"attempts": 3})
    ended = repository.council("run", str(config), "--allow-failing-base", "--json")
    assert ended.states == {"t1": "landed"}, ended
    assert ended.result["tasks"][0]["attempts"] == 3
    await repository.assert_invariants()


@pytest.mark.extended
async def test_missing_script_is_to_be_committed(repository: Repository) -> None:
    """For a path in the worktree the message does not suggest an installation."""
    repository.remember()
    ended = repository.council("run", str(configure(repository, "write a.txt a", checks=["./nothere.sh"])), "--json")
    assert "\ncommit ./nothere.sh" in ended.result["halted"]
    assert "install" not in ended.result["halted"]
    await repository.assert_invariants()
    owning = [{"id": "t", "prompt": "write a.txt a", "owns": ["a.txt"], "checks": ["./nothere.sh"]}]
    ended = repository.council("run", str(own_branch(repository, owning)), "--json")
    assert f"and merge that into council/{ended.result['run']} (`git branch " in ended.result["halted"]


async def test_task_that_removes_its_check_has_failed(repository: Repository) -> None:
    """The base has the program, so the task's change is at fault: it does not end the run for others."""
    commit_script(repository, "check.sh", "#!/bin/sh\n")
    repository.remember()
    config = configure(repository, "delete check.sh", "write b.txt b", checks=["./check.sh"], defaults=FAIL)
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"t1": "failed", "t2": "landed"}, ended
    assert ended.result["tasks"][0]["failure"] == "checks_failed"
    await repository.assert_invariants()


@pytest.mark.extended_variants
@pytest.mark.parametrize("checks", [[], ["true"]])
async def test_missing_program_of_the_setup_is_not_a_failure_of_the_task(
    repository: Repository, checks: list[str]
) -> None:
    """Without checks the first worktree detects it: still no session starts, and no attempt counts."""
    config = configure(repository, "write a.txt a", checks=checks, worktrees={"setup": ["no-such-installer"]})
    ended = repository.council("run", str(config), "--json")
    assert (ended.code, ended.result["status"]) == (1, "halted"), ended
    assert "no-such-installer" in ended.result["halted"]
    assert ended.states == {"t1": "pending"}
    assert sessions(repository) == 0
    await repository.assert_invariants()


@pytest.mark.extended_variants
@pytest.mark.parametrize("options", [[], ["--allow-failing-base"]])
@pytest.mark.parametrize(
    ("check", "script"),
    [
        (".venv/bin/python -m pytest", None),
        ("cd src && ../node_modules/.bin/jest", None),
        ("./build/tool --all", None),
        ("./build/tool --all", "chmod"),
    ],
)
async def test_uncommittable_program_ends_the_run_immediately(
    repository: Repository, check: str, script: str | None, options: list[str]
) -> None:
    """It is in a virtual environment, or ignored: no task may add it, and the message does not suggest a commit."""
    repository.commit({".gitignore": "build/\n"})
    settings: dict[str, Any] = {}
    if script is not None:
        settings["worktrees"] = {"setup": ["mkdir -p build && touch build/tool"]}
    repository.remember()
    config = configure(repository, "write a.txt a", checks=[check], **settings)
    ended = repository.council("run", str(config), *options, "--json")
    assert (ended.code, ended.result["status"], ended.states) == (1, "halted", {"t1": "pending"}), ended
    assert "start a new run whose `worktrees.setup` creates" in ended.result["halted"]
    assert re.search(r"\bcommit\b", ended.result["halted"]) is None
    assert sessions(repository) == 0
    await repository.assert_invariants()


@pytest.mark.extended
async def test_check_may_create_the_program_that_it_runs(repository: Repository) -> None:
    """Then a task may be at fault: if the base may fail, an attempt without the program has failed."""
    repository.commit({".gitignore": "build/\n", "make.sh": "exit 3\n"})
    repository.remember()
    prompt = "attempt 1 write a.txt a\nattempt 2 write make.sh mkdir build; cp /bin/true build/tool"
    config = configure(repository, prompt, checks=["sh make.sh; build/tool"], defaults={"attempts": 2})
    ended = repository.council("run", str(config), "--allow-failing-base", "--json")
    assert ended.states == {"t1": "landed"}, ended
    assert ended.result["tasks"][0]["attempts"] == 2
    await repository.assert_invariants()


def test_show_and_runs_have_the_remedy_of_a_halted_run(repository: Repository) -> None:
    """The same lines as `status`: a resume alone would halt again."""
    file = str(repository.configure([{"id": "a", "prompt": "write a a", "checks": ["test -f z"]}]))
    halted = repository.council("run", file, "--json").result["halted"]
    remedy = halted.splitlines()[-1].removeprefix("or ")
    assert "council resume" in halted
    for command in (("show", "a"), ("runs",)):
        shown = repository.council(*command).stdout
        assert remedy in shown, shown
        assert "next: council resume" not in shown
