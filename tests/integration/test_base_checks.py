"""Checks run on the base before any session: what fails there would fail every task."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ended, Repository
from tests.waiting import wait_for

#: Passes where `code` is good.
GOOD = "grep -qx good code"
#: A failed check ends the task.
FAIL = {"on_checks_failed": "fail"}


def configure(repository: Repository, *prompts: str, checks: list[str], **settings: Any) -> Path:
    """Configure tasks with checks that are expected to pass on the base."""
    tasks = [{"id": f"t{number}", "prompt": prompt} for number, prompt in enumerate(prompts, 1)]
    backoff = {"initial": "10ms", "max": "10ms", "jitter": False}
    defaults = {"checks": checks, "backoff": backoff, "timeout": "60s", **settings.pop("defaults", {})}
    return repository.configure(tasks, defaults=defaults, **settings)


def types(ended: Ended) -> list[str]:
    """Return the types of the events that a command printed."""
    return [line["event"] for line in ended.lines if "event" in line]


def sessions(repository: Repository) -> int:
    """Return how many sessions the fake CLI was started for."""
    return len(repository.spawns.read_text().splitlines()) if repository.spawns.exists() else 0


async def test_a_check_that_fails_on_the_base_ends_the_run_before_any_session(repository: Repository) -> None:
    """One message names the check, its exit code, its last output and the fix; nothing is lost."""
    repository.commit({"code": "bad\n"}, "broken")
    repository.remember()
    check = f"echo looking at it; {GOOD} || {{ echo the code is bad; exit 3; }}"
    config = configure(repository, "write a.txt a", "write b.txt b", checks=[check])
    ended = repository.council("run", str(config))
    assert ended.code == 1, ended
    message = " ".join(ended.stdout.partition("Halted: ")[2].split())
    for part in (GOOD, "fails on main", "exit code 3", "--allow-failing-base", "council resume"):
        assert part in message, message
    assert sessions(repository) == 0
    for command in ("logs", "diff"):
        assert "where the run is halted, `council status` shows" in repository.council(command, "t1").stderr
    assert ".check1" in repository.council("status").stdout
    status = repository.council("status", "--json")
    assert status.states == {"t1": "pending", "t2": "pending"}
    assert (status.result["status"], status.result["halted_by"]) == ("halted", "base")
    assert "looking at it\nthe code is bad\n" in status.result["halted"]
    assert [task["attempts"] for task in status.result["tasks"]] == [0, 0]
    await repository.assert_invariants()


async def test_resume_tries_again_and_goes_on_once_the_base_is_fixed(repository: Repository) -> None:
    """The fix of the user's own on the base is what the resumed run finds."""
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


@pytest.mark.extended_but_first
@pytest.mark.parametrize("how", ["run", "resume", "file"])
async def test_a_task_that_is_to_fix_the_failing_base_can_run(repository: Repository, how: str) -> None:
    """With the option of either command, and with the key of the file."""
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
async def test_a_base_is_checked_once_for_all_tasks_with_the_same_checks(repository: Repository) -> None:
    """Tasks of other checks have theirs run, and one without checks needs none."""
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


async def test_a_killed_run_checks_no_base_again_that_it_has_proven(repository: Repository) -> None:
    """Neither the base that passed, nor what landed through the same checks."""
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


async def test_a_signal_ends_the_checks_of_the_base(repository: Repository) -> None:
    """Nothing has started then, and a resume starts over."""
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
async def test_a_corrected_check_is_reported_and_taken_over_by_the_named_commands(repository: Repository) -> None:
    """A resume that halts again reports that the file has changed; the commands of the message end the halt."""
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


async def test_a_setup_that_fails_on_the_base_names_a_new_run(repository: Repository) -> None:
    """A run keeps its setup, so no command takes over a corrected one; --allow-failing-base does not help either."""
    repository.remember()
    config = configure(repository, "write a.txt a", checks=["true"], worktrees={"setup": ["exit 3"]})
    halted = repository.council("run", str(config), "--json").result["halted"]
    assert "setup `exit 3` fails" in halted
    assert "correct `worktrees.setup` in the file, then start a new run" in halted
    assert "--reload" not in halted
    assert "--allow-failing-base" not in halted
    await repository.assert_invariants()


async def test_only_programs_are_looked_for_on_a_base_that_may_fail(repository: Repository) -> None:
    """A check that names only programs that are there is not run; one that finds its program elsewhere passes."""
    repository.commit({"bin/own-tool": "#!/bin/sh\nexit 1\n"}, "tool")
    repository.git("update-index", "--chmod=+x", "bin/own-tool")
    repository.git("commit", "--quiet", "--message", "executable")
    repository.git("reset", "--quiet", "--hard")
    trace = repository.spawns.parent / "checked"
    checks = [f"echo x >> {trace}; test -e a.txt", "PATH=$PWD/bin:$PATH; own-tool || test -e a.txt"]
    config = configure(repository, "write a.txt a", checks=checks, writable=[str(trace.parent)])
    repository.remember()
    ended = repository.council("run", str(config), "--allow-failing-base", "--json")
    assert ended.states == {"t1": "landed"}, ended
    assert len(trace.read_text().splitlines()) == 1
    await repository.assert_invariants()


@pytest.mark.extended_but_first
@pytest.mark.parametrize("options", [[], ["--allow-failing-base"]])
async def test_a_program_of_a_check_that_is_not_found_is_nobodys_failure(
    repository: Repository, options: list[str]
) -> None:
    """The message names the program and where it was looked for; no session starts, whatever may fail on the base."""
    folder = repository.spawns.parent / "bin"
    folder.mkdir()
    config = configure(repository, "write a.txt a", checks=["no-such-tool --all"], writable=[str(folder)])
    ended = repository.council("run", str(config), *options, "--json")
    assert ended.code == 1, ended
    assert (ended.result["status"], ended.states["t1"]) == ("halted", "pending")
    first = repository.environ["PATH"].split(os.pathsep)[0]
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


async def test_a_check_that_is_not_executable_is_nobodys_failure(repository: Repository) -> None:
    """A committed script without the permission: the message says so."""
    repository.commit({"check.sh": "#!/bin/sh\n"}, "script")
    repository.remember()
    ended = repository.council("run", str(configure(repository, "write a.txt a", checks=["./check.sh"])), "--json")
    assert ended.code == 1
    for part in ("./check.sh", "exit code 126", "can not be executed"):
        assert part in ended.result["halted"]
    assert sessions(repository) == 0
    await repository.assert_invariants()


async def test_a_task_that_removes_the_program_of_its_check_has_failed(repository: Repository) -> None:
    """The base has the program, so what the task changed is at fault: it can't end the run for the others."""
    repository.commit({"check.sh": "#!/bin/sh\n"}, "script")
    repository.git("update-index", "--chmod=+x", "check.sh")
    repository.git("commit", "--quiet", "--message", "executable")
    repository.git("reset", "--quiet", "--hard")
    repository.remember()
    config = configure(repository, "delete check.sh", "write b.txt b", checks=["./check.sh"], defaults=FAIL)
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"t1": "failed", "t2": "landed"}, ended
    assert ended.result["tasks"][0]["failure"] == "checks_failed"
    await repository.assert_invariants()


@pytest.mark.extended_but_first
@pytest.mark.parametrize("checks", [[], ["true"]])
async def test_a_program_of_the_setup_that_is_not_found_is_nobodys_failure(
    repository: Repository, checks: list[str]
) -> None:
    """Without checks it is the first worktree that finds it: still no session starts, and no attempt counts."""
    config = configure(repository, "write a.txt a", checks=checks, worktrees={"setup": ["no-such-installer"]})
    ended = repository.council("run", str(config), "--json")
    assert (ended.code, ended.result["status"]) == (1, "halted"), ended
    assert "no-such-installer" in ended.result["halted"]
    assert ended.states == {"t1": "pending"}
    assert sessions(repository) == 0
    await repository.assert_invariants()
