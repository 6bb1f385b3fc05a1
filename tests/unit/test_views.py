"""What stands in the readable copies of the state, and what their files are called."""

from __future__ import annotations

import json
import math
from itertools import product
from typing import Any

import pytest

from orchestrator.protocols import VERSIONS_KEPT, CommitRecord, Event, Key
from orchestrator.views.content import ViewPosition, log_changes
from orchestrator.views.folder import ViewFolder
from orchestrator.views.names import context_path, document_path, version_path

TASK = Key("task", "run/a")
LONG = "a" * 300
PARTS = ["a", "A", "a.json", "", ".", "..", "history", "state.json", "é", LONG, f"{LONG}b", "a b", "a~b", "\0"]
KINDS = ("run", "task", "spec", "lease", "Lease", "../x")


def test_no_two_ids_have_one_file() -> None:
    """Whatever ids hold, also where a file system does not tell cases apart; none leads out of the folder."""
    ids = ["/".join(parts) for count in (1, 2) for parts in product(PARTS, repeat=count)]
    ids += ["/".join(parts) for parts in product(PARTS[:8], repeat=3)]
    ids += ["a/a/a/a", "a/a/a/a/a", "a/a/a/a/a/a", "a/" * 3000]
    keys = [
        Key(kind, name) for name in dict.fromkeys(ids) for kind in ("run", "task", "spec", "lease", "Lease", "../x")
    ]
    paths = [*map(document_path, keys), *(version_path(key, 1) for key in keys if key.kind == "task")]
    assert len({path.casefold() for path in paths}) == len(paths)
    folders = {"/".join(path.split("/")[:depth]) for path in paths for depth in range(1, path.count("/") + 1)}
    assert not folders & set(paths)
    for path in paths:
        assert not {"", ".", ".."} & set(path.split("/"))
        assert max(len(part.encode()) for part in path.split("/")) < 128
        assert len(path) < 1000
        assert path.isascii()


def test_usual_ids_are_names_as_they_are() -> None:
    """Those of runs and of most tasks."""
    assert document_path(Key("task", "20260102-030405-ab12/api")) == "tasks/20260102-030405-ab12/api/state.json"
    assert context_path(Key("task", "20260102-030405-ab12/v1.2_x")) == "context/20260102-030405-ab12/v1.2_x.json"


def _records(first: int, last: int) -> list[CommitRecord]:
    return [
        CommitRecord(
            100 + version, float(version), {TASK: (version, {"n": version})}, [Event("counted", {"big": 2**70})]
        )
        for version in range(first, last + 1)
    ]


@pytest.mark.parametrize("size", [1, 3, 7, 40])
@pytest.mark.parametrize("ahead", [0, 40])
def test_only_the_newest_versions_stay(size: int, ahead: int) -> None:
    """However the log is cut into parts, and whether or not it is known what comes."""
    files: dict[str, bytes] = {}
    for start in range(1, 41, size):
        records = _records(start, min(start + size - 1, 40))
        for name, data in log_changes(records, {TASK: ahead} if ahead else {}).files.items():
            files.pop(name, None)
            if data is not None:
                files[name] = data
    assert set(files) == {version_path(TASK, version) for version in range(40 - VERSIONS_KEPT + 1, 41)}
    told = json.loads(files[version_path(TASK, 35)])
    assert (told["version"], told["position"], told["value"]) == (35, 135, {"n": 35})
    assert told["events"] == [{"type": "counted", "data": {"big": 2**70}}]


@pytest.mark.parametrize(
    "told",
    [
        None, [], 3, {"format": 1}, {"format": 1, "position": -1}, {"format": 1, "position": "x"},
        {"format": 99}, {"position": None}, {"position": -1}, {"position": [3]}, {"time": "x"},
        {"position": math.inf}, {"events": -1}, {"damage": 3},
    ],
)  # fmt: skip
def test_what_is_no_index_is_not_gone_on_with(told: Any) -> None:
    """Neither another form of it nor what somebody made of it."""
    good = ViewPosition(3, 5.0, "ada@box:1", 6.0, 10, ("a place",))
    assert ViewPosition.decode(good.encode()) == good
    data = told
    if isinstance(told, dict) and told.get("format") != 1:
        data = {**json.loads(good.encode()), **told}
    assert ViewPosition.decode(json.dumps(data).encode()) is None
    assert ViewPosition.decode(b"\xff") is None


def test_events_never_grow_without_end(tmp_path: Any) -> None:
    """The newest stay, whole lines of them."""
    folder = ViewFolder(tmp_path / "views", 10_000)
    folder.begin()
    positions: list[int] = []
    for start in range(1, 400, 10):
        folder.apply(log_changes(_records(start, start + 9), {}))
        data = (tmp_path / "views/events.jsonl").read_bytes()
        assert len(data) <= 10_000
        positions = [json.loads(line)["position"] for line in data.splitlines()]
        assert positions == list(range(positions[0], 100 + start + 10))
    assert positions[0] > 101
