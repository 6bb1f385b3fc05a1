"""Any plan becomes valid tasks or gets violations; paths stay within those of the plan."""

from __future__ import annotations

import re

from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.domain.scheduling.dependencies import find_cycles
from orchestrator.domain.scheduling.dispatch import DispatchBoard, DispatchEntry
from orchestrator.domain.settings.names import check_name
from orchestrator.domain.settings.path_patterns import check_pattern, is_covered, is_match
from orchestrator.domain.workflow.expansion import ExpandedTask, expand_plan

IDS = st.one_of(st.sampled_from(["a", "b", "c", "A", "a b", "d.lock"]), st.text(min_size=1, max_size=80))
PATHS = st.sampled_from(["src/a.py", "src/", "src/**", "docs/*.md", "/etc", "../x", "src/[ab]", "**", "x\\y", ".git/x"])
PATTERNS = st.text("ab*?/", min_size=1, max_size=7)


@st.composite
def tasks(draw: st.DrawFn) -> list[dict[str, object]]:
    """Draw the tasks of a plan, most of them compatible."""
    ids = draw(st.lists(IDS, min_size=1, max_size=6))
    return [
        {
            "id": one,
            "prompt": "do it",
            "dependencies": draw(st.lists(st.sampled_from(ids), max_size=2)),
            "owns": draw(st.lists(PATHS, max_size=2)),
        }
        for one in ids
    ]


@given(tasks(), st.sampled_from([(), ("src/",), ("**",)]), st.sets(st.sampled_from(["p-a", "P-B", "q"])))
def test_expanded_plan_is_a_valid_run(drawn: list[dict[str, object]], owns: tuple[str, ...], taken: set[str]) -> None:
    """Names, needs, paths and count are valid in a file; else every mistake has a position and a fix."""
    assume(all(str(one["id"]).strip() for one in drawn))
    plan = {"tasks": drawn, "dependencies": [], "timeline": [], "resources": []}
    found = expand_plan(plan, "p-", limit=5, owns=owns, taken=taken)
    assert found
    parts = [one for one in found if isinstance(one, ExpandedTask)]
    if not parts:
        assert all(str(one) for one in found)
        return
    assert len(parts) == len(found) == len(drawn) <= 5
    names = [check_name(one.id) for one in parts]
    folded = [name.casefold() for name in names]
    assert len(set(folded)) == len(folded)
    assert not set(folded) & {one.casefold() for one in taken}
    assert all(name.startswith("p-") for name in names)
    needs = {one.id: one.needs for one in parts}
    assert not find_cycles(needs)
    assert {need for each in needs.values() for need in each} <= set(names)
    for one in parts:
        assert all(not owns or is_covered(check_pattern(path), owns) for path in one.owns)


@given(PATTERNS, PATTERNS, st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3))
def test_subtask_paths_stay_within_the_plan(inner: str, outer: str, parts: list[str]) -> None:
    """Except below a path without wildcards, which counts as a file."""
    path = "/".join(parts)
    try:
        check_pattern(inner), check_pattern(outer)
    except ValueError:
        return
    if is_covered(inner, (outer,)) and is_match(inner, path):
        is_below_a_file = re.search(r"[*?\[]", inner) is None and path != inner
        assert is_match(outer, path) or is_below_a_file


@given(st.lists(st.sampled_from(["land", "fail", "retry", "plan"]), max_size=20), st.integers(1, 3))
def test_board_extended_by_a_plan_equals_a_new_board(steps: list[str], size: int) -> None:
    """After any events the dependencies are as if the subtasks had existed from the start."""
    names = [f"p-{one}" for one in range(size)]
    chain = {name: DispatchEntry(tuple(names[place - 1 : place])) for place, name in enumerate(names)}
    board = DispatchBoard({"p": DispatchEntry(), "last": DispatchEntry(("p",))})
    board.choose_tasks(9, 0.0)
    board.add(chain, ["p", *names, "last"])
    board.set_subtasks("p", names)
    board.wait("p", 0.0)
    whole = DispatchBoard(
        {"p": DispatchEntry(tuple(names), parts=tuple(names)), **chain, "last": DispatchEntry(("p",))}
    )
    running, failed = list[str](), list[str]()
    for step in steps:
        begun = board.choose_tasks(9, 1.0)
        assert begun == whole.choose_tasks(9, 1.0)
        running += begun
        if step in {"land", "fail"} and running:
            task = running.pop()
            for one in (board, whole):
                one.landed(task) if step == "land" else one.ended(task)
            failed += [task] if step == "fail" else []
        elif step == "retry" and failed:
            task = failed.pop()
            board.retry(task)
            whole.retry(task)
        assert board.blocked == whole.blocked
