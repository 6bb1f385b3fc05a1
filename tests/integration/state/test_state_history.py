"""`council state` on a made-up run: every point in time is readable, and the examples of the guide work."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.api.context import LazyPlugins, ProjectContext
from orchestrator.api.council import Council
from orchestrator.api.topics.history import StateHistory, is_about_run
from orchestrator.api.topics.reports import RunReports
from orchestrator.errors import RefusedError
from orchestrator.project import Project
from orchestrator.protocols import Commit, CommitRecord, Event, Key, Write
from orchestrator.state.documents.log_reader import is_run_document
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from orchestrator.testing.clock import ManualClock
from tests.conftest import Repository
from tests.integration.stores.test_log_reader import ForgetfulStore
from tests.recorded_run import RUN, RUN_STARTED, record_run, recorded_project, run_document

pytestmark = pytest.mark.extended_rest

GUIDE = (Path(__file__).parents[3] / "docs/state.md").read_text()
MODELS, API, CLAIM = Key("task", f"{RUN}/models"), Key("task", f"{RUN}/api"), Key("claim", f"{RUN}/models")


@pytest.fixture
async def project(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """Return a repository with the recorded run, on a machine in UTC."""
    repository.environ["TZ"] = "UTC"
    async with recorded_project(repository.top, monkeypatch, Path("/home/ada/shop")):
        pass
    return repository


async def add(repository: Repository, commit: Commit) -> None:
    """Commit one more change to the project's state."""
    async with FileStore.open(repository.log, SystemClock()) as store:
        await store.commit(commit)


@pytest.mark.parametrize(
    "example", re.findall(r"```console\n\$ (.*?)```", GUIDE, re.DOTALL), ids=lambda text: text[:40]
)
async def test_guide_examples_work(project: Repository, example: str) -> None:
    line, _, expected = example.partition("\n")
    _, *words = shlex.split(line)
    ended = project.council(*words)
    assert ended.stdout + ended.stderr == expected


@pytest.mark.parametrize(
    "moment", ["5", "2026-01-02T03:04:45Z", "2026-01-02 03:05", "2026-01-02T04:05+01:00", f"{RUN}/1"]
)
async def test_position_is_accepted_in_each_format(project: Repository, moment: str) -> None:
    """Position, times with and without a zone, and a checkpoint select the same documents."""
    await add(project, Commit([Write(Key("checkpoint", f"{RUN}/1"), 0, {"position": 5})]))
    reported = project.council("state", "at", moment, "--json").result
    assert (reported["position"], reported["time"], len(reported["documents"])) == (5, RUN_STARTED + 40, 9)
    api = next(one for one in reported["documents"] if one["key"] == str(API))
    assert (api["version"], api["position"], api["writer"]) == (3, 5, "ada@box:4711")
    assert (api["value"]["status"], api["value"]["failures"]) == ("pending", 1)


async def test_relative_time_is_counted_from_now(project: Repository) -> None:
    """A commit of the last hour is not in the state of an hour ago."""
    await add(project, Commit([Write(Key("note", "x"), 0, {})]))
    assert project.council("state", "at", "1h", "--json").result["position"] == 11
    assert project.council("state", "at", "now", "--json").result["position"] == 12


async def test_state_before_the_first_commit_is_empty(project: Repository) -> None:
    reported = project.council("state", "at", "2020-01-01", "--json").result
    assert reported == {"position": 0, "time": None, "documents": [], "damage": []}
    assert project.council("state", "at", "0").stdout == "position 0, before the first commit: 0 documents\n"


async def test_values_are_printed_for_keys(project: Repository) -> None:
    """In full, with the prefix of the newest run or without; `*` matches several."""
    for name in ("task/models", str(MODELS)):
        shown = project.council("state", "at", "8", name).stdout
        assert '      "status": "landed",' in shown.splitlines()
        assert "task/" in shown
    reported = project.council("state", "at", "8", "task/*", "lease/*", "--json").result
    assert [one["key"] for one in reported["documents"]] == [f"lease/run/{RUN}", str(API), str(MODELS)]


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("words", "error", "remedy"),
    [
        ("at 12", "position 12 does not exist yet (newest: ", "use an earlier position"),
        ("at soon", "'soon' is not a point in time", "an age such as 2h"),
        ("at 5 task/modles", "no document 'task/modles' at position 5", "task/models"),
        ("at 5 request/*", "no document 'request/*' at position 5", "council state at now"),
        ("diff 1 x", "'x' is not a point in time", "the id of a checkpoint"),
        ("history models", "no document 'models'", "did you mean spec/models or task/models or claim/models?"),
        ("history Task/Models", "no document 'Task/Models'", "did you mean task/models?"),
        ("history nothing", "no document 'nothing'", "write kind/id"),
        (f"at {RUN}/9", f"there is no checkpoint '{RUN}/9'", "council checkpoint list"),
        (f"history task/{RUN}/apj", f"task/{RUN}/apj", f"task/{RUN}/api"),
        ("log --run nobody", "there is no run 'nobody'", "council runs"),
        ("show nobody", "there is no run 'nobody'", "council runs"),
    ],
)
async def test_missing_document_is_rejected(project: Repository, words: str, error: str, remedy: str) -> None:
    """Exit code 2 with the remedy, for people and for programs."""
    ended = project.council("state", *words.split())
    assert (ended.code, ended.stdout) == (2, "")
    assert error in ended.stderr
    assert remedy in ended.stderr
    refused = project.council("state", *words.split(), "--json").result
    assert (refused["status"], refused["exit"]) == ("refused", 2)


async def test_diff_names_added_removed_and_changed_fields(project: Repository) -> None:
    """Only documents of the given run, only fields that differ."""
    await add(project, Commit([Write(Key("request", f"{RUN}/1"), 0, {"n": 1}), Write(Key("note", "x"), 0, {})]))
    await add(project, Commit([Write(Key("request", f"{RUN}/1"), 1, None)]))
    added = project.council("state", "diff", "11", "12", "--json").result["documents"]
    assert [(one["key"], one["kind"], one["new_version"]) for one in added] == [
        ("note/x", "added", 1),
        (f"request/{RUN}/1", "added", 1),
    ]
    [removed] = project.council("state", "diff", "12", "now", "--json").result["documents"]
    assert (removed["kind"], removed["old_version"], removed["new_version"]) == ("removed", 1, None)
    claim, changed = project.council("state", "diff", "7", "8", "--run", RUN, "--json").result["documents"]
    assert (claim["key"], changed["key"]) == (str(CLAIM), str(MODELS))
    assert {"path": ["released"], "old": None, "new": "complete"} in claim["fields"]["modified"]
    assert {tuple(one["path"]) for one in changed["fields"]["modified"]} == {
        ("status",),
        ("landing_intent",),
        ("landed",),
        ("branch",),
    }
    assert {"path": ["status"], "old": "landing", "new": "landed"} in changed["fields"]["modified"]


async def test_equal_positions_have_no_diff(project: Repository) -> None:
    assert project.council("state", "diff", "9").stdout.endswith("\nno differences\n")


async def test_history_has_each_version_with_its_diff(project: Repository) -> None:
    """Old and new value, process, time and event; also of deleted documents."""
    versions = project.council("state", "history", "task/models", "--json").result["versions"]
    assert [one["version"] for one in versions] == [5, 4, 3, 2, 1]
    assert versions[0]["events"] == [
        {"event": "task.landed", "run": RUN, "task": "models", "attempt": 1, "landed": versions[0]["new"]["landed"]}
    ]
    assert [one["old_version"] for one in versions] == [4, 3, 2, 1, None]
    assert all(newer["old"] == older["new"] for newer, older in pairwise(versions))
    limited = project.council("state", "history", "task/models", "--limit", "2", "--json").result["versions"]
    assert limited == versions[:2]
    await add(project, Commit([Write(Key("note", "x"), 0, {"a": 1})], [Event("noted", {})]))
    await add(project, Commit([Write(Key("note", "x"), 1, None)]))
    gone = project.council("state", "history", "note/x")
    assert [line.strip() for line in gone.stdout.splitlines()][2:] == [
        "deleted",
        gone.stdout.splitlines()[3].strip(),
        "a: absent → 1",
    ]
    assert gone.stdout.splitlines()[3].endswith("  noted")


async def test_log_respects_the_requested_limit(project: Repository) -> None:
    await add(project, Commit([Write(Key("note", "x"), 0, {})], [Event("noted", {"run": "other"})]))
    printed = [
        [one["position"] for one in project.council("state", "log", *words, "--json").lines]
        for words in (
            [],
            ["--run", RUN],
            ["--limit", "3"],
            ["--run", RUN, "--limit", "3"],
            ["--after", "9"],
            ["--after", "10", "--limit", "9"],
            ["--after", "99"],
        )
    ]
    assert printed == [
        list(range(1, 13)),
        list(range(1, 12)),
        [10, 11, 12],
        [9, 10, 11],
        [10, 11, 12],
        [11, 12],
        [],
    ]
    first = project.council("state", "log", "--json").lines[0]
    assert first["documents"][0] == {"key": f"run/{RUN}", "version": 1, "deleted": False}
    assert (first["events"][0]["event"], first["time"], first["unreadable"]) == ("run.created", RUN_STARTED, [])


async def test_terminal_sequences_are_escaped(project: Repository) -> None:
    evil = "\x1b]0;title\x07hidden\u202e"
    await add(project, Commit([Write(Key("note", evil), 0, {evil: evil})], [Event("noted", {"task": evil})]))
    await add(project, Commit([Write(Key("note", evil), 1, {evil: ""})]))
    for words in (["log"], ["at", "now"], ["at", "now", "note/*"], ["diff", "12"], ["history", f"note/{evil}"]):
        ended = project.council("state", *words)
        assert ended.code == 0, ended
        assert "hidden" in ended.stdout
        assert not {*"\x1b\x07\u202e"} & set(ended.stdout)


async def test_other_store_can_be_read(project: Repository, tmp_path: Path) -> None:
    async with FileStore.open(project.log_in(tmp_path / "elsewhere"), SystemClock()) as store:
        await store.commit(Commit([Write(Key("note", "x"), 0, {})]))
    url = (tmp_path / "elsewhere").as_uri()
    for words in (["log"], ["at", "now"], ["history", "note/x"], ["diff", "0"]):
        assert "note/x" in project.council("state", *words, "--state", url).stdout
    project.environ["COUNCIL_STATE"] = url
    assert len(project.council("state", "log").stdout.splitlines()) == 1
    own = (project.top / ".council/state").as_uri()
    assert len(project.council("state", "log", "--state", own).stdout.splitlines()) == 11


async def test_store_can_be_read_from_any_folder(project: Repository, tmp_path: Path) -> None:
    """Even where council never ran; nothing is created there, and commands that write are rejected."""
    (tmp_path / "off").mkdir()
    own = str(project.top / ".council/state")

    council = Repository(tmp_path / "off", project.environ, project.spawns).council
    assert council("state", "log", "--state", own).stdout == project.council("state", "log").stdout
    assert f"{RUN}  interrupted" in council("runs", "--state", own).stdout  # although its repositories are gone
    for words, why in ((["state", "views"], "there is no run in"), (["resume"], "are missing from")):
        refused = council(*words, "--state", own)
        assert (refused.code, why in refused.stderr) == (2, True), refused
    assert not any((tmp_path / "off").iterdir())


async def test_reading_creates_no_store(project: Repository, tmp_path: Path) -> None:
    """A mistyped folder is rejected by every command, and not created."""
    missing, file = tmp_path / "missing", project.top / "README"
    file.write_text("no store\n")
    for location in (missing, file):
        refused = project.council("state", "log", "--state", str(location), "--json")
        assert (refused.code, refused.result["error"]) == (2, f"there is no state in {location}")
    refused = project.council("status", "--state", "memory:", "--json")
    assert (refused.code, refused.result["error"]) == (2, "there is no state in memory:")  # as of a plugin's store
    project.environ["COUNCIL_STATE"] = str(missing)
    assert project.council("runs").code == 2
    assert not missing.exists()


async def test_reading_changes_nothing(project: Repository) -> None:
    state = project.top / ".council/state"
    before = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    for words in (["log"], ["at", "3"], ["diff", "3"], ["history", "task/api"], ["show"]):
        assert project.council("state", *words).code == 0
    assert {path: path.read_bytes() for path in state.rglob("*") if path.is_file()} == before


async def test_damage_is_reported(project: Repository) -> None:
    """Next to the readable state, to people and to programs."""
    [segment] = (project.top / ".council/state").glob("*/*.jsonl")
    data = bytearray(segment.read_bytes())
    data[data.index(b'"landed":"4f0c')] ^= 1
    segment.write_bytes(data)
    shown = project.council("state", "history", "task/models")
    assert "damaged: its value can't be read" in shown.stdout
    assert "The state log is damaged" in shown.stderr
    reported = project.council("state", "at", "8", "task/models", "--json").result
    assert reported["documents"][0]["damaged"]
    assert len(reported["damage"]) == 1
    assert "unreadable" in project.council("state", "log").stdout


async def test_run_is_summarized(project: Repository) -> None:
    """Options, tasks, phases, events and metrics; none of it is live, and its repositories are gone."""
    reported = project.council("state", "show", RUN, "--json").result
    assert (reported["run"], reported["status"], reported["started"], reported["sessions"]) == (
        RUN,
        "interrupted",
        RUN_STARTED,
        [],
    )
    assert (reported["options"]["capacity"], reported["options"]["base"]) == (2, "main")
    models, api = reported["tasks"]
    assert (models["status"], models["time_minutes"], models["worktree"]) == ("landed", 1.5, None)
    assert [(phase["name"], phase["status"], len(phase["attempts"])) for phase in api["phases"]] == [
        ("build", "in_progress", 2)
    ]
    assert [one["event"] for one in reported["events"]][::5] == ["run.created", "task.queued", "run.interrupted"]
    assert reported["metrics"] == {
        "total_tasks": 2, "completed": 1, "in_progress": 1, "failed": 0, "pending": 0, "average_time_minutes": 1.5,
        "by_status": {"running": 1, "landed": 1}, "input_tokens": 12_000, "output_tokens": 800, "cost": 0.12,
    }  # fmt: skip


def context_of(store: ForgetfulStore, clock: ManualClock, folder: Path) -> ProjectContext:
    """Return a project with a store."""
    return ProjectContext(Project(folder), store, "memory:", clock, {}, LazyPlugins(None, {}, ()))


async def test_last_hundred_events_are_shown(tmp_path: Path) -> None:
    """Events of other runs do not count."""
    clock = ManualClock(RUN_STARTED)
    store = ForgetfulStore(clock)
    await record_run(store, clock, run_document(tmp_path))
    for number in range(150):
        await store.commit(Commit([], [Event("noted", {"run": name, "n": number}) for name in (RUN, "other")]))
    found = await RunReports(context_of(store, clock, tmp_path)).summary(RUN)
    assert [one.event.data["n"] for one in found.events] == list(range(50, 150))


async def test_compacted_start_of_the_log_is_reported(tmp_path: Path) -> None:
    """An explicit range before it is rejected with the first position; an open range starts there."""
    clock = ManualClock(RUN_STARTED)
    store = ForgetfulStore(clock)
    await record_run(store, clock, run_document(tmp_path))
    store.first = 6
    context = context_of(store, clock, tmp_path)
    past = StateHistory(context)
    assert [one.position async for one in past.commits(until=11)] == [7, 8, 9, 10, 11]
    assert [one.position for one in await past.newest_commits(99, until=11)] == [7, 8, 9, 10, 11]
    with pytest.raises(RefusedError, match="only to 6: use position 6 or later"):
        await anext(past.commits(after=3, until=11))
    assert [one.event.type for one in (await RunReports(context).summary(RUN)).events] == [
        "task.landing", "task.landed", "task.started", "run.paused", "run.interrupted",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (Key("run", "r"), True), (Key("task", "r/a"), True), (Key("cursor", "r/sink/x"), True),
        (Key("lease", "run/r"), True), (Key("lease", "run/s"), False),
        (Key("task", "s/r"), False), (Key("task", "rr/a"), False), (Key("ports", "host/1"), False),
    ],
)  # fmt: skip
def test_documents_of_a_run_are_listed(key: Key, expected: bool) -> None:
    """By an id prefix; a task named like a run does not match."""
    assert is_run_document(key, "r") is expected
    assert is_about_run(CommitRecord(1, 0.0, {key: (1, {})}, ()), "r") is expected


async def test_history_works_from_python(project: Repository) -> None:
    """`council.history` and `council.reports` return what the commands print."""
    async with Council.open(project.top, environ=project.environ) as council:
        past = council.history
        assert await past.position_at(RUN_STARTED + 41) == 5
        assert (await past.at(5, names=["task/api"])).documents.keys() == {API}
        assert (await past.key("task/models")) == MODELS
        assert [one.version for one in await past.versions(MODELS, 2)] == [5, 4]
        assert (await council.reports.metrics(RUN)).completed == 1
        with pytest.raises(RefusedError):
            await past.at(99)
        reported = json.loads(json.dumps((await council.reports.summary(RUN)).to_json()))
    assert reported == project.council("state", "show", "--json").result


async def test_damage_is_found_and_accepted(project: Repository) -> None:
    """The exit code reports damage; after the repair it is 0, and the losses are listed."""
    segment = next((project.top / ".council/state").glob("*/*.jsonl"))
    before, _, after = segment.read_bytes().rpartition(b'"landed":"4f0c2d1e9b')
    segment.write_bytes(before + b'"landed":"000000000b' + after)
    found = project.council("state", "verify", "--json")
    assert (found.code, found.result["is_valid"]) == (1, False)
    assert found.result["damaged"] == [str(CLAIM), str(MODELS)]  # one commit landed the task and released its claim
    assert "verify --repair" in project.council("state", "verify").stdout
    repaired = project.council("state", "verify", "--repair", "--json")
    assert (repaired.code, repaired.result["is_valid"], repaired.result["position"]) == (0, True, 12)
    assert repaired.result["repaired"] == [{"key": str(CLAIM), "version": 3}, {"key": str(MODELS), "version": 6}]
    assert project.council("state", "verify", "--repair", "--json").result["repaired"] == []
    assert project.council("state", "verify").code == 0
    assert project.council("state", "at", "now", "--json").result["damage"] == []


async def test_task_without_a_record_is_named(project: Repository) -> None:
    """As damage may leave it; a checkpoint restores it."""
    assert project.council("checkpoint", "create").code == 0
    await add(project, Commit([Write(API, 4, None)]))
    listed = project.council("runs", "--json").result
    assert (listed["runs"], "the state of task api is missing" in listed["damage"][0]) == ([], True)
    refused = project.council("status", "--json")
    assert (refused.code, refused.result["error"]) == (2, "the state of task api is missing")
    assert "council checkpoint list" in refused.result["remedy"]
    assert project.council("checkpoint", "restore", "1").code == 0
    assert project.council("runs").stdout.startswith(RUN)


async def test_task_with_a_damaged_newest_record_is_reported(project: Repository) -> None:
    """Its previous version is shown; other tasks are not affected."""
    (segment,) = (project.top / ".council/state").glob("*/*.jsonl")
    lines = segment.read_bytes().splitlines(keepends=True)
    lines[7] = lines[7][:-3] + bytes([lines[7][-3] ^ 1]) + lines[7][-2:]  # `models` lands there
    segment.write_bytes(b"".join(lines))
    shown = project.council("state", "show", "--json").result
    models, api = shown["tasks"]
    assert models["status"] == "landing"
    assert models["reason"].startswith("its record in the state log is damaged")
    assert "damaged" not in (api["reason"] or "")
    assert "its record in the state log is damaged" in " ".join(project.council("state", "show").stdout.split())
