"""Plan expansion: the tasks of a plan, and how the board adds them during a run."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.scheduling.dispatch import DispatchBoard, DispatchEntry, with_subtasks
from orchestrator.domain.settings.names import check_name
from orchestrator.domain.settings.path_patterns import is_covered
from orchestrator.domain.workflow.expansion import ExpandedTask, expand_plan, make_task_name
from orchestrator.domain.workflow.violations import Violation


def plan(*tasks: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a plan as parsed by its kind."""
    return {"tasks": list(tasks), "dependencies": [], "timeline": [], "resources": [], **more}


def task(id_: str, **more: Any) -> dict[str, Any]:
    """Return one task of a plan."""
    return {"id": id_, "prompt": f"do {id_}", **more}


def parts(given: dict[str, Any], **options: Any) -> list[ExpandedTask]:
    """Return the expansion of a plan."""
    found = expand_plan(given, "p-", **{"limit": 9, "owns": (), "taken": (), **options})
    assert all(isinstance(one, ExpandedTask) for one in found), found
    return [one for one in found if isinstance(one, ExpandedTask)]


def rules(given: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    """Return the rules and positions that prevent an expansion."""
    found = expand_plan(given, "p-", **{"limit": 9, "owns": (), "taken": (), **options})
    return [(one.rule, one.location) for one in found if isinstance(one, Violation)]


def test_dependencies_of_both_kinds_become_needs() -> None:
    """Those inside a task and those of the whole plan."""
    given = plan(task("a"), task("b", dependencies=["a"]), task("c"), dependencies={"c": ["a", "b"]})
    assert [(one.id, one.needs) for one in parts(given)] == [
        ("p-a", ()),
        ("p-b", ("p-a",)),
        ("p-c", ("p-a", "p-b")),
    ]


def test_paths_are_those_of_the_plan_or_the_task() -> None:
    """If the planning task owns any; a subtask that names no paths inherits them."""
    given = plan(task("a", owns=["./src/a.py", "src/a.py"]), task("b"))
    assert [one.owns for one in parts(given, owns=("src/",))] == [("src/a.py",), ("src/",)]
    assert [one.owns for one in parts(given)] == [("src/a.py",), ()]


@pytest.mark.parametrize(
    ("given", "options", "expected"),
    [
        (plan(task("a"), task("b")), {"limit": 1}, [("expansion.limit", "tasks")]),
        (plan(task("a"), task("a")), {}, [("plan.ids", "tasks[1].id")]),
        (plan(task("a b"), task("a-b")), {}, [("expansion.names", "tasks[1].id")]),
        (plan(task("a")), {"taken": {"P-A"}}, [("expansion.names", "tasks[0].id")]),
        (plan(task("a", dependencies=["b"])), {}, [("plan.dependencies", "tasks[0].dependencies[0]")]),
        (plan(task("a", dependencies=["a"])), {}, [("plan.circle", "tasks")]),
        (plan(task("a", owns=["/etc/passwd"])), {}, [("expansion.paths", "tasks[0].owns[0]")]),
        (plan(task("a", owns=["a/../../b"])), {}, [("expansion.paths", "tasks[0].owns[0]")]),
        (plan(task("a", owns=[".git/config"])), {}, [("expansion.paths", "tasks[0].owns[0]")]),
        (plan(task("a", owns=["src/\x1b[31m"])), {}, [("expansion.paths", "tasks[0].owns[0]")]),
        (plan(task("a", owns=["docs/x"])), {"owns": ("src/",)}, [("expansion.paths", "tasks[0].owns[0]")]),
    ],
)
def test_violated_rule_has_its_position(
    given: dict[str, Any], options: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    """One violation prevents all subtasks."""
    found = rules(given, **options)
    assert [one for one in found if one in expected] == expected
    assert {rule for rule, _ in found} <= {rule for rule, _ in expected} | {"expansion.names"}


@pytest.mark.parametrize(
    "id_", ["a", "Add a login!", "ü", "..", "a..b", "x.lock", "-", "../../etc", "a/b", "x" * 100, "y" * 62, "a\nb"]
)
def test_plan_names_become_valid_names(id_: str) -> None:
    """The names are valid in a file."""
    assert check_name(make_task_name("p-", id_)).startswith("p-")


def test_truncated_names_stay_distinct() -> None:
    """A suffix is derived from the truncated part."""
    assert make_task_name("p-", "x" * 100 + "1") != make_task_name("p-", "x" * 100 + "2")


@pytest.mark.parametrize(
    ("pattern", "owned", "expected"),
    [
        ("src/a.py", ("src/a.py",), True),
        ("src/a.py", ("src/",), True),
        ("src/a.py", ("src/*.py",), True),
        ("src/a.py", ("lib/", "**/*.py"), True),
        ("src/*.py", ("src/*",), True),
        ("src/a*.py", ("src/*.py",), True),
        ("src/[ab].py", ("src/[a-c].py",), True),
        ("src/**/x", ("src/**",), True),
        ("src/", ("src/**",), True),
        ("src/**", ("src/",), True),
        ("src/", ("src/*.py",), False),
        ("src/*", ("src/*.py",), False),
        ("src/[a-d].py", ("src/[a-c].py",), False),
        ("**", ("src/**",), False),
        ("src2/a", ("src",), False),
        ("src/**/x", ("src/*/x",), False),
    ],
)
def test_path_within_the_owned_paths_is_accepted(pattern: str, owned: tuple[str, ...], expected: bool) -> None:
    """For each way to write the two paths."""
    assert is_covered(pattern, owned) is expected


def grown() -> DispatchBoard:
    """Return a board on which a running plan of two subtasks was just expanded, with one dependent."""
    board = DispatchBoard({"p": DispatchEntry(owns=("src/",)), "last": DispatchEntry(("p",)), "other": DispatchEntry()})
    assert board.choose_tasks(1, 0.0) == ["p"]
    board.add(
        {"p-a": DispatchEntry(owns=("src/a",)), "p-b": DispatchEntry(("p-a",), owns=("src/b",))},
        ["p", "p-a", "p-b", "last", "other"],
    )
    board.set_subtasks("p", ("p-a", "p-b"))
    board.wait("p", 0.0, keeps_paths=True)
    return board


def test_planning_task_continues_after_its_subtasks_landed() -> None:
    """Its dependents wait for it; its paths belong to the subtasks, which precede later tasks of the file."""
    board = grown()
    assert board.choose_tasks(9, 0.0) == ["p-a", "other"]
    board.landed("p-a")
    assert board.choose_tasks(9, 1.0) == ["p-b"]
    board.landed("p-b")
    assert board.choose_tasks(9, 1.0) == ["p"]
    board.landed("p")
    assert board.choose_tasks(9, 1.0) == ["last"]


def test_failed_subtask_blocks_the_planning_task_and_dependents() -> None:
    """Until it is retried."""
    board = grown()
    board.choose_tasks(9, 1.0)
    board.ended("p-a")
    assert board.blocked == {"p": "p-a", "p-b": "p-a", "last": "p"}
    board.retry("p-a")
    assert board.blocked == {}
    assert board.choose_tasks(9, 2.0) == ["p-a"]


def test_second_plan_does_not_wait_for_the_first() -> None:
    """Unlanded subtasks of the first plan are dropped."""
    board = grown()
    board.choose_tasks(9, 1.0)
    for one in ("p-a", "p-b", "p"):
        board.ended(one)
    board.set_subtasks("p", ())
    board.retry("p")
    assert board.choose_tasks(9, 2.0) == ["p"]
    board.landed("p")
    assert board.choose_tasks(9, 2.0) == ["last"]


def test_task_can_need_a_blocked_subtask() -> None:
    """The new task is also blocked."""
    board = DispatchBoard({"p": DispatchEntry(), "dead": DispatchEntry(), "last": DispatchEntry(("p",))})
    board.choose_tasks(1, 0.0)
    board.ended("dead")
    board.add({"p-a": DispatchEntry(("dead",))}, ["p", "p-a", "dead", "last"])
    board.set_subtasks("p", ("p-a",))
    board.wait("p", 0.0)
    assert board.blocked == {"p-a": "dead", "p": "p-a", "last": "p"}


def test_entries_have_the_subtasks_of_plans() -> None:
    entries = {"p": DispatchEntry(("x",)), "x": DispatchEntry(), "p-a": DispatchEntry()}
    documents = {"p": TaskDocument(subtasks=("p-a", "p-b")), "x": TaskDocument(), "p-a": TaskDocument()}
    found = with_subtasks(entries, documents)
    assert (found["p"].needs, found["p"].parts) == (("x", "p-a"), ("p-a",))
    assert with_subtasks(found, {**documents, "p": TaskDocument()})["p"] == DispatchEntry(("x",))
