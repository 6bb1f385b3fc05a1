"""The report that a run ends with, and facts that every command reports alike."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.conftest import Repository
from tests.integration.checks.test_base_checks import own_branch

#: The time of an event at the beginning of its line.
EVENT = re.compile(r"\d\d:\d\d:\d\d ")


def final_report(text: str) -> list[str]:
    """Return the lines after those of events."""
    lines = text.splitlines()
    return lines[max(number for number, line in enumerate(lines) if EVENT.match(line)) + 1 :]


@pytest.mark.extended_variants
@pytest.mark.parametrize("ends", ["failing", "landing"])
def test_report_of_a_run_is_short_unless_verbose(repository: Repository, ends: str) -> None:
    """At most ten lines of 80 columns with totals and the tasks that need attention; `-v` has a row for each task."""
    failing = {"prompt": f"print {'words ' * 40}\nexit 3", "attempts": 1}
    tasks: list[dict[str, Any]] = [
        {"id": f"a-task-with-a-long-name-{number}", "prompt": f"write {number}.txt x"} for number in range(10)
    ]
    if ends == "failing":
        tasks += [{"id": f"bad-{number}", **failing} for number in range(8)]
    config = str(repository.configure(tasks))
    report = final_report(repository.council("run", config).stdout)
    assert len(report) <= 10, report
    assert [line for line in report if len(line) > 80 and "council " not in line] == []
    assert f"10 of {len(tasks)} landed on main" in report[0]
    assert not any("a-task-with-a-long-name" in line for line in report), report
    if ends == "failing":
        assert any(line.startswith("  bad-0 failed: ") for line in report), report
        assert re.fullmatch(r"  and \d more: council status", report[-1]), report
        assert repository.council("retry", *(f"bad-{number}" for number in range(8))).code == 0
        verbose = repository.council("resume", "-v").stdout
    else:
        assert len(report) == 1, report
        verbose = repository.council("run", config, "-v").stdout
    rows = [line.split()[0] for line in final_report(verbose) if re.match(r"  \S", line)]
    assert len([row for row in rows if row.startswith(("a-task", "bad-"))]) == len(tasks), verbose


@pytest.mark.extended
async def test_attempts_are_the_same_in_every_output(repository: Repository) -> None:
    """Of a task that failed, was interrupted, and failed again; a retry counts from one."""
    flag = repository.spawns.parent / "flag"
    task = {"id": "t", "prompt": f"without {flag} exit 1\nwrite t.txt x", "attempts": 2}
    config = str(repository.configure([task]))
    killed = repository.council("run", config, failpoints="session.spawned=kill@2")
    assert killed.code < 0, killed
    assert repository.council("resume").code == 1
    assert set(reported_attempts(repository)) == {2}, reported_attempts(repository)
    assert repository.council("retry", "t").code == 0
    flag.touch()
    resumed = repository.council("resume", "--json")
    assert resumed.states == {"t": "landed"}
    counts = [*reported_attempts(repository), resumed.result["tasks"][0]["attempts"]]
    assert set(counts) == {1}, counts
    assert len(repository.council("show", "t", "--json").result["sessions"]) == 4


def reported_attempts(repository: Repository) -> list[int]:
    """Return the number of attempts of task `t` in each output that has one."""

    def result(*words: str) -> dict[str, Any]:
        return repository.council(*words, "--json").result

    found = [result("status")["tasks"][0]["attempts"], result("show", "t")["attempts"]]
    found += [one["attempts"] for one in result("state", "show")["tasks"]]
    for words, pattern in ((("show", "t"), r"^  attempts +(\d+)$"), (("state", "show"), r"^  t .* (\d+) attempts? ")):
        [number] = re.findall(pattern, repository.council(*words).stdout, re.MULTILINE)
        found.append(int(number))
    return found


#: Tasks with each kind of branch: landed work, work of a failed attempt, a conflict, cancelled work.
BRANCHES: list[dict[str, Any]] = [
    {"id": "first", "prompt": "write README.md first", "priority": 9},
    {"id": "clash", "prompt": "tick 10 0.1\nwrite README.md clash", "attempts": 1},
    {"id": "bad", "prompt": "write bad.txt x\nexit 1", "attempts": 1},
    {"id": "after", "prompt": "write after.txt x", "needs": ["bad"]},
]


@pytest.mark.extended
@pytest.mark.parametrize("target", ["own", "main"])
def test_branch_in_any_output_exists(repository: Repository, target: str) -> None:
    """In the user's repository, regardless of the state of its task; other work is named as `salvage` accepts it."""
    path = own_branch(repository, BRANCHES) if target == "own" else repository.configure(BRANCHES)
    printed = [repository.council("run", str(path), "-v")]
    states = repository.council("status", "--json").states
    assert states == {"first": "landed", "clash": "conflict", "bad": "failed", "after": "blocked"}, states
    commands = ["status", "runs", "state show", "salvage list", "usage", "checkpoint list", "locks", "check"]
    commands += [f"{command} {task}" for command in ("show", "logs", "diff") for task in states]
    commands += ["salvage show clash/conflict", "salvage show bad/1", "resume", "clean --dry-run"]
    printed += [repository.council(*command.split()) for command in commands]
    heads = repository.git("for-each-ref", "--format=%(refname:short)", "refs/heads").split()
    named = set[str]()
    for one in printed:
        for name in re.findall(r"(?<![\w./-])council/[\w./-]+", one.stdout + one.stderr):
            named.add(name.rstrip("."))
            assert name.rstrip(".") in heads, (name, one)
    assert (named == set()) is (target == "main"), named
