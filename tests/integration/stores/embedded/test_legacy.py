"""Older state layouts are imported once, whatever they contain, and are shown like current state."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.api.council import Council
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.engine.reports.report import RunReport
from orchestrator.errors import RefusedError
from orchestrator.project import LEGACY_FILE, LEGACY_RECORD, LEGACY_TREE
from orchestrator.protocols import Key
from orchestrator.state.legacy import files
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.conftest import Repository
from tests.sandboxes import needs_sandbox

pytestmark = pytest.mark.extended_rest

GUIDE = (Path(__file__).parents[4] / "docs/state.md").read_text()
SECTION = GUIDE.partition("\n## State in earlier formats\n")[2].partition("\n## ")[0]
RUN = "2024-06-17-001"
#: As written by the module of version 2.0.
SESSION: dict[str, Any] = {
    "id": RUN,
    "status": "active",
    "started_at": "2024-06-17T10:00:00Z",
    "updated_at": "2024-06-17T10:30:00Z",
    "options": {"max_parallel": 3, "base_branch": "develop"},
    "invented_by": {"nobody": [1, None, "x"]},
    "tasks": {
        "login": {
            "status": "completed",
            "branch": "feature/login",
            "worktree": ".worktrees/login",
            "pr_number": 12,
            "phases": {"plan": {"status": "completed"}, "build": {"status": "in_progress", "note": "n"}},
            "metrics": {"files": 4},
            "started_at": "2024-06-17T10:00:00Z",
            "completed_at": "2024-06-17T10:20:00Z",
        },
        "search": {
            "status": "completed",
            "started_at": "2024-06-17T10:00:00+00:00",
            "completed_at": "2024-06-17T12:10:00+02:00",
        },
        "export": {"status": "failed", "error": "tests failed", "extra": "kept"},
        "import": {"status": "in_progress", "started_at": "2024-06-17T10:25:00Z"},
        "later": {"status": "pending"},
    },
    "metrics": {"total_tasks": 5, "completed": 2, "in_progress": 1, "failed": 1, "average_time_minutes": 15},
}
STATE = {"version": "2.0", "sessions": [SESSION]}
STATES = {"login": "landed", "search": "landed", "export": "failed", "import": "cancelled", "later": "cancelled"}


def write(repository: Repository, name: str, content: object) -> Path:
    """Write a file in an earlier state format: JSON, or text unchanged."""
    path = repository.top / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def write_tree(repository: Repository) -> None:
    """Write a folder as the module of that layout described it."""
    session = {
        "id": "tree-1", "status": "active", "started_at": "2024-07-01T08:00:00Z", "options": {"depth": 1},
        "task_ids": ["a", "b"], "metrics": {"total_tasks": 2, "completed": 0, "in_progress": 0, "failed": 0},
    }  # fmt: skip
    a = {"task_id": "a", "version": 3, "updated_at": "2024-07-01T09:00:00Z", "status": "completed",
         "started_at": 1719820800, "completed_at": 1719824400000}  # fmt: skip
    write(repository, f"{LEGACY_TREE}/sessions/tree-1.json", session)
    write(repository, f"{LEGACY_TREE}/tasks/task-a/state.json", a)
    write(repository, f"{LEGACY_TREE}/tasks/task-b/state.json", {"task_id": "b", "version": 1, "status": "failed"})
    checkpoint = {"id": "c1", "session_id": "tree-1", "timestamp": "2024-07-01T08:30:00Z", "session_state": session,
                  "task_states": {"a": {**a, "status": "in_progress"}}}  # fmt: skip
    write(repository, f"{LEGACY_TREE}/checkpoints/c1.json", checkpoint)


def originals(repository: Repository) -> dict[str, tuple[bytes, int]]:
    """Return contents and modification times of the files of earlier state formats."""
    found = (path for path in (repository.top / ".worktrees").rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


async def runs(repository: Repository) -> dict[str, RunReport]:
    """Open the project as commands do, and return its runs."""
    async with Council.open(repository.top, environ=repository.environ) as council:
        return {one.run: one for one in await council.runs.list()}


def states(run: RunReport) -> dict[str, str]:
    """Return the state of each task of a run."""
    return {task.id: task.status for task in run.tasks}


async def events(repository: Repository, kind: str) -> list[dict[str, Any]]:
    """Return the events of a type in the log."""
    async with Council.open(repository.top, environ=repository.environ) as council:
        records = [one async for one in council.history.commits(until=await council.history.position())]
        return [event.data for record in records for event in record.events if event.type == kind]


async def imported(repository: Repository) -> Sequence[str]:
    """Open the project, and return the notices printed about imports."""
    async with Council.open(repository.top, environ=repository.environ) as council:
        return council.notices


async def kept(repository: Repository, kind: str) -> dict[str, dict[str, Any]]:
    """Return the values of the documents of a kind, by id."""
    async with FileStore.open(repository.log, SystemClock()) as store:
        return {one.key.id: one.value for one in await store.list(kind)}


async def test_version_2_file_is_imported_as_runs(repository: Repository) -> None:
    """With tasks, times and metrics; free text is marked as such, and the file stays unchanged."""
    write(repository, LEGACY_FILE, STATE)
    before = originals(repository)
    first = repository.council("runs")
    assert first.code == 0, first
    assert re.fullmatch(r"Imported 1 run with 5 tasks from \S+, which are unchanged: .*\n", first.stderr)
    landed = f"2 of 5 landed on develop (imported from {LEGACY_FILE})"
    assert (
        first.stdout.split() == f"{RUN} incomplete {landed}, 2 cancelled, 1 failed, average time to land 15:00".split()
    )
    assert repository.council("runs").stderr == ""
    assert originals(repository) == before
    assert repository.git("status", "--porcelain", "--", ".council") == ""
    run = repository.council("runs", "--json").result["runs"][0]
    assert (run["status"], run["imported"]) == ("incomplete", LEGACY_FILE)
    assert {task["id"]: task["status"] for task in run["tasks"]} == STATES
    reasons = {task["id"]: task["reason"] for task in run["tasks"]}
    assert reasons["login"] == f"{LEGACY_FILE} records it as completed, without proof"
    assert reasons["export"] == "tests failed"
    assert "was in_progress" in reasons["import"]
    assert (run["metrics"]["total_tasks"], run["metrics"]["completed"]) == (5, 2)
    assert run["metrics"]["average_time_minutes"] == SESSION["metrics"]["average_time_minutes"]


async def test_imported_run_is_shown(repository: Repository) -> None:
    """Options, branch, worktree, pull request and phases are kept, and unknown fields are kept next to them."""
    write(repository, LEGACY_FILE, STATE)
    shown = repository.council("state", "show", RUN, "--json").result
    assert (shown["options"], shown["started"], shown["ended"]) == (SESSION["options"], 1718618400.0, 1718620200.0)
    assert shown["imported"] == {"source": LEGACY_FILE, "status": "active", "metrics": SESSION["metrics"]}
    login = next(task for task in shown["tasks"] if task["id"] == "login")
    assert (login["branch"], login["worktree"], login["pull_request"]) == ("feature/login", ".worktrees/login", 12)
    assert [(one["name"], one["status"]) for one in login["phases"]] == [
        ("plan", "completed"),
        ("build", "in_progress"),
    ]
    assert login["time_minutes"] == 20
    assert [one["event"] for one in shown["events"]] == ["run.imported"]
    text = repository.council("state", "show", RUN).stdout
    for part in ("max_parallel", "feature/login", "pull request 12", "plan completed, build in progress", "20:00"):
        assert part in text
    fields = {name.removeprefix(RUN): one["fields"] for name, one in (await kept(repository, "imported")).items()}
    assert fields.pop("") == {name: value for name, value in SESSION.items() if name != "tasks"}
    assert {name.removeprefix("/"): value for name, value in fields.items()} == SESSION["tasks"]
    history = repository.council("state", "history", "task/login").stdout
    assert "version 1 " in history
    assert "run.imported" in history


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (
            {"version": 1, "sessions": {"one": {"tasks": {"a": "done", "b": "running"}}}},
            {"one": {"a": "landed", "b": "cancelled"}},
        ),
        (
            {"id": "alone", "startedAt": 1718618400, "tasks": [{"name": "a", "status": "Completed"}, "b"]},
            {"alone": {"a": "landed", "b": "cancelled"}},
        ),
        (
            {"version": "1.0", "session_id": 5, "tasks": {"a": {"status": "FAILED"}, "b": None}},
            {"5": {"a": "failed", "b": "cancelled"}},
        ),
        ([{"id": "x", "tasks": {}}, {"id": "x", "tasks": {"a": {}}}], {"x": {}, "x-2": {"a": "cancelled"}}),
        ({"version": "2.0", "sessions": []}, {}),
    ],
)  # fmt: skip
async def test_older_versions_are_imported(
    repository: Repository, state: object, expected: dict[str, dict[str, str]]
) -> None:
    """Sessions and tasks as lists or by id, one session as the whole file, statuses in any case."""
    write(repository, LEGACY_FILE, state)
    assert {run: states(one) for run, one in (await runs(repository)).items()} == expected
    assert await events(repository, "legacy.file_skipped") == []


async def test_statuses_are_mapped_as_documented(repository: Repository) -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*|anything else) \| `(\w+)`[^|]*\|$", SECTION, re.MULTILINE)
    expected = {word: ours for words, ours in rows for word in re.findall(r"`(\w+)`", words) or ["whatever"]}
    assert expected.keys() > {"pending", "in_progress", "completed", "failed", "active", "initialized", "whatever"}
    write(repository, LEGACY_FILE, {"sessions": [{"id": "s", "tasks": {word: word for word in expected}}]})
    assert states((await runs(repository))["s"]) == expected


async def test_folder_and_file_are_both_imported_as_runs(repository: Repository) -> None:
    """Tasks have their own states; a session in both layouts is one run, with the data of the folder."""
    write_tree(repository)
    write(repository, f"{LEGACY_TREE}/sessions/{RUN}.json", {"id": RUN, "status": "completed", "task_ids": ["later"]})
    write(
        repository,
        f"{LEGACY_TREE}/tasks/task-later/state.json",
        {"task_id": "later", "version": 2, "status": "completed"},
    )
    write(repository, f"{LEGACY_TREE}/tasks/task-alone/state.json", {"version": 1, "status": "failed"})
    write(repository, LEGACY_FILE, STATE)
    found = await runs(repository)
    assert {run: states(one) for run, one in found.items()} == {
        RUN: {**STATES, "later": "landed"},
        "tree-1": {"a": "landed", "b": "failed"},
        "tasks-without-session": {"alone": "failed"},
    }
    assert found["tree-1"].imported == f"{LEGACY_TREE}/sessions/tree-1.json"
    [imported] = await events(repository, "legacy.imported")
    assert (imported["sources"], imported["tasks"]) == ([LEGACY_FILE, LEGACY_TREE], 8)
    record = (await kept(repository, LEGACY_RECORD.kind))[LEGACY_RECORD.id]
    assert [(one["path"], one["files"], one["version"]) for one in record["sources"]] == [
        (LEGACY_FILE, 1, "2.0"), (LEGACY_TREE, 6, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content", ["", "{", '{"version": "2.0", "sess', "[1]", '{"sessions": 3}', "\ud800", "[" * 5000]
)
async def test_damaged_files_are_set_aside_and_the_rest_imported(repository: Repository, content: str) -> None:
    (repository.top / ".worktrees").mkdir()
    path = repository.top / LEGACY_FILE
    path.write_bytes(content.encode(errors="surrogatepass"))
    write_tree(repository)
    [reported, problem] = await imported(repository)
    assert reported.startswith("Imported 1 run with 2 tasks")
    assert problem.startswith(f"Not imported completely: {LEGACY_FILE}: ")
    [event] = await events(repository, "legacy.file_skipped")
    assert (repository.top / event["copy"]).read_bytes() == path.read_bytes()
    assert f"a copy is in {event['copy']}" in problem
    assert (repository.top / event["copy"]).stat().st_mode & 0o777 == 0o600
    assert not await imported(repository)


async def test_damaged_parts_of_a_folder_are_recovered(repository: Repository) -> None:
    """A task from its newest readable version, a session from its newest readable checkpoint."""
    write_tree(repository)
    write(repository, f"{LEGACY_TREE}/tasks/task-b/state.json", "{")
    for number, content in ((2, {"status": "failed"}), (9, {"status": "completed"}), (10, "{")):
        write(repository, f"{LEGACY_TREE}/tasks/task-b/history/v{number}.json", content)
    write(repository, f"{LEGACY_TREE}/sessions/tree-1.json", "{")
    write(repository, f"{LEGACY_TREE}/sessions/other.json", "[]")
    assert {run: states(one) for run, one in (await runs(repository)).items()} == {
        "tree-1": {"a": "landed", "b": "landed"}
    }
    reported = {
        one["path"].removeprefix(f"{LEGACY_TREE}/"): one["reason"]
        for one in await events(repository, "legacy.file_skipped")
    }
    assert reported.keys() == {"tasks/task-b/state.json", "sessions/tree-1.json", "sessions/other.json"}
    assert "version 9 from its history" in reported["tasks/task-b/state.json"]


async def test_sessions_next_to_unknown_files_are_imported(repository: Repository) -> None:
    """All in one file; the report names each defect."""
    state = {"sessions": [SESSION, 7, {"id": "odd", "tasks": {"a": [], "b": {"status": "failed"}}}]}
    write(repository, LEGACY_FILE, state)
    found = await runs(repository)
    assert (set(found), states(found["odd"])) == ({RUN, "odd"}, {"b": "failed"})
    [event] = await events(repository, "legacy.file_skipped")
    assert event["reason"] == "session-2 is not an object; task a of odd is not an object"


async def test_names_times_and_values_may_be_anything(repository: Repository, tmp_path: Path) -> None:
    """Names are made valid for keys and paths; values too deep or too large are reported as omitted."""
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    tasks = {
        "../../x": {"status": "done", "phases": deep},
        "": {"pr": "https://example.org/pull/3/"},
        "é\x1b": {"blob": "x" * (2 << 20)},
    }
    session = {
        "id": "../all",
        "started_at": "3024-01-01T00:00:00Z",
        "updated_at": True,
        "tasks": tasks,
        "options": {"a": deep},
    }
    write(repository, LEGACY_FILE, {"sessions": [session, {"id": "all"}]})
    found = await runs(repository)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) for name in found), found.keys()
    assert all(one != "all" and ".." not in one for one in found)
    for run in found.values():
        assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) for name in states(run))
    omitted = [one["omitted"] for one in (await kept(repository, "imported")).values() if "omitted" in one]
    assert sum("deep" in one for one in omitted) == 2
    assert sum("bytes" in one for one in omitted) == 1
    assert not (tmp_path / "x").exists()


async def test_links_out_of_the_project_are_not_followed(repository: Repository, tmp_path: Path) -> None:
    """Neither links to files nor to folders; a pipe does not block."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "state.json").write_text(json.dumps(STATE))
    write_tree(repository)
    (repository.top / LEGACY_FILE).symlink_to(outside / "state.json")
    (repository.top / LEGACY_TREE / "sessions/more.json").symlink_to(outside / "state.json")
    os.mkfifo(repository.top / LEGACY_TREE / "sessions/pipe.json")
    (repository.top / LEGACY_TREE / "tasks/task-c").symlink_to(outside)
    assert (await runs(repository)).keys() == {"tree-1"}
    reported = [(one["path"], one["reason"], one["copy"]) for one in await events(repository, "legacy.file_skipped")]
    assert sorted(reported) == [
        (LEGACY_FILE, "a link leads out of the project", None),
        (f"{LEGACY_TREE}/sessions/more.json", "a link leads out of the project", None),
        (f"{LEGACY_TREE}/sessions/pipe.json", "not a regular file", None),
        (f"{LEGACY_TREE}/tasks/task-c/state.json", "a link leads out of the project", None),
    ]


async def test_damaged_import_record_stops_no_command(repository: Repository) -> None:
    """Its content is unknown: nothing is imported twice, and the state can be inspected and repaired."""
    write(repository, LEGACY_FILE, STATE)
    await imported(repository)
    (log,) = (repository.top / ".council/state").glob("*/*.jsonl")
    data = log.read_bytes()
    log.write_bytes(data.replace(b'"is_complete":true', b'"is_complete":trUe', 1))
    (repository.top / ".council/state/snapshot").unlink(missing_ok=True)
    verified = repository.council("state", "verify", "--json")
    assert (verified.code, verified.result["is_valid"]) == (1, False)
    assert str(LEGACY_RECORD) in verified.result["damaged"]
    assert repository.council("state", "verify", "--repair").code == 0
    assert repository.council("runs", "--json").code == 0
    assert await events(repository, "legacy.imported") == []


async def test_import_is_limited_to_the_first_entries(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions, tasks, bytes per file, entries per folder; the omissions are reported, in full for a few files."""
    monkeypatch.setattr(files, "MAX_SESSIONS", 3)
    monkeypatch.setattr(files, "MAX_TASKS", 2)
    monkeypatch.setattr(files, "MAX_FILES", 30)
    monkeypatch.setattr(files, "MAX_FILE", 600)
    few: list[dict[str, Any]] = [{"id": "a", "tasks": {"1": {}}}, {"id": "b", "tasks": {"1": {}, "2": {}}}, {"id": "c"}]
    write(repository, LEGACY_FILE, {"sessions": [*few, {"id": "d"}]})
    for number in range(40):
        write(repository, f"{LEGACY_TREE}/tasks/task-{number:02}/state.json", " " * 601)
    reported = await imported(repository)
    assert (await runs(repository)).keys() == {"a", "c"}
    reasons = [one["reason"] for one in await events(repository, "legacy.file_skipped")]
    assert len(reasons) == 33
    assert {"only the first 3 of 4 sessions were imported", "only the first 30 of 40 entries were read"} < set(reasons)
    assert {"it has 601 bytes (limit: 600)", "session b has too many tasks, 2"} < set(reasons)
    assert reported[-1] == "13 more files were not imported completely: see `council state log`."


@pytest.mark.extended
async def test_killed_import_has_the_same_result(repository: Repository) -> None:
    """An import in several commits has the same result, and a run appears with the last of its documents."""
    tasks = {f"t{number}": {"status": "completed", "note": "x" * 9000} for number in range(1200)}
    write(repository, LEGACY_FILE, {"sessions": [{"id": "large", "tasks": tasks}, SESSION]})
    assert repository.council("runs", failpoints="legacy.begun=kill").code == -signal.SIGKILL
    async with FileStore.open(repository.log, SystemClock()) as store:
        assert not await store.list("run")
        assert await store.list("task", "large/") != []
    assert repository.council("runs", failpoints="legacy.begun=kill@2").code == -signal.SIGKILL
    found = await runs(repository)
    assert (set(found), len(found["large"].tasks)) == ({"large", RUN}, 1200)
    async with FileStore.open(repository.log, SystemClock()) as store:
        documents = [*await store.list("task"), *await store.list("imported"), *await store.list("run")]
        assert {one.version for one in documents} == {1}
        assert len(documents) == 2 * 1205 + 4
    assert [one["run"] for one in await events(repository, "run.imported")] == ["large", RUN]
    assert len(await events(repository, "legacy.imported")) == 1


async def test_existing_state_imports_nothing(repository: Repository) -> None:
    """Nor are imported files imported again after their documents were changed or deleted."""
    path = repository.configure([{"id": "a", "prompt": "write a.txt a"}])
    assert repository.council("run", str(path)).code == 0
    write(repository, LEGACY_FILE, STATE)
    assert RUN not in await runs(repository)


async def test_first_run_imports(repository: Repository) -> None:
    """The run continues; an imported run is not the newest one."""
    repository.commit({".gitignore": ".worktrees/\n"})
    write(repository, LEGACY_FILE, {"sessions": [{**SESSION, "started_at": "2024-06-17T10:00:00Z"}]})
    ended = repository.council("run", str(repository.configure([{"id": "a", "prompt": "write a.txt a"}])), "--json")
    assert (ended.code, ended.states) == (0, {"a": "landed"})
    assert "Imported 1 run" in ended.stderr
    assert repository.council("status", "--json").result["run"] == ended.result["run"]
    assert list(await runs(repository)) == [RUN, ended.result["run"]]
    # Our own document next to it is read with the same models.
    async with Council.open(repository.top, environ=repository.environ) as council:
        found = await council._context.store.get(Key("task", f"{RUN}/login"))
        assert found is not None
        assert TaskDocument.model_validate(found.value).imported is not None


async def test_imported_run_accepts_no_work(repository: Repository) -> None:
    """Commands that would change it are rejected with the reason and record nothing; read commands work."""
    write(repository, LEGACY_FILE, STATE)
    async with Council.open(repository.top, environ=repository.environ) as council:
        position, changes, logs = await council.history.position(), council.changes, council.logs
        asked: list[Callable[[], Awaitable[object]]] = [
            council.runs.resume, council.tasks.cancel, lambda: council.tasks.cancel("later"),
            lambda: council.tasks.retry("export"),
            lambda: council.tasks.retry("nonsense"), lambda: changes.diff("login", RUN), lambda: changes.preserved(RUN),
            lambda: changes.diff_preserved("login/1", RUN), lambda: changes.apply("login/1", RUN),
            lambda: anext(logs.chunks("login", RUN)), lambda: changes.size("login", RUN),
        ]  # fmt: skip
        for ask in asked:
            with pytest.raises(RefusedError, match=f"run {RUN} was imported from {LEGACY_FILE} and can't be continued"):
                await ask()
        assert await council.history.position() == position
    refused = repository.council("resume")
    assert (refused.code, f"`council state show {RUN}`" in refused.stderr) == (2, True)
    status = repository.council("status")
    assert status.code == 1
    assert "council resume" not in status.stdout
    assert "council retry" not in status.stdout
    assert "This is an imported record" in status.stdout
    none = "no active, interrupted, halted or waiting runs\n"
    for words, notice in (
        (["where"], ""),
        (["clean", "--json"], ""),
        (["state", "verify"], ""),
        (["runs", "--active"], none),
    ):
        ended = repository.council(*words)
        assert (ended.code, ended.stderr) == (0, notice), (words, ended)
        assert RUN not in ended.stdout, words
    watched = repository.council("watch", "--json")
    assert (watched.code, watched.result["run"]) == (1, RUN)


@pytest.mark.extended
@needs_sandbox
async def test_unfinished_imported_tasks_can_be_resumed(repository: Repository) -> None:
    """With a generated file of all known facts; missing ones are named, and then the tasks land."""
    tasks = {
        "import": {"status": "in_progress", "prompt": "write i.txt 1", "branch": "feature/import"},
        "later": {"status": "pending"},
        "done": {"status": "completed", "prompt": "write d.txt d"},
    }
    write(repository, LEGACY_FILE, {"version": "2.0", "sessions": [{**SESSION, "tasks": tasks}]})
    path = repository.top / f".council/legacy/{RUN}.yaml"
    refused = repository.council("resume")
    assert refused.code == 2
    assert f"{path} has its 2 unfinished tasks: add an adapter there, add the missing prompts of later" in (
        refused.stderr
    )
    text = path.read_text()
    assert yaml_of(text) == {
        "import": "write i.txt 1\n\nEarlier work on this is on the branch feature/import.",
        "later": "",
    }
    path.write_text(text.replace('prompt: ""', 'prompt: "write l.txt l"'))
    assert repository.council("resume").code == 2
    assert "l.txt" in path.read_text()  # user edits are kept

    usual = json.loads(repository.configure([]).read_text())
    added = [f"{key}: {json.dumps(usual[key])}\n" for key in ("target", "readable", "adapters", "defaults")]
    note = json.dumps("\n\nEarlier work on this is on the branch feature/import.")[1:-1]  # no step for the fake CLI
    path.write_text(path.read_text().replace(note, "") + "".join(added))
    assert repository.council("run", str(path)).code == 0
    assert set(repository.git("ls-tree", "--name-only", "main").split()) >= {"i.txt", "l.txt"}


def yaml_of(text: str) -> dict[str, str]:
    """Return the prompts of a file by task."""
    return {task["id"]: task["prompt"] for task in yaml.safe_load(text)["tasks"]}


async def test_checkpoints_of_an_imported_run_work(repository: Repository) -> None:
    write(repository, LEGACY_FILE, STATE)
    made = repository.council("checkpoint", "create", "--json")
    assert (made.code, made.result["status"]) == (0, "incomplete")
    assert made.result["task_counts"] == {"landed": 2, "failed": 1, "cancelled": 2}
    restored = repository.council("checkpoint", "restore", "1", "--json")
    assert (restored.code, restored.result["runs"]) == (0, [])


async def test_state_below_a_project_counts(repository: Repository) -> None:
    """A folder with an earlier state format within a project is not a separate project."""
    write(repository, LEGACY_FILE, STATE)
    assert repository.council("runs").code == 0
    inner = Repository(repository.top / "vendor", repository.environ, repository.spawns)
    write(inner, LEGACY_FILE, {"sessions": [{"id": "inner"}]})
    assert (await runs(inner)).keys() == {RUN}
    assert not (inner.top / ".council").exists()
