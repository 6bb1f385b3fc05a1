"""`council run --dry-run` validates a run and prints its plan; nothing is started or recorded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.core.run_source import load_run_config
from orchestrator.config.inline import InlineTasks
from orchestrator.plugins import Plugins
from tests.conftest import Repository
from tests.fingerprint import Fingerprint
from tests.unit.test_inline_task import TYPES

pytestmark = pytest.mark.extended_rest

TASKS: list[dict[str, Any]] = [
    {"id": "models", "prompt": "write src/m.txt m", "owns": ["src/**"]},
    {"id": "views", "prompt": "write src/app.py v", "owns": ["src/app.py"]},
    {"id": "docs", "prompt": "write d.txt d", "priority": 1, "checks": ["true"], "timeout": "90s"},
    {"id": "api", "prompt": "write a.txt a", "needs": ["models", "docs"]},
]


def _everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


async def test_dry_run_shows_what_would_run_and_where(repository: Repository) -> None:
    """Waves, dependents, programs, branches, checks and limits, as one object."""
    ended = repository.council(
        "run", str(repository.configure(TASKS, base="main", target="out")), "--dry-run", "--json"
    )
    plan = ended.result
    assert (ended.code, plan["status"], plan["exit"], plan["base"], plan["target"]) == (0, "planned", 0, "main", "out")
    assert plan["repository"] == str(repository.top)
    waves = [[task["id"] for task in wave["tasks"]] for wave in plan["waves"]]
    assert waves == [["docs", "models", "views"], ["api"]]
    assert ([wave["sessions"] for wave in plan["waves"]], plan["sessions"]) == ([2, 1], 2)
    tasks = {task["id"]: task for wave in plan["waves"] for task in wave["tasks"]}
    assert {name: task["waits_for"] for name, task in tasks.items() if task["waits_for"]} == {"views": "models"}
    assert {name: task["starts_from"] for name, task in tasks.items()} == {
        "docs": "main", "models": "out", "views": "out", "api": "out",
    }  # fmt: skip
    assert (tasks["docs"]["checks"], tasks["docs"]["timeout"], tasks["docs"]["attempts"]) == (["true"], 90.0, 3)
    assert Path(tasks["api"]["program"]).name.startswith("python")


async def test_task_is_planned_by_its_first_phase(repository: Repository) -> None:
    """Its adapter, program and limit are those of its first phase, if that has an adapter of its own."""
    path = repository.configure(
        [{"id": name, "prompt": "x", "workflow": "two"} for name in "abc"],
        workflows={"two": [{"plan": {"access": "read", "adapter": "slow"}}, {"build": {}}]},
    )
    config = json.loads(path.read_text())
    config["adapters"]["slow"] = {"use": "command", "argv": ["sh", "{prompt_file}"], "capacity": 1}
    path.write_text(json.dumps({**config, "defaults": {**config["defaults"], "adapter": "fake"}}))
    (wave,) = repository.council("run", str(path), "--dry-run", "--json").result["waves"]
    assert wave["sessions"] == 1
    assert {(one["adapter"], one["program"], *one["phases"]) for one in wave["tasks"]} == {
        ("slow", "sh", "plan", "build")
    }


async def test_dry_run_starts_and_records_nothing(repository: Repository) -> None:
    """The repository is unchanged to the byte, no project is created, and no ref keeps fetched objects."""
    config = repository.configure(TASKS)
    before = _everything(repository.top)
    assert repository.council("run", str(config), "--dry-run").code == 0
    assert _everything(repository.top) == before
    assert not repository.spawns.exists()
    [trusted] = Path(repository.environ["COUNCIL_HOME"]).glob("*/trusted.git")
    assert repository.git("-C", str(trusted), "for-each-ref") == ""
    assert not list(trusted.parent.glob("sessions/*"))


async def test_waves_match_a_real_run(repository: Repository) -> None:
    """A run of one session at a time starts tasks in the planned order."""
    config = repository.configure(TASKS, capacity=1)
    plan = repository.council("run", str(config), "--dry-run", "--json").result
    ended = repository.council("run", str(config), "--json")
    started = [line["task"] for line in ended.lines if line.get("event") == "task.started"]
    assert started == [task["id"] for wave in plan["waves"] for task in wave["tasks"]]
    await repository.assert_invariants()


def _dirty(repository: Repository) -> None:
    (repository.top / "README.md").write_text("changed\n")


def _lfs(repository: Repository) -> None:
    repository.commit({".gitattributes": "*.bin filter=lfs\n"})


def _own(repository: Repository) -> None:
    repository.commit({".council/state/x": "x\n"})


def _nothing(repository: Repository) -> None:
    pass


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("prepare", "settings"),
    [
        (_dirty, {}),
        (_lfs, {}),
        (_own, {}),
        (_nothing, {"base": "develop"}),
        (_nothing, {"target": "main/sub"}),
        (_nothing, {"repo": "/"}),
        (_nothing, {"adapters": {"x": {"use": "command", "argv": ["no-such-program"]}}}),
        (_nothing, {"session_memory": "1024TiB"}),
        (_nothing, {"worktrees": {"copy": [".env"]}}),
    ],
    ids=[
        "dirty target",
        "lfs",
        "own folder",
        "no base",
        "name taken",
        "no repository",
        "no program",
        "no room",
        "no source",
    ],
)
async def test_obstacles_of_a_run_are_rejected_equally(
    repository: Repository, prepare: Callable[[Repository], None], settings: dict[str, Any]
) -> None:
    """With and without --dry-run the error is the same, word for word."""
    prepare(repository)
    config = str(repository.configure(TASKS[:1], **settings))
    dry = repository.council("run", config, "--dry-run", "--json")
    ran = repository.council("run", config, "--json")
    assert (dry.code, dry.result["status"]) == (2, "refused"), dry
    assert _without_measures(dry.result) == _without_measures(ran.result)
    assert not repository.spawns.exists()


def _without_measures(result: dict[str, Any]) -> dict[str, Any]:
    return {
        key: re.sub(r"[0-9]+ MiB", "MiB", value) if isinstance(value, str) else value for key, value in result.items()
    }


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    "settings",
    [{"defaults": {"checks": ["no-such-tool --all"]}}, {"worktrees": {"setup": ["no-such-installer"]}}],
    ids=["check", "setup"],
)
def test_problems_match_the_doctor(repository: Repository, settings: dict[str, Any]) -> None:
    """With its exit code; the plan is printed all the same."""
    config = str(repository.configure(TASKS[:1], **settings))
    dry = repository.council("run", config, "--dry-run", "--json")
    found = repository.council("doctor", config, "--json").result["findings"]
    assert (dry.code, dry.result["exit"], dry.result["status"]) == (1, 1, "planned"), dry
    problems = [one for one in dry.result["findings"] if one["level"] == "problem"]
    assert problems == [one for one in found if one["level"] == "problem"] != []
    text = repository.council("run", config, "--dry-run").stdout
    assert text.startswith("1 task in 1 wave")
    assert problems[0]["message"][:40] in text


async def test_deferred_landing_is_allowed_on_request(repository: Repository) -> None:
    """--allow-deferred goes with --dry-run."""
    _dirty(repository)
    config = str(repository.configure(TASKS))
    before = Fingerprint.of(repository.top)
    assert repository.council("run", config, "--dry-run", "--allow-deferred").code == 0
    assert Fingerprint.of(repository.top) == before


async def test_text_shows_waves_and_a_tree(repository: Repository) -> None:
    """For people: equal settings are printed once, dependencies are drawn below each task."""
    text = repository.council("run", str(repository.configure(TASKS)), "--dry-run").stdout
    assert "4 tasks in 2 waves, up to 2 sessions at once" in text
    assert "  views   " in text
    assert "waits for models, which owns some of its paths" in " ".join(text.split())
    assert "  models\n  └─ api (needs models, docs)\n" in text


@pytest.mark.slow
async def test_ten_thousand_tasks_are_summarized(repository: Repository) -> None:
    """Text and chart stay readable, and both are printed within moments."""
    tasks = [
        {"id": f"t{number}", "prompt": "x", "needs": [f"t{number // 2}"] if number else []} for number in range(10_000)
    ]
    tasks[1]["needs"] = []
    tasks += [{"id": f"alone{number}", "prompt": "x"} for number in range(500)]
    config = str(repository.configure(tasks))
    text = repository.council("run", config, "--dry-run").stdout
    assert "10500 tasks in 14 waves" in text
    assert "  and 482 more\n" in text
    assert len(text.splitlines()) < 500
    assert max(map(len, text.splitlines())) < 300
    assert len(repository.council("run", config, "--dry-run", "--mermaid").stdout.splitlines()) < 1000


_NODE = re.compile(r'        (task[0-9]+|more[0-9]+)(?:\["([^"]*)"\]|\(\["([^"]*)"\]\))')
_EDGE = re.compile(r"    (task[0-9]+) (-->|-\.-) (task[0-9]+)")
_SUBGRAPH = re.compile(r'    subgraph (wave[0-9]+)\["wave [0-9]+"\]')


async def test_mermaid_chart_has_each_task_and_need(repository: Repository) -> None:
    """Every line is one of five forms; nodes are declared once, in a wave, before an edge names them."""
    tasks = [*TASKS, {"id": "end", "prompt": "x", "needs": ["api"]}, {"id": "a.b_c-d", "prompt": "x"}]
    chart = repository.council("run", str(repository.configure(tasks)), "--dry-run", "--mermaid").stdout
    first, *lines = chart.splitlines()
    assert first == "flowchart LR"
    nodes: dict[str, str] = {}
    edges: set[tuple[str, str, str]] = set()
    is_open = False
    for line in lines:
        if node := _NODE.fullmatch(line):
            assert is_open
            assert node[1] not in nodes
            nodes[node[1]] = node[2]
        elif edge := _EDGE.fullmatch(line):
            edges.add((nodes[edge[1]], edge[2], nodes[edge[3]]))
        else:
            assert line == "    end" if is_open else _SUBGRAPH.fullmatch(line), line
            is_open = not is_open
    assert sorted(nodes.values()) == sorted(task["id"] for task in tasks)
    assert edges == {
        ("models", "-->", "api"), ("docs", "-->", "api"), ("api", "-->", "end"), ("models", "-.-", "views"),
    }  # fmt: skip


async def test_incompatible_options_are_rejected(repository: Repository) -> None:
    """A chart is neither JSON nor a run; options can't repeat the file's keys."""
    config = str(repository.configure(TASKS))
    for options in (["--mermaid"], ["--dry-run", "--mermaid", "--json"], ["--adapter", "fake"], ["--check", "true"]):
        ended = repository.council("run", config, *options)
        assert (ended.code, ended.stdout) == (2, "")
        assert "--" in ended.stderr
    assert not repository.spawns.exists()


@pytest.mark.extended
async def test_inline_tasks_use_the_adapters_of_the_found_file(repository: Repository) -> None:
    """council.yaml at the top of the repository provides all but its tasks, from any folder in it."""
    config = repository.configure(TASKS)
    written = {**json.loads(config.read_text()), "repo": "."}
    (repository.top / "council.yaml").write_text(json.dumps(written))
    (repository.top / "sub").mkdir()
    inner = Repository(repository.top / "sub", repository.environ, repository.spawns)
    ended = inner.council(
        "run", "--task", "write one.txt 1", "--task", "write two.txt 2", "--check", "test -e one.txt -o -e two.txt",
        "--target", "out", "--allow-failing-base", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended
    assert ended.states == {"task-1": "landed", "task-2": "landed"}
    assert ended.result["target"] == "out"
    assert repository.git("show", "out:one.txt", "out:two.txt") == "1\n2"
    plan = inner.council("run", "--dry-run", "--json").result
    assert [len(wave["tasks"]) for wave in plan["waves"]] == [3, 1]


async def test_dry_run_without_a_file_uses_the_current_repository(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work starts from the checked-out branch; from main if HEAD is detached."""
    monkeypatch.setattr("orchestrator.cli.core.run_source.load_plugins", lambda *_: Plugins(adapters=dict(TYPES)))
    (repository.top / "sub").mkdir()
    monkeypatch.chdir(repository.top / "sub")
    repository.git("checkout", "--quiet", "-b", "work")
    _, config = await load_run_config(None, InlineTasks(("Do it.",), adapter="free"))
    assert (config.repo, config.base, config.target) == (str(repository.top), "work", None)
    _, config = await load_run_config(None, InlineTasks(("Do it.",), adapter="free", base="main"))
    assert config.base == "main"
    repository.git("checkout", "--quiet", "--detach")
    _, config = await load_run_config(None, InlineTasks(("Do it.",), adapter="free"))
    assert config.base == "main"


@pytest.mark.extended
async def test_open_items_of_trackers_are_shown_and_not_updated(repository: Repository, tmp_path: Path) -> None:
    """Also if the file has no tasks of its own; no items at all are rejected as for a run."""
    todo = tmp_path / "todo.md"
    todo.write_text("- [ ] write one.txt 1\n- [x] write never.txt 1\n")
    trackers = {"todo": {"use": "checklist", "file": "todo.md"}}
    config = repository.configure([], trackers=trackers)
    ended = repository.council("run", str(config), "--dry-run", "--json")
    assert [task["id"] for wave in ended.result["waves"] for task in wave["tasks"]] == ["write-one-txt-1"], ended
    assert todo.read_text().startswith("- [ ]")
    todo.write_text("nothing\n")
    refused = repository.council("run", str(config), "--dry-run", "--json")
    assert (refused.code, refused.result["error"]) == (2, "nothing to do: no open task in 'todo'")


async def test_dry_run_without_a_file_lists_the_possible_adapters(repository: Repository) -> None:
    """Neither a file nor an adapter that works without options."""
    for options, fragment in (
        ([], "there is no council.yaml in"),
        (["--task", "write a.txt a"], "no supported CLI is on PATH"),
        (["--task", "write a.txt a", "--adapter", "command"], "'command' needs options"),
    ):
        ended = repository.council("run", *options, "--json")
        assert (ended.code, ended.result["status"]) == (2, "refused")
        assert fragment in ended.result["error"]
        assert ended.result["remedy"]


async def test_tasks_of_trackers_are_included(repository: Repository) -> None:
    """Trackers are queried as by a run; one without open items is reported."""
    todo = repository.top.parent / "todo.md"
    todo.write_text("- [ ] Add a help text. {#help}\n")
    path = repository.configure([], trackers={"todo": {"use": "checklist", "file": str(todo)}})
    plan = repository.council("run", str(path), "--dry-run", "--json").result
    assert [[task["id"] for task in wave["tasks"]] for wave in plan["waves"]] == [["help"]]
    todo.write_text("- [x] Add a help text. {#help}\n")
    ended = repository.council("run", str(path), "--dry-run", "--json")
    assert (ended.code, ended.result["status"]) == (2, "refused")
    assert "nothing to do" in ended.result["error"]
