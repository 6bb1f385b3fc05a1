"""Sinks and trackers in real runs: they follow the file, and their failures stop no landing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Council
from orchestrator.domain.events.runs import RunFinished
from orchestrator.domain.events.state import OutageEnded, OutageStarted
from orchestrator.errors import StoreFull
from orchestrator.protocols import Commit
from orchestrator.state.documents.log_reader import read_range
from tests.conftest import CommandResult, Repository
from tests.distributions import REGISTER, install
from tests.small_disk import fill, mounted
from tests.waiting import wait_for

_SINK = REGISTER + """
import os
from contextlib import asynccontextmanager
from pathlib import Path
from pydantic import BaseModel, ConfigDict
from orchestrator.protocols import SyncResult, TrackedTask, TrackerRequest


class Moody:
    class Options(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
        folder: str

    def __init__(self, options):
        self.folder = Path(options.folder)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *raised):
        pass

    async def send(self, events):
        if (self.folder / "off").exists():
            raise ConnectionError("no route, says " + os.environ["MY_TOKEN"])
        with (self.folder / "arrived").open("a") as file:
            file.writelines(f"{one.position} {one.event.type}\\n" for one in events)

    async def tasks(self):
        return eval((self.folder / "tasks").read_text(), {"Task": TrackedTask})

    async def sync(self, states):
        with (self.folder / "shown").open("a") as file:
            file.writelines(f"{one.id} {one.label} {one.owner is not None}\\n" for one in states)
        asked = self.folder / "requests"
        requests = eval(asked.read_text(), {"Request": TrackerRequest}) if asked.exists() else []
        return SyncResult(requests)


@hookimpl
def council_register_sinks(register):
    register("moody", Moody)


@hookimpl
def council_register_trackers(register):
    register("moody", Moody)
"""  # fmt: skip


@pytest.fixture
def moody(repository: Repository, tmp_path: Path) -> Path:
    """Yield the folder of a sink and tracker that the test controls by files."""
    install(tmp_path / "site", "council-moody", _SINK)
    repository.environ.update(PYTHONPATH=str(tmp_path / "site"), MY_TOKEN="correct-horse-battery")
    folder = tmp_path / "mood"
    folder.mkdir()
    return folder


def _events(ended: CommandResult) -> list[dict[str, Any]]:
    return [line for line in ended.lines if "event" in line]


async def test_sink_gets_the_printed_events(repository: Repository, tmp_path: Path) -> None:
    """In the same order, from first to last; the output file is next to the YAML file."""
    tasks: list[dict[str, Any]] = [
        {"id": "one", "prompt": "write one.txt 1"},
        {"id": "two", "prompt": "exit 1", "attempts": 1},
    ]
    sinks = {"all": {"use": "jsonlines", "file": "all.jsonl"},
             "ends": {"use": "jsonlines", "file": str(tmp_path / "ends.jsonl"),
                      "events": ["task.landed", "task.f*", "run.finished"]}}  # fmt: skip
    ended = repository.council("run", str(repository.configure(tasks, sinks=sinks)), "--json")
    assert ended.states == {"one": "landed", "two": "failed"}, ended
    reported = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    positions = [line.pop("position") for line in reported]
    assert reported == _events(ended)
    assert positions == sorted(positions)
    assert (reported[0]["event"], reported[-1]["event"]) == ("run.created", "run.finished")
    ends = [json.loads(line)["event"] for line in (tmp_path / "ends.jsonl").read_text().splitlines()]
    assert sorted(ends) == ["run.finished", "task.failed", "task.landed"]
    await repository.assert_invariants()


@pytest.mark.extended_variants
@pytest.mark.parametrize("place", ["last event", "last cursor"])
async def test_sink_gets_the_events_of_an_outage_at_the_end(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """They are recorded only after the event of the run's end, also if the outage begins during the last delivery."""
    sinks = {"all": {"use": "jsonlines", "file": "all.jsonl"}}
    path = repository.configure([{"id": "one", "prompt": "write one.txt 1"}], sinks=sinks)
    async with Council.open(path, environ=repository.environ) as council:
        run, failures = await council.runs.create(), [StoreFull("disk", "it is full", "free space on it")]
        store = council._context.store
        commit_intact, has_ended = store.commit, False

        async def commit(commit: Commit) -> int:
            nonlocal has_ended
            is_end = any(event.type == RunFinished.type for event in commit.events)
            is_cursor = any(write.key.kind == "cursor" for write in commit.writes)
            if failures and (is_end if place == "last event" else is_cursor and has_ended):
                raise failures.pop()
            has_ended = has_ended or is_end
            return await commit_intact(commit)

        monkeypatch.setattr(store, "commit", commit)
        await council.runs.resume(run)
        recorded = [
            event.type
            async for record in read_range(store, 0, await store.position())
            for event in record.events
            if "run" in event.data
        ]
    received = [json.loads(line)["event"] for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert not failures
    assert received == recorded
    assert received[-3:] == [RunFinished.type, OutageStarted.type, OutageEnded.type]


@pytest.mark.slow
async def test_failing_sink_costs_nothing_and_gets_the_rest_on_resume(repository: Repository, moody: Path) -> None:
    """The run lands and ends as usual.

    The failure is reported once, without secrets, and the rest is delivered later.
    """
    (moody / "off").touch()
    sinks = {"m": {"use": "moody", "folder": str(moody)}}
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}], sinks=sinks)
    ended = repository.council("run", str(config), "--json")
    assert (ended.code, ended.states) == (0, {"one": "landed"}), ended
    failing, behind = (line for line in _events(ended) if line["event"].startswith("sink."))
    assert (failing["event"], behind["event"]) == ("sink.failing", "sink.undelivered")
    assert (failing["sink"], failing["reason"]) == ("m", "ConnectionError: no route, says [redacted]")
    assert behind["undelivered"] == len(_events(ended)) - 2
    assert not (moody / "arrived").exists()
    (moody / "off").unlink()
    config.unlink()
    resumed = repository.council("resume", "--json")
    assert (resumed.code, resumed.states) == (0, {"one": "landed"}), resumed
    arrived = [line.split()[1] for line in (moody / "arrived").read_text().splitlines()]
    assert arrived == [line["event"] for line in _events(ended) if not line["event"].startswith("sink.")]
    before = (moody / "arrived").read_bytes()
    assert repository.council("resume").code == 0
    assert (moody / "arrived").read_bytes() == before
    await repository.assert_invariants(canaries=["correct-horse-battery"])


@pytest.mark.extended
async def test_full_disk_of_a_sink_delays_only_its_events(repository: Repository, tmp_path: Path) -> None:
    """It is reported once; with space again, the file gets every event once."""
    with mounted(tmp_path / "disk", "64k") as disk:
        file, ballast = disk / "all.jsonl", disk / "ballast"
        fill(ballast)
        sinks = {"all": {"use": "jsonlines", "file": str(file)}}
        config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}], sinks=sinks)
        ended = repository.council("run", str(config), "--json")
        assert (ended.code, ended.states, ended.stderr) == (0, {"one": "landed"}, ""), ended
        reported = [line for line in _events(ended) if line["event"].startswith("sink.")]
        assert [line["event"] for line in reported] == ["sink.failing", "sink.undelivered"]
        assert "No space left on device" in reported[0]["reason"]
        ballast.unlink()
        assert repository.council("resume").code == 0
        received = [json.loads(line)["event"] for line in file.read_text().splitlines()]
        assert received == [line["event"] for line in _events(ended) if not line["event"].startswith("sink.")]
    await repository.assert_invariants()


@pytest.mark.extended
async def test_checklist_that_can_not_be_read_delays_only_its_ticks(repository: Repository, tmp_path: Path) -> None:
    """The folder is gone while tasks land: work continues, and the items are ticked once it is back."""
    folder, gate = tmp_path / "lists", repository.spawns.parent / "gate"
    folder.mkdir()
    todo = folder / "todo.md"
    todo.write_text(f"- [ ] write one.txt 1 {{#one}}\n- [ ] x {{#two}}\n  await {gate}\n  write two.txt 2\n")
    config = repository.configure([], trackers={"todo": {"use": "checklist", "file": str(todo)}})
    child = repository.start("run", str(config), "--json")
    wait_for(lambda: repository.spawns.exists() and "two" in repository.spawns.read_text())
    folder.rename(tmp_path / "moved")
    wait_for(lambda: "tracker.failing" in repository.council("state", "log", "--json").stdout)
    (tmp_path / "moved").rename(folder)
    gate.touch()
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    assert (ended.code, ended.states, error) == (0, {"one": "landed", "two": "landed"}, ""), ended
    reported = [line["event"] for line in _events(ended) if line["event"].startswith("tracker.")]
    assert reported == ["tracker.failing", "tracker.recovered"]
    assert "- [ ]" not in todo.read_text()
    await repository.assert_invariants()


@pytest.mark.slow
async def test_missing_sink_plugin_does_not_stop_a_run(repository: Repository, moody: Path) -> None:
    """On resume the failing sink is reported with the reason and the remedy; the run lands."""
    sinks = {"m": {"use": "moody", "folder": str(moody)}}
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}], sinks=sinks)
    repository.council("run", str(config), failpoints="run.leader_elected=kill")
    repository.environ["COUNCIL_PLUGINS"] = ""
    ended = repository.council("resume")
    assert ended.code == 0, ended
    assert "sink m failed and will be retried: sink 'm' uses 'moody', which is not installed" in ended.stdout
    assert "COUNCIL_PLUGINS does not name it" in ended.stdout
    assert "sink m has not received " in ended.stdout
    await repository.assert_invariants()


_NAME_REMEDY = (
    "use up to 64 ASCII letters, digits, '.', '_' and '-', starting with a letter or digit, "
    "without '..' and not ending in '.' or '.lock'"
)
_MISTAKES = """\
version: 1
repo: {repo}
adapters:
  fake: {{use: command, argv: [x]}}
sinks:
  a: {{use: jsonline, file: x}}
  b: {{use: jsonlines}}
  c: {{use: jsonlines, file: x, colour: red}}
  d: {{file: x}}
  e: {{use: jsonlines, file: x, events: []}}
  f: {{use: jsonlines, file: x, events: task.landed}}
  g h: {{use: jsonlines, file: x}}
  i: {{use: jsonlines, file: ""}}
  j: {{use: jsonlines, file: x, events: }}
trackers:
  t: {{use: checklist}}
  u: {{use: checklist, file: x, events: ["*"]}}
tasks:
  - {{id: a, prompt: x}}
"""


def test_mistakes_in_sinks_and_trackers_have_their_positions(repository: Repository) -> None:
    config = repository.top.parent / "council.yaml"
    config.write_text(_MISTAKES.format(repo=repository.top))
    ended = repository.council("run", str(config), "--json")
    reported = {problem["line"]: (problem["message"], problem["remedy"]) for problem in ended.result["errors"]}
    assert reported == {
        6: ("there is no sink type 'jsonline'", "did you mean 'jsonlines'?"),
        7: ("the key 'file' is missing", "add `file:` here"),
        8: ("unknown key 'colour'", "the keys here are file"),
        9: ("the key 'use' is missing", "add `use:` here"),
        10: ("events is an empty list", "use at least 1"),
        11: ("events is the text 'task.landed'", "use a list, such as [one, two]"),
        12: (
            "'g h' can't be a name",
            _NAME_REMEDY,
        ),
        13: ("this is not a file path", "write an absolute path, or one relative to this file"),
        14: ("events is empty", "set a value, or omit the key"),
        16: ("the key 'file' is missing", "add `file:` here"),
        17: ("unknown key 'events'", "the keys here are file"),
    }


async def test_open_items_of_a_list_are_done_and_ticked(repository: Repository, tmp_path: Path) -> None:
    """Items run with the file's tasks and defaults; landed ones are ticked, and the next run does the rest."""
    todo = tmp_path / "todo.md"
    todo.write_text(
        "- [ ] write one.txt 1\n- [x] write never.txt 1\n- [ ] attempt 1 exit 1 {#two}\n  write two.txt 2\n"
    )
    settings = {"trackers": {"todo": {"use": "checklist", "file": "todo.md"}}}
    defaults = {"attempts": 1, "timeout": "60s"}
    config = repository.configure([{"id": "own", "prompt": "write own.txt 1"}], **settings, defaults=defaults)
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"own": "landed", "write-one-txt-1": "landed", "two": "failed"}, ended
    assert [task["attempts"] for task in ended.result["tasks"]] == [1, 1, 1]
    assert todo.read_text().splitlines()[::2] == ["- [x] write one.txt 1", "- [ ] attempt 1 exit 1 {#two}"]
    todo.write_text(todo.read_text().replace("attempt 1 exit 1", "append two.txt 2"))
    again = repository.council("run", str(repository.configure([], **settings)), "--json")
    assert again.states == {"two": "landed"}, again
    assert "[x] append two.txt 2 {#two}" in todo.read_text()
    value = json.loads(config.read_text())
    del value["tasks"]
    config.write_text(json.dumps(value))
    refused = repository.council("run", str(config), "--json")
    assert (refused.code, refused.result["error"]) == (2, "nothing to do: no open task in 'todo'")
    await repository.assert_invariants()


@pytest.mark.extended
async def test_task_landed_before_a_crash_is_ticked_on_resume(repository: Repository, tmp_path: Path) -> None:
    """Even if the tracker did not know, and the file of the run is gone."""
    (tmp_path / "todo.md").write_text("- [ ] write one.txt 1\n")
    config = repository.configure([], trackers={"todo": {"use": "checklist", "file": "todo.md"}})
    assert repository.council("run", str(config), failpoints="landing.recorded=kill").code < 0
    config.unlink()
    assert repository.council("resume", "--json").states == {"write-one-txt-1": "landed"}
    assert (tmp_path / "todo.md").read_text() == "- [x] write one.txt 1\n"
    await repository.assert_invariants()


@pytest.mark.extended
async def test_tasks_of_a_tracker_and_the_file_can_need_each_other(repository: Repository, moody: Path) -> None:
    (moody / "tasks").write_text(
        "[Task('last', 'append log.txt 3', ['mid']), Task('mid', 'append log.txt 2', ['own'])]"
    )
    trackers = {"m": {"use": "moody", "folder": str(moody)}}
    config = repository.configure([{"id": "own", "prompt": "append log.txt 1"}], trackers=trackers)
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"own": "landed", "last": "landed", "mid": "landed"}, ended
    assert (repository.top / "log.txt").read_text() == "1\n2\n3\n"
    assert {"last landed False", "mid landed False"} <= set((moody / "shown").read_text().splitlines()[-2:])
    assert "own" not in (moody / "shown").read_text()
    await repository.assert_invariants()


async def test_tracker_shows_a_live_task_and_passes_on_each_request_once(repository: Repository, moody: Path) -> None:
    """A person cancels a running task in the list, and retries it after the run; refused requests are reported."""
    (moody / "tasks").write_text("[Task('hangs', 'hang'), Task('other', 'write other.txt 1', priority=5)]")
    trackers = {"m": {"use": "moody", "folder": str(moody), "sync_interval": "100ms"}}
    child = repository.start("run", str(repository.configure([], trackers=trackers)), "--json")
    wait_for(lambda: (moody / "shown").exists() and "hangs running True" in (moody / "shown").read_text())
    (moody / "requests").write_text("[Request('1', 'hangs', 'cancel'), Request('2', 'other', 'approve')]")
    output, error = child.communicate(timeout=60)
    ended = CommandResult(child.wait(), output, error)
    assert ended.states == {"hangs": "cancelled", "other": "landed"}, ended
    events = [line for line in _events(ended) if line["event"].startswith("tracker.")]
    assert [(one["event"], one["task"]) for one in events] == [
        ("tracker.requested", "hangs"),
        ("tracker.request_refused", "other"),
    ]
    assert {"hangs cancelled False", "other landed False"} == set((moody / "shown").read_text().splitlines()[-2:])
    assert repository.council("resume").code == 1
    assert repository.council("state", "log", "--json").stdout.count('"tracker.requested"') == 1
    await repository.assert_invariants()


def test_settings_of_a_tracked_task_replace_the_defaults(repository: Repository, moody: Path) -> None:
    (moody / "tasks").write_text(
        "[Task('a', 'x', priority=7, owns=['src/**'], adapter='other'), Task('b', 'x', adapter='none')]"
    )
    trackers = {"m": {"use": "moody", "folder": str(moody)}}
    adapters = {"fake": {"use": "command", "argv": ["true"]}, "other": {"use": "command", "argv": ["true"]}}
    config = repository.configure([], trackers=trackers, adapters=adapters, defaults={"adapter": "fake"})
    refused = repository.council("run", str(config), "--json")
    [error] = refused.result["errors"]
    assert (error["path"], error["message"]) == ("trackers.m[1].adapter", "there is no adapter 'none' in the file")
    (moody / "tasks").write_text("[Task('a', 'x', priority=7, owns=['src/**'], adapter='other'), Task('b', 'x')]")
    planned = repository.council("run", str(config), "--dry-run", "--json")
    tasks = {one["id"]: one for wave in planned.result["waves"] for one in wave["tasks"]}
    assert (tasks["a"]["adapter"], tasks["a"]["priority"]) == ("other", 7), tasks
    assert (tasks["b"]["adapter"], tasks["b"]["priority"]) == ("fake", 0), tasks


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("[Task('Own', 'x')]", [("trackers.m[0].id", "'Own' differs only in case from the task 'own' at tasks[0].id")]),
        (
            "[Task('a', 'x'), Task('a', 'y')]",
            [
                ("trackers.m[1].id", "the task 'a' is already defined at trackers.m[0].id"),
            ],
        ),
        (
            "[Task('no name', ' ', ['nothing'])]",
            [
                ("trackers.m[0].id", "'no name' can't be a name"),
                ("trackers.m[0].prompt", "the prompt is empty"),
                ("trackers.m[0].needs[0]", "there is no task 'nothing'"),
            ],
        ),
        (
            "[Task('a', 'x', ['b']), Task('b', 'x', ['a'])]",
            [("trackers.m[0].needs[0]", "dependency cycle: a -> b -> a")],
        ),
        ("[Task('a', 'x\\0y')]", [("trackers.m[0].prompt", "the text contains the character '\\x00'")]),
        ("[Task(3, 'x')]", [("trackers.m[0].id", "id is the number 3")]),
        (
            "[Task('a', 'use AKIA' + 'Q7RT2YBV4MZX9KLP')]",
            [("trackers.m[0].prompt", "the prompt seems to contain a secret key, and prompts are recorded")],
        ),
    ],
    ids=["the file's", "its own", "all at once", "a circle", "no text", "no id", "a key"],
)
def test_tasks_of_a_tracker_are_validated_like_those_of_the_file(
    repository: Repository, moody: Path, tasks: str, expected: list[tuple[str, str]]
) -> None:
    """Every mistake has its position, and nothing is recorded."""
    (moody / "tasks").write_text(tasks)
    trackers = {"m": {"use": "moody", "folder": str(moody)}}
    config = repository.configure([{"id": "own", "prompt": "x"}], trackers=trackers)
    ended = repository.council("run", str(config), "--json")
    assert ended.code == 2
    assert [(one["path"], one["message"]) for one in ended.result["errors"]] == expected
    assert repository.council("runs", "--json").result["runs"] == []


def test_conflicting_trackers_are_both_named(repository: Repository, moody: Path, tmp_path: Path) -> None:
    """The second is the mistake; the message names the first."""
    (moody / "tasks").write_text("[Task('same', 'x')]")
    (tmp_path / "todo.md").write_text("- [ ] other\n- [ ] Do it {#same}\n")
    trackers = {"m": {"use": "moody", "folder": str(moody)}, "todo": {"use": "checklist", "file": "todo.md"}}
    ended = repository.council("run", str(repository.configure([], trackers=trackers)))
    assert ended.code == 2
    expected = "trackers.todo[1].id: the task 'same' is already defined at trackers.m[0].id: give each task a unique id"
    assert expected in ended.stderr


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("1 / 0", "tracker 'm' can't list its tasks: ZeroDivisionError: division by zero"),
        ("[('a', 'x')]", "tracker 'm' can't list its tasks: AttributeError: 'tuple' object has no attribute 'id'"),
        ("None", "tracker 'm' can't list its tasks: TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_failing_tracker_is_rejected(repository: Repository, moody: Path, tasks: str, expected: str) -> None:
    (moody / "tasks").write_text(tasks)
    config = repository.configure([], trackers={"m": {"use": "moody", "folder": str(moody)}})
    ended = repository.council("run", str(config), "--json")
    assert (ended.code, ended.result["error"]) == (2, expected)


def test_tracker_without_an_adapter_is_a_mistake(repository: Repository, moody: Path) -> None:
    """With several adapters the defaults must name the one for tasks that can't name theirs."""
    config = repository.configure([], trackers={"m": {"use": "moody", "folder": str(moody)}})
    value = json.loads(config.read_text())
    value["adapters"]["other"] = {"use": "command", "argv": ["true"]}
    config.write_text(json.dumps(value))
    ended = repository.council("run", str(config), "--json")
    assert ended.code == 2
    assert [one["message"] for one in ended.result["errors"]] == [
        "the tasks of trackers have no adapter, and there are several"
    ]
    value["defaults"]["adapter"] = "other"
    value["adapters"]["fake"]["argv"] = ["{nothing}"]
    config.write_text(json.dumps(value))
    assert (
        repository.council("run", str(config), "--json").result["errors"][0]["message"]
        == "{nothing} is not a placeholder"
    )
