"""Value rules of the file: durations, names, branches, plain scalars, dependency cycles."""

import subprocess
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.source.scalars import resolve_plain
from orchestrator.domain.scheduling.dependencies import find_cycles
from orchestrator.domain.settings.names import check_branch, check_name
from orchestrator.domain.settings.quantities import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("1ms", 0.001),
        ("2s", 2),
        ("30m", 1800),
        ("1h30m", 5400),
        ("2d", 172800),
        ("90m", 5400),
        ("1d1h1m1s1ms", 90061.001),
        ("30d", 2592000),
    ],
)
def test_duration_is_parsed(text: str, seconds: float) -> None:
    """A duration is the sum of its parts in seconds."""
    assert parse_duration(text) == pytest.approx(seconds)


@given(st.integers(1, 30 * 86_400_000))
def test_duration_is_formatted_as_parsed(milliseconds: int) -> None:
    """To the millisecond."""
    assert round(parse_duration(format_duration(milliseconds / 1000)) * 1000) == milliseconds


@pytest.mark.parametrize(
    "value",
    [
        "",
        "0s",
        "0ms",
        "30",
        "1.5h",
        "-1s",
        "+1s",
        "1m1h",
        "1 h",
        "1H",
        "s",
        "31d",
        "٣s",
        "1s\n",
        f"{'9' * 5000}s",
        30,
        1.5,
        0,
        -3,
        True,
        None,
        [],
        {},
    ],
)
def test_invalid_duration_is_rejected(value: Any) -> None:
    with pytest.raises(ValueError, match=r".+: .+"):
        parse_duration(value)


@pytest.mark.parametrize("name", ["a", "A-1", "0", "a.b_c-d", "x" * 64, "a.lockx"])
def test_name_is_accepted(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".a", "-a", "_a", "a.", "a..b", "a.lock", "a/b", "a b", "ä", "x" * 65, "a\n", "a~1", "a:b", "@"]
)
def test_invalid_name_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match="can't be a name: "):
        check_name(name)


BRANCHES = [
    "main",
    "a/b",
    "a.b",
    "a-b",
    "a@b",
    "a@",
    "@a",
    "ä/漢",
    "x{y",
    "a{b}c",
    "a#b",
    "a'b",
    "a.locks/b",
    "HEADS",
    "head",
    "a/HEAD",
    "a!b",
    "a%b",
    "HEAD",
    "-a",
    "a..b",
    "a@{b",
    ".a",
    "a/.b",
    "a.lock",
    "a.lock/b",
    "a//b",
    "a/",
    "/a",
    "a.",
    "a~b",
    "a^b",
    "a:b",
    "a?b",
    "a*b",
    "a[b",
    "a\\b",
    "..",
    "",
    "a b",
    "a\tb",
    "a\x01",
    "a\x7f",
    "a\n",
]


@pytest.mark.parametrize("name", BRANCHES)
def test_branch_rules_are_those_of_git(name: str) -> None:
    """Compared with `git check-ref-format --branch`."""
    asked = subprocess.run(["git", "check-ref-format", "--branch", name], capture_output=True, check=False)
    try:
        check_branch(name)
        taken = True
    except ValueError:
        taken = False
    assert taken == (asked.returncode == 0)


@pytest.mark.parametrize("name", ["refs/heads/main", "@"])
def test_branch_is_accepted(name: str) -> None:
    """Two names that git accepts are rejected: full refs and the alias of HEAD."""
    with pytest.raises(ValueError, match="can't be a branch"):
        check_branch(name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("Null", None),
        ("TRUE", True),
        ("false", False),
        ("tRUE", "tRUE"),
        ("-0", 0),
        ("+12", 12),
        ("010", 10),
        ("0o17", 15),
        ("0xfF", 255),
        ("0b1", "0b1"),
        ("1e3", 1000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        (".", "."),
        ("-", "-"),
        ("1_0", "1_0"),
        ("y", "y"),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_plain_word_is_accepted(text: str, value: Any) -> None:
    found = resolve_plain(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["9223372036854775808", "-9223372036854775808", "1e309", ".inf", "-.INF", ".nan"])
def test_unrepresentable_number_is_rejected(text: str) -> None:
    """JSON cannot carry them."""
    with pytest.raises(ValueError, match="this number is"):
        resolve_plain(text)


def test_circles_are_found() -> None:
    """One cycle per strongly connected group of tasks; tasks that only lead to a cycle are in none."""
    needs = {
        "in": ["a"],
        "a": ["b"],
        "b": ["c", "free"],
        "c": ["b", "a"],
        "x": ["y", "a"],
        "y": ["x"],
        "self": ["self"],
        "free": ["nobody"],
    }
    found = sorted(sorted(circle) for circle in find_cycles(needs))
    assert found == [["b", "c"], ["self"], ["x", "y"]]


def test_circle_behind_another_branch_is_found() -> None:
    """A second cycle through a task that precedes a found one."""
    needs = {"a": ["b", "d"], "b": ["c"], "c": ["b"], "d": ["a"]}
    assert [sorted(circle) for circle in find_cycles(needs)] == [["b", "c"], ["a", "d"]]


def test_circle_behind_a_circle_is_found() -> None:
    """A second cycle further along the same path."""
    needs = {"a": ["b"], "b": ["a", "c"], "c": ["d"], "d": ["c"]}
    assert [sorted(circle) for circle in find_cycles(needs)] == [["a", "b"], ["c", "d"]]


def test_chain_of_circles_takes_linear_time() -> None:
    """Each pair leads to the next one; a search that restarts after each found cycle takes a minute."""
    pairs = 20_000
    needs = {f"a{n}": [f"b{n}"] for n in range(pairs)} | {f"b{n}": [f"a{n + 1}", f"a{n}"] for n in range(pairs)}
    began = time.thread_time()
    assert find_cycles(needs) == [[f"a{n}", f"b{n}"] for n in reversed(range(pairs))]
    assert time.thread_time() - began < 2.0


def test_graph_without_circles_has_none() -> None:
    """A lattice with many paths takes linear time."""
    needs = {f"t{n}": [f"t{m}" for m in range(max(0, n - 20), n)] for n in range(5000)}
    assert find_cycles(needs) == []
