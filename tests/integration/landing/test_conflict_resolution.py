"""Merge conflicts that a session resolves: what lands, and wrong resolutions that do not."""

from __future__ import annotations

import signal
from itertools import cycle
from typing import Any

import pytest

from tests.conftest import Repository
from tests.faults import SHELL_ADAPTER
from tests.sandboxes import needs_sandbox
from tests.waiting import wait_for

BASE = "import os\n\n\ndef test_old():\n    assert os\n\n\n# end\n"


def test_lines(name: str) -> str:
    """Return the test that a task adds at the end."""
    return f"def test_{name}():\n    assert '{name}'\n"


test_lines.__test__ = False  # type: ignore[attr-defined]

#: Shell commands of the second attempt, which starts from the conflict.
RIGHT = "sed -i '/^<<<<<<< /d; /^=======$/d; /^>>>>>>> /d' a.py"
WRONG = {
    "markers": "sed -i '/^=======$/d' a.py",
    "target's side dropped": "sed -i '/^<<<<<<< /,/^=======$/d; /^>>>>>>> /d' a.py",
    "own side dropped": "sed -i '/^=======$/,/^>>>>>>> /d; /^<<<<<<< /d' a.py",
    "a test deleted": f"{RIGHT}; sed -i '/test_old/,+1d' a.py",
    "a test file deleted": f"{RIGHT}; rm test_other.py",
    "an unrelated change": f"{RIGHT}; echo x > b.py",
    "an added line": f"{RIGHT}; sed -i 's/^# end/evil()\\n# end/' a.py",
    "an added line between": "sed -i '/^<<<<<<< /d; s/^=======$/evil()/; /^>>>>>>> /d' a.py",
    "a replaced file": f"{RIGHT}; mv a.py c.py; ln -s c.py a.py",
    "nothing": "true",
}


def adding(name: str, resolve: str, path: str = "a.py", **settings: Any) -> dict[str, Any]:
    """Return a task that adds lines to a file; if the file has a conflict, it resolves that instead."""
    add = (
        f"python3 - <<'END'\nfrom pathlib import Path\nfile = Path({path!r})\n"
        f"file.write_text(file.read_text().replace('# end', {test_lines(name)!r} + '# end'))\nEND"
    )
    # A later attempt gets the conflict too, after this.
    prompt = f"if grep -q '^<<<<<<< ' {path}; then {resolve.replace('a.py', path)}\nelse\n{add}\nfi\nexit 0"
    return {"id": name, "prompt": prompt, "on_conflict": "resolve", "attempts": 3, **settings}


def run(repository: Repository, resolve: str, **settings: Any) -> Any:
    """Run two tasks that add different lines at the same place."""
    repository.commit({"a.py": BASE, "test_other.py": "def test_other():\n    pass\n"}, "base")
    repository.remember()
    tasks = [adding("left", resolve, **settings), adding("right", resolve, **settings)]
    config = repository.configure(tasks, adapters={"sh": SHELL_ADAPTER}, defaults={"backoff": {"initial": "10ms"}})
    return repository.council("run", str(config), "--json", timeout=120)


async def test_right_resolution_lands_with_both_sides(repository: Repository) -> None:
    """In the second attempt of the task that landed last."""
    ended = run(repository, RIGHT, attempts=2)
    assert ended.states == {"left": "landed", "right": "landed"}, ended
    text = (repository.top / "a.py").read_text()
    assert all(test_lines(name) in text for name in ("left", "right"))
    assert len(text) == len(BASE) + len(test_lines("left")) + len(test_lines("right"))
    assert sorted(task["attempts"] for task in ended.result["tasks"]) == [1, 2]
    await repository.assert_invariants()


@pytest.mark.extended
@pytest.mark.parametrize("case", WRONG)
async def test_wrong_resolution_never_lands(case: str, repository: Repository) -> None:
    """Without another attempt, the task ends as a conflict with the reason, and its work is preserved."""
    ended = run(repository, WRONG[case], attempts=2)
    ends = "no_change" if case == "own side dropped" else "conflict"  # the files are those of the target
    assert sorted(ended.states.values()) == sorted([ends, "landed"]), ended
    task = next(each for each in ended.result["tasks"] if each["status"] == ends)
    assert ends == "no_change" or "the resolution of its merge conflict was rejected: " in task["reason"]
    other = next(each["id"] for each in ended.result["tasks"] if each["status"] == "landed")
    assert (repository.top / "a.py").read_text() == BASE.replace("# end", f"{test_lines(other)}# end")
    assert (repository.top / "test_other.py").exists()
    assert not (repository.top / "b.py").exists()
    await repository.assert_invariants()


@pytest.mark.extended
async def test_task_with_a_rejected_resolution_is_repeated_from_the_target(repository: Repository) -> None:
    """Its third attempt has no conflict."""
    ended = run(repository, WRONG["target's side dropped"])
    assert ended.states == {"left": "landed", "right": "landed"}, ended
    text = (repository.top / "a.py").read_text()
    assert all(test_lines(name) in text for name in ("left", "right"))
    assert sorted(task["attempts"] for task in ended.result["tasks"]) == [1, 3]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_kills_consume_no_resolution(repository: Repository) -> None:
    """Each step is repeated; the interrupted session of the resolution too, from the same conflict."""
    marker = repository.top.parent / "resolving"
    resolve = f"if ! test -e {marker}; then touch {marker}; sleep 600; fi; {RIGHT}"
    repository.commit({"a.py": BASE, "test_other.py": ""}, "base")
    repository.remember()
    config = repository.configure(
        [adding(name, resolve, attempts=2) for name in ("left", "right")],
        adapters={"sh": {**SHELL_ADAPTER, "writable": [str(marker.parent)]}},
    )
    assert repository.council("run", str(config), failpoints="landing.rejected=kill").code == -signal.SIGKILL
    child = repository.start("resume")
    wait_for(marker.exists)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    for failpoint in ("work.recorded", "landing.intended", "landing.pushed"):
        assert repository.council("resume", failpoints=f"{failpoint}=kill").code == -signal.SIGKILL, failpoint
    ended = repository.council("resume", "--json")
    assert ended.states == {"left": "landed", "right": "landed"}, ended
    text = (repository.top / "a.py").read_text()
    assert len(text) == len(BASE) + len(test_lines("left")) + len(test_lines("right"))
    await repository.assert_invariants()


@pytest.mark.extended
async def test_resolution_must_pass_the_checks_of_the_other_task(repository: Repository) -> None:
    """Also if its own task has none."""
    repository.commit({"a.py": BASE}, "base")
    repository.remember()
    check: dict[str, Any] = {"checks": ["test $(grep -c '^def' a.py) -lt 3"], "priority": 1}
    tasks = [adding("left", RIGHT, attempts=2, **check), adding("right", RIGHT, attempts=2)]
    repository.git("branch", "out")
    config = repository.configure(tasks, adapters={"sh": SHELL_ADAPTER}, target="out", capacity=1)
    ended = repository.council("run", str(config), "--json", timeout=120)
    assert ended.states == {"left": "landed", "right": "conflict"}, ended
    assert "on the merged tree" in ended.result["tasks"][1]["reason"]


@pytest.mark.extended
async def test_conflict_with_a_removal_is_repeated_from_the_target(repository: Repository) -> None:
    """No session gets files that have no markers."""
    repository.commit({"a.py": BASE}, "base")
    repository.remember()
    removing = {"id": "right", "prompt": "rm a.py\nexit 0", "on_conflict": "resolve", "attempts": 2}
    repository.git("branch", "out")
    tasks = [adding("left", RIGHT, priority=1), removing]
    config = repository.configure(tasks, adapters={"sh": SHELL_ADAPTER}, target="out", capacity=1)
    ended = repository.council("run", str(config), "--json", timeout=120)
    assert ended.states == {"left": "landed", "right": "landed"}, ended
    assert "no session may resolve it: a.py was removed" in ended.stdout


@pytest.mark.parametrize(
    "count", [pytest.param(20, marks=pytest.mark.extended), pytest.param(100, marks=pytest.mark.slow)]
)
@pytest.mark.timeout(1800)
async def test_most_right_and_no_wrong_resolutions_of_many_land(count: int, repository: Repository) -> None:
    """Of every ten conflicts, seven are resolved correctly and three are not."""
    wrong = cycle(WRONG.values())
    scripts = [RIGHT if number % 10 < 7 else next(wrong) for number in range(count)]
    repository.commit({f"f{number}.py": BASE for number in range(count)} | {"test_other.py": "x = 1\n"}, "base")
    repository.git("branch", "out")
    tasks = [
        adding(f"{side}{number}", script, f"f{number}.py", attempts=2)
        for number, script in enumerate(scripts)
        for side in ("left", "right")
    ]
    config = repository.configure(tasks, adapters={"sh": SHELL_ADAPTER}, target="out", capacity=6)
    ended = repository.council("run", str(config), "--json", timeout=15 * count)
    landed = [{ended.states[f"left{number}"], ended.states[f"right{number}"]} == {"landed"} for number in range(count)]
    right = [has_landed for has_landed, script in zip(landed, scripts, strict=True) if script == RIGHT]
    others = sum(landed) - sum(right)
    print(f"landed: {sum(right)} of {len(right)} right, {others} of {count - len(right)} wrong")  # noqa: T201
    assert sum(right) >= 0.9 * len(right), ended
    assert sum(landed) == sum(right), ended
    assert repository.git("ls-tree", "--name-only", "out", "b.py", "c.py", "test_other.py") == "test_other.py"
    for number, both_landed in enumerate(landed):
        added = [test_lines(f"{side}{number}") for side in ("left", "right")]
        text = f"{repository.git('show', f'out:f{number}.py')}\n"
        orders = ["".join(added), "".join(reversed(added))] if both_landed else added
        assert text in {BASE.replace("# end", f"{each}# end") for each in orders}, number


#: Stand-ins for the drivers, with their command lines: git's union merge has the lines of both sides.
#: The folder of the three versions is one that `council clean` removes if `council` is killed.
MERGIRAF = """#!/bin/sh
test "$1 $2 $6 $7" = "merge --git --path-name a.py" || exit 2
case "$4" in */council-home/*/indexes/merge-*) ;; *) exit 2 ;; esac
exec git merge-file --union "$4" "$3" "$5"
"""
WEAVE = '#!/bin/sh\ntest "$4 $5" = "7 a.py" || exit 2\nexec git merge-file --union "$2" "$1" "$3"\n'
DRIVERS = {"mergiraf": MERGIRAF, "weave-driver": WEAVE}


def install_driver(repository: Repository, name: str, program: str) -> None:
    """Install a merge driver on PATH."""
    folder = repository.top.parent / "drivers"
    folder.mkdir()
    (folder / name).write_text(program)
    (folder / name).chmod(0o755)
    repository.environ["PATH"] = f"{folder}:{repository.environ['PATH']}"


@pytest.mark.parametrize("name", ["mergiraf", pytest.param("weave-driver", marks=pytest.mark.extended)])
async def test_conflict_that_a_structural_driver_merges_needs_no_session(name: str, repository: Repository) -> None:
    """The merge names the driver."""
    install_driver(repository, name, DRIVERS[name])
    ended = run(repository, RIGHT)
    assert ended.states == {"left": "landed", "right": "landed"}, ended
    assert [task["attempts"] for task in ended.result["tasks"]] == [1, 1]
    text = (repository.top / "a.py").read_text()
    assert all(test_lines(side) in text for side in ("left", "right"))
    assert len(text) == len(BASE) + len(test_lines("left")) + len(test_lines("right"))
    assert f"Conflicts merged by {name}: a.py\n" in repository.git("log", "--first-parent", "--format=%B", "-2")
    await repository.assert_invariants()


@pytest.mark.extended
@pytest.mark.parametrize(
    "program",
    [
        pytest.param("#!/bin/sh\nexit 0\n", id="one side dropped"),
        pytest.param('#!/bin/sh\nsed -i "/^def test_old/,+1d" "$4"\nexit 0\n', id="a test deleted"),
        pytest.param("#!/bin/sh\nexit 1\n", id="a conflict remains"),
        pytest.param("#!/bin/sh\nkill -9 $$\n", id="killed"),
        pytest.param('#!/bin/sh\nrm "$4"\n', id="no result"),
        pytest.param('#!/bin/sh\nrm "$4"; mkfifo "$4"\n', id="a pipe as the result"),
        pytest.param('#!/bin/sh\nln -sf /dev/zero "$4"\n', id="an endless result"),
        pytest.param("no program", id="not executable"),
    ],
)
async def test_session_resolves_what_a_structural_driver_merges_wrongly(program: str, repository: Repository) -> None:
    """No result of a driver is used unverified."""
    install_driver(repository, "mergiraf", program)
    ended = run(repository, RIGHT)
    assert ended.states == {"left": "landed", "right": "landed"}, ended
    assert sorted(task["attempts"] for task in ended.result["tasks"]) == [1, 2]
    assert "Conflicts merged by" not in repository.git("log", "--first-parent", "--format=%B", "-2")
    await repository.assert_invariants()


@pytest.mark.extended
async def test_merge_of_a_driver_that_fails_the_checks_of_the_other_task_goes_to_a_session(
    repository: Repository,
) -> None:
    """As if no driver had merged it."""
    install_driver(repository, "mergiraf", MERGIRAF)
    repository.commit({"a.py": BASE}, "base")
    check: dict[str, Any] = {"checks": ["test $(grep -c '^def' a.py) -lt 3"], "priority": 1}
    tasks = [adding("left", RIGHT, attempts=2, **check), adding("right", RIGHT, attempts=2)]
    repository.git("branch", "out")
    config = repository.configure(tasks, adapters={"sh": SHELL_ADAPTER}, target="out", capacity=1)
    ended = repository.council("run", str(config), "--json", timeout=120)
    assert ended.states == {"left": "landed", "right": "conflict"}, ended
    assert ended.result["tasks"][1]["attempts"] == 2
    assert "on the merged tree" in ended.result["tasks"][1]["reason"]


@needs_sandbox
@pytest.mark.sandbox
@pytest.mark.extended
async def test_structural_driver_reaches_only_the_three_versions(repository: Repository) -> None:
    """A file that takes over the driver's parser gets neither the user's files nor the network."""
    secret = repository.top.parent / "secret"
    secret.write_text("x")
    # With bubblewrap, writing elsewhere may succeed, but only inside of the sandbox.
    attack = f'if cat {secret} || ls {repository.top}/.git; then echo evil >> "$4"; fi >/dev/null 2>&1\n'
    attack += f"(echo x > {secret}2) 2>/dev/null\n"
    install_driver(repository, "mergiraf", MERGIRAF.replace("exec", f"{attack}exec"))
    ended = run(repository, RIGHT)
    assert ended.states == {"left": "landed", "right": "landed"}, ended
    assert [task["attempts"] for task in ended.result["tasks"]] == [1, 1]
    assert not (repository.top.parent / "secret2").exists()
