"""Path patterns compared with brute force over a small alphabet."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain.settings.path_patterns import check_pattern, has_any_overlap, has_overlap, is_match
from tests.hypothesis_settings import example_settings

SEGMENTS = ["".join(text) for size in (1, 2, 3) for text in itertools.product("ab", repeat=size)]
PATHS = ["/".join(segments) for size in (1, 2, 3) for segments in itertools.product(SEGMENTS, repeat=size)]

pieces = st.sampled_from(["a", "b", "*", "?", "[a]", "[!a]", "[a-b]"])
segment = st.one_of(
    st.just("**"), st.lists(pieces, min_size=1, max_size=2).map("".join).filter(lambda s: "**" not in s)
)
patterns = st.builds(
    lambda segments, folder: "/".join(segments) + folder,
    st.lists(segment, min_size=1, max_size=2),
    st.sampled_from(["", "/"]),
)


def plainly(pattern: str) -> re.Pattern[str]:
    """Return a pattern as a regular expression, translated naively."""
    whole = pattern.endswith("/") or not re.search(r"[*?\[]", pattern)
    parts = []
    for one in pattern.rstrip("/").split("/"):
        body = one.replace("[!", "[^").replace("?", "[^/]").replace("*", "[^/]*")
        parts.append("(/[^/]+)*" if one == "**" else f"/(?=[^/]){body}")
    return re.compile("".join(parts) + ("(/[^/]+)*" if whole else ""))


@example_settings(300)
@given(patterns, st.sampled_from(PATHS))
def test_pattern_matches_like_a_regular_expression(pattern: str, path: str) -> None:
    """As does its overlap with a literal path."""
    expected = plainly(pattern).fullmatch(f"/{path}") is not None
    assert is_match(pattern, path) is expected
    # A pattern that is a path also owns everything below.
    assert has_overlap(pattern, path) is (
        expected or any(plainly(pattern).fullmatch(f"/{path}/{more}") for more in PATHS)
    )


@example_settings(120)
@given(patterns, patterns)
def test_overlap_agrees_with_brute_force(left: str, right: str) -> None:
    """Two patterns overlap exactly if one path matches both; the paths are long enough for every meeting point."""
    a, b = plainly(left), plainly(right)
    expected = any(a.fullmatch(f"/{path}") and b.fullmatch(f"/{path}") for path in PATHS + [f"{p}/a" for p in PATHS])
    assert has_overlap(left, right) is has_overlap(right, left) is expected


def test_many_stars_are_matched_quickly() -> None:
    """The comparison is not exponential."""
    began = time.perf_counter()
    assert not has_overlap("*a" * 60 + "b", "*a" * 60 + "c")
    assert not is_match("/".join(["**", "a"] * 40) + "/b", "/".join(["a"] * 80))
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("src/api/**", ["src/api/x", "src/api/x/y"], ["src/apis", "src", "src/x/api"]),
        ("docs/*.md", ["docs/a.md", "docs/.md"], ["docs/a/b.md", "docs/a.mdx"]),
        ("src/models.py", ["src/models.py", "src/models.py/x"], ["src/models_py", "models.py"]),
        ("src/", ["src/a", "src/a/b"], ["srcs/a", "a/src/b"]),
        ("**/test_*.py", ["test_a.py", "a/b/test_.py"], ["a/tests.py", "test_a.py/x"]),
        ("[a-c]?.[!x]", ["bz.y", "aé.é"], ["dz.y", "bz.x", "b.y"]),
        ("[]a]", ["]", "a"], ["b"]),
        ("[[]*", ["[", "[x"], ["x"]),
        ("a/**/b", ["a/b", "a/x/y/b"], ["a/x", "ab"]),
    ],
)
def test_pattern_names_its_paths(pattern: str, inside: list[str], outside: list[str]) -> None:
    """The matching rules, by examples."""
    assert [path for path in inside if not is_match(pattern, path)] == []
    assert [path for path in outside if is_match(pattern, path)] == []


@pytest.mark.parametrize(
    ("left", "right", "meet"),
    [
        ("src", "src/**", True),
        ("src/", "src/a/*.py", True),
        ("src/*.py", "src/a.*", True),
        ("src/*.py", "src/*.md", False),
        ("**/a", "b/**", True),
        ("*", "a/b", False),
        ("[a-c]", "[!abc]", False),
        ("[a-d]", "[!abc]", True),
    ],
)
def test_overlapping_patterns_are_found(left: str, right: str, meet: bool) -> None:
    """In either order."""
    assert has_overlap(left, right) is has_overlap(right, left) is has_any_overlap(["zzz", left], [right]) is meet


@pytest.mark.parametrize("text", ["", "/a", "../a", "a/../b", "./a", "a//b", "/", "a\\b", "a\0", "a**", "[a", "[z-a]"])
def test_invalid_pattern_is_rejected_with_a_remedy(text: str) -> None:
    """The error has the mistake and, after a colon, the fix."""
    with pytest.raises(ValueError, match=r".+: .+"):
        check_pattern(text)
