"""Readable copies of the state and their file names."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

from orchestrator.engine.views import ViewFolder, context_path, document_path, version_path
from orchestrator.protocols import CommitRecord, Event, Key

TASK = Key("task", "run/a")
LONG = "a" * 300
PARTS = ["a", "A", "a.json", "", ".", "..", "history", "state.json", "é", LONG, f"{LONG}b", "a b", "a~b", "\0"]
KINDS = ("run", "task", "spec", "lease", "Lease", "../x")


def test_ids_have_distinct_files() -> None:
    """For any ids, also on file systems that ignore case; no name leaves the folder."""
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


def test_usual_ids_are_file_names() -> None:
    """Ids of runs and of most tasks."""
    assert document_path(Key("task", "20260102-030405-ab12/api")) == "tasks/20260102-030405-ab12/api/state.json"
    assert context_path("20260102-030405-ab12", "v1.2_x") == "context/20260102-030405-ab12/v1.2_x.json"


def _records(first: int, last: int) -> list[CommitRecord]:
    return [
        CommitRecord(
            100 + version, float(version), {TASK: (version, {"n": version})}, [Event("counted", {"big": 2**70})]
        )
        for version in range(first, last + 1)
    ]


def test_event_file_is_bounded(tmp_path: Any) -> None:
    """The newest events are kept, as complete lines."""
    folder = ViewFolder(tmp_path / "views", 10_000)
    positions: list[int] = []
    for start in range(1, 400, 10):
        folder.write_records(_records(start, start + 9), ())
        data = (tmp_path / "views/events.jsonl").read_bytes()
        assert len(data) <= 10_000
        positions = [json.loads(line)["position"] for line in data.splitlines()]
        assert positions == list(range(positions[0], 100 + start + 10))
    assert positions[0] > 101
