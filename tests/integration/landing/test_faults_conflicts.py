"""Merge conflicts of every kind, and changes that only look like conflicts, in whole runs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Repository
from tests.faults import PYTHON_ADAPTER, SHELL_ADAPTER

pytestmark = pytest.mark.extended

BASE = {"content/f": "1\n2\n3\n", "gone/f": "a\nb\nc\n", "names/f": "x\ny\nz\n", "kinds/keep": "k\n",
        "binary/f": "\0\1base", "link/keep": "k\n"}  # fmt: skip
#: The target's change, the task's change, and the paths in the reason.
KINDS = {
    "content": ("echo target > content/f", "echo task > content/f", {"content/f"}),
    "gone": ("rm gone/f", "echo task >> gone/f", {"gone/f"}),
    "names": ("mv names/f names/left", "mv names/f names/right", {"names/f", "names/left", "names/right"}),
    "kinds": ("mkdir kinds/d; echo x > kinds/d/x", "echo file > kinds/d", {"kinds/d"}),
    "binary": ("printf '\\0target' > binary/f", "printf '\\0task' > binary/f", {"binary/f"}),
    "link": ("ln -s target link/l", "ln -s task link/l", {"link/l"}),
}


def show(repository: Path, *arguments: str) -> str:
    """Run git in one of our own repositories."""
    done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, check=True)
    return done.stdout.decode(errors="replace")


async def test_conflicts_of_all_kinds_are_reported(repository: Repository) -> None:
    """Each has its paths, the target does not move, and the branch has the commits of both sides."""
    base = repository.commit(BASE, "base")
    repository.git("checkout", "--quiet", "-b", "out")
    for ours, _, _ in KINDS.values():
        subprocess.run(["sh", "-c", ours], cwd=repository.top, check=True)
    out = repository.commit({}, "the target's side")
    repository.git("checkout", "--quiet", "main")
    repository.remember()
    tasks = [{"id": kind, "prompt": theirs} for kind, (_, theirs, _) in KINDS.items()]
    config = repository.configure(tasks, adapters={"sh": SHELL_ADAPTER}, target="out", capacity=6)
    ended = repository.council("run", str(config), "--json")
    assert (ended.code, ended.states) == (1, dict.fromkeys(KINDS, "conflict")), ended
    assert repository.git("rev-parse", "out") == out
    trusted = Path(ended.result["repository"])
    for task in ended.result["tasks"]:
        named = {path.partition("~")[0] for path in task["paths"]}
        assert named
        assert named <= KINDS[task["id"]][2], task
        target, work = show(trusted, "rev-parse", f"{task['branch']}^1", f"{task['branch']}^2").split()
        assert target == out
        assert show(trusted, "diff", "--name-only", base, work) != ""
    assert "<<<<<<<" in show(trusted, "show", f"{ended.result['tasks'][0]['branch']}:content/f")
    await repository.assert_invariants(target_checked_out=False)


async def test_case_only_rename_lands_and_is_checked(repository: Repository) -> None:
    """`Readme` instead of `README` is a change like any other, for the checks and for the checkout."""
    script = "git mv README.md readme.md; mkdir tmp; mv src tmp/src; mv tmp/src Src; rmdir tmp"
    settings = {
        "allow_failing_base": True,
        "checks": ["test -e readme.md && test ! -e README.md && test -e Src/app.py && test ! -e src"],
    }
    config = repository.configure([{"id": "case", "prompt": script, **settings}], adapters={"sh": SHELL_ADAPTER})
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"case": "landed"}, ended
    assert sorted(path.name for path in repository.top.iterdir()) == [".council", ".git", "Src", "readme.md"]
    await repository.assert_invariants()


async def test_same_change_twice_lands_once(repository: Repository) -> None:
    """It has landed without a commit; files that were only touched are no change."""
    tasks = [
        {"id": "first", "prompt": "write same.txt same"},
        {"id": "second", "prompt": "write same.txt same"},
        {"id": "touched", "prompt": "append README.md x\ngit checkout README.md"},
    ]
    ended = repository.council("run", str(repository.configure(tasks)), "--json")
    assert ended.states == {"first": "landed", "second": "landed", "touched": "no_change"}, ended
    assert repository.git("rev-list", "--count", "--merges", "main") == "1"
    assert len({task["landed"] for task in ended.result["tasks"][:2]}) == 1
    await repository.assert_invariants()


NAMES = (b"new\nline", b"-rf", b"--", b"qu\"o'te", b"tab\there", b"latin\xe9", b"bytes\xff\xfe", b":(top)x", b" lead",
         b"back\\slash", b"*", b"$HOME", "\u2603 e\u0301".encode(), b"\x1b[31mred", b"CON")  # fmt: skip
WRITE = """
import os
for name in {names!r}:
    os.makedirs(os.path.dirname(name) or b".", exist_ok=True)
    with open(name, "ab") as file:
        file.write({content!r} + b"\\n")
{rest}
"""


async def test_hostile_file_names_pass_run_conflict_diff_and_salvage(repository: Repository) -> None:
    """Every valid file name lands, is reported in a conflict, is printed, and is salvaged."""
    nested = tuple(b"-d/\xff/" + name for name in NAMES)
    tasks: list[dict[str, Any]] = [
        {"id": "lands", "prompt": WRITE.format(names=NAMES + nested, content=b"lands", rest="")},
        {"id": "meets", "prompt": WRITE.format(names=NAMES, content=b"meets", rest=""), "priority": -1},
        {"id": "fails", "prompt": WRITE.format(names=[b"f" + name for name in NAMES], content=b"f",
                                               rest="raise SystemExit(1)"), "attempts": 1},
    ]  # fmt: skip
    ended = repository.council("run", str(repository.configure(tasks, adapters={"py": PYTHON_ADAPTER})), "--json")
    both = {ended.states["lands"], ended.states["meets"]}
    assert (both, ended.states["fails"]) == ({"landed", "conflict"}, "failed"), ended
    landed = next(task for task in ended.result["tasks"] if task["status"] == "landed")["id"]
    conflict = next(task for task in ended.result["tasks"] if task["status"] == "conflict")
    assert len(conflict["paths"]) == len(NAMES)
    assert {"-rf", "new\nline", "latin\\xe9", "bytes\\xff\\xfe"} <= set(conflict["paths"])
    top = bytes(repository.top)
    for name in NAMES:
        with open(top + b"/" + name, "rb") as file:  # noqa: PTH123  (a name that is no text)
            assert file.read() == landed.encode() + b"\n"
    for task in (landed, conflict["id"], "fails"):
        shown = repository.council("diff", task)
        assert shown.code == 0, shown
        assert '"b/' in shown.stdout
        assert "\x1b[31m" not in shown.stdout + repository.council("status").stdout
    applied = repository.council("salvage", "apply", "fails/1", "--json")
    assert applied.code == 0, applied
    assert len(applied.result["paths"]) == len(NAMES)
    for name in NAMES:
        with open(top + b"/f" + name, "rb") as file:  # noqa: PTH123
            assert file.read() == b"f\n"
