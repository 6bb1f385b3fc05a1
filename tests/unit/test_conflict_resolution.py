"""The verification of conflict resolutions: what may land, and attacks that may not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from orchestrator.domain.runs.conflict_resolution import find_resolution_problem, parse_conflicting_file

HEAD = "import os\n\n\ndef test_old():\n    assert True\n\n\n"
TAIL = "\n\ndef test_last():\n    assert os\n"
CALL = "def call(a):\n    return run(a)\n"
OURS = "def call(a, b):\n    return run(a, b)\n"
THEIRS = "def call(a, *, c):\n    return run(a, c=c)\n"
BOTH = "def call(a, b, *, c):\n    return run(a, b, c=c)\n"
ONE, OTHER = "def test_one():\n    assert 1\n", "def test_two():\n    assert 2\n"
#: Texts between HEAD and TAIL: base, both sides, and a resolution.
ACCEPTED = {
    "both additions": ("", ONE, OTHER, ONE + OTHER),
    "both additions, in the other order": ("", ONE, OTHER, OTHER + ONE),
    "both changes of one line": (CALL, OURS, THEIRS, BOTH),
    "the same addition by both, once": ("", f"x = 1\n{ONE}", f"x = 1\n{OTHER}", f"x = 1\n{ONE}{OTHER}"),
    "indented by one side, changed by the other": ("a = 1\n", "    a = 1\n", "a = 2\n", "    a = 2\n"),
}
REJECTED = {
    "our side dropped": ("", ONE, OTHER, OTHER),
    "their side dropped": ("", ONE, OTHER, ONE),
    "both dropped": ("", ONE, OTHER, ""),
    "a test removed in part": ("", ONE, OTHER, f"{ONE}def test_two():\n    pass\n"),
    "an unrelated line added": ("", ONE, OTHER, f"{ONE}{OTHER}evil()\n"),
    "one change of a line dropped": (CALL, OURS, THEIRS, OURS),
    "a word invented": (CALL, OURS, THEIRS, BOTH.replace("c=c", "c=evil")),
    "the removed line restored": (CALL, OURS, THEIRS, CALL + BOTH),
    "contradicting values": ("a = 1\n", "a = 2\n", "a = 3\n", "a = 2\n"),
    "indentation dropped": ("a = 1\n", "    a = 1\n", "a = 2\n", "a = 2\n"),
    "an addition twice": ("", ONE, OTHER, ONE + OTHER + ONE),
    "common lines in another order": ("a()\nb()\n", "a()\nx()\nb()\n", "a()\ny()\nb()\n", "x()\ny()\nb()\na()\n"),
    "words exchanged": ("", "assert a == 1\n", "assert b == 2\n", "assert a == 2\nassert b == 1\n"),
    "lines of one side in another order": ("", "a()\nb()\n", "c()\n", "b()\na()\nc()\n"),
}


def verify(folder: Path, sides: tuple[str, str, str], resolved: str) -> str | None:
    """Verify a resolution of the merge that git makes of these sides."""
    for name, text in zip(("base", "ours", "theirs"), sides, strict=True):
        (folder / name).write_text(text)
    command = ["git", "merge-file", "-p", "--diff3", "--marker-size=50", "ours", "base", "theirs"]
    merged = subprocess.run(command, cwd=folder, capture_output=True, check=False).stdout
    return find_resolution_problem(parse_conflicting_file(merged, 50), resolved.encode())


@pytest.mark.parametrize("case", ACCEPTED)
def test_resolution_with_both_sides_is_accepted(case: str, tmp_path: Path) -> None:
    """Between lines that both sides share."""
    base, ours, theirs, resolved = (f"{HEAD}{text}{TAIL}" for text in ACCEPTED[case])
    assert verify(tmp_path, (base, ours, theirs), resolved) is None


@pytest.mark.parametrize("case", REJECTED)
def test_wrong_resolution_is_rejected(case: str, tmp_path: Path) -> None:
    """Each drops or adds something."""
    base, ours, theirs, resolved = (f"{HEAD}{text}{TAIL}" for text in REJECTED[case])
    assert verify(tmp_path, (base, ours, theirs), resolved) is not None


@pytest.mark.parametrize("changed", [HEAD.replace("True", "False"), HEAD.partition("def")[0]], ids=["edit", "removal"])
def test_change_outside_the_conflict_is_rejected(changed: str, tmp_path: Path) -> None:
    """Also the removal of a test that both sides have."""
    sides = (f"{HEAD}{TAIL}", f"{HEAD}{ONE}{TAIL}", f"{HEAD}{OTHER}{TAIL}")
    assert verify(tmp_path, sides, f"{HEAD}{ONE}{OTHER}{TAIL}") is None
    assert verify(tmp_path, sides, f"{changed}{ONE}{OTHER}{TAIL}") is not None


def test_remaining_markers_are_rejected(tmp_path: Path) -> None:
    """The reason names them."""
    sides = (f"{HEAD}{TAIL}", f"{HEAD}{ONE}{TAIL}", f"{HEAD}{OTHER}{TAIL}")
    marked = f"{HEAD}<<<<<<< main\n{ONE}=======\n{OTHER}>>>>>>> task\n{TAIL}"
    assert verify(tmp_path, sides, marked) == "a conflict marker remains"


def test_several_conflicts_are_verified_one_by_one(tmp_path: Path) -> None:
    """A change dropped in one of them is found."""
    middle = "".join(f"line {number}\n" for number in range(20))
    sides = tuple(f"{text}{middle}{text}" for text in ("", ONE, OTHER))
    assert verify(tmp_path, (sides[0], sides[1], sides[2]), f"{ONE}{OTHER}{middle}{OTHER}{ONE}") is None
    assert verify(tmp_path, (sides[0], sides[1], sides[2]), f"{ONE}{OTHER}{middle}{OTHER}") is not None
