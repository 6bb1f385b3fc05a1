"""`council state conflicts` and `resolve`: list and resolve conflicts, in a shell and from Python."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Council, DocumentUpdate, Key, RefusedError
from orchestrator.protocols import Commit, Write
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.state.documents.conflicts import apply_updates
from orchestrator.state.stores.file import FileStore
from orchestrator.testing.clock import ManualClock
from tests.conftest import Repository
from tests.recorded_run import RUN, RUN_STARTED, recorded_project

GUIDE = (Path(__file__).parents[3] / "docs/state.md").read_text()
EXAMPLES = re.findall(r"```text\n\$ (council state (?:conflicts|resolve).*?)```", GUIDE, re.DOTALL)
API, NAME = Key("task", f"{RUN}/api"), "3f9ac0d1e2b45678"


async def updates(store: FileStore) -> list[DocumentUpdate[Key]]:
    """Return the two concurrent updates of a document."""
    found = await store.get(API)
    assert found is not None
    changed = found.value | {"status": "failed", "reason": "needs a key"}
    return [
        DocumentUpdate(API, RUN_STARTED + 115, "ada@box:4711", changed),
        DocumentUpdate(API, RUN_STARTED + 125, "bob@attic:12", None),
    ]


@pytest.fixture
async def project(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A repository with a run, and a conflict about one of its tasks."""
    repository.environ["TZ"] = "UTC"
    async with recorded_project(repository.top, monkeypatch) as store:
        with monkeypatch.context() as patched:
            patched.setattr("secrets.token_hex", lambda _: NAME)
            await apply_updates(store, await updates(store), "manual")
    return repository


async def change(repository: Repository, key: Key, value: dict[str, Any] | None) -> None:
    """Write a document, regardless of its version."""
    async with FileStore.open(repository.log, ManualClock(RUN_STARTED + 200)) as store:
        found = await store.get(key)
        await store.commit(Commit([Write(key, found.version if found else 0, value)]))


async def test_guide_examples_work(project: Repository) -> None:
    """In sequence, each prints the output in docs/state.md."""
    assert len(EXAMPLES) == 2
    for example in EXAMPLES:
        line, _, expected = example.partition("\n")
        ended = project.council(*shlex.split(line)[1:])
        assert (ended.code, ended.stdout + ended.stderr) == (0, expected)
    assert project.council("state", "conflicts").stdout == "no conflicts\n"
    assert (
        project.council("state", "at", "now", "task/api", "--json").result["documents"][0]["value"]["status"]
        == "failed"
    )


async def test_conflicts_are_printed_as_json(project: Repository) -> None:
    """With full values, and the changes by each candidate."""
    [one] = project.council("state", "conflicts", "--json").result["conflicts"]
    assert (one["id"], one["key"], one["version"], one["current_version"]) == (NAME, str(API), 4, 4)
    first, second = one["candidates"]
    assert (first["number"], first["writer"], first["value"]["status"]) == (1, "ada@box:4711", "failed")
    assert {tuple(field["path"]) for field in first["fields"]["modified"]} == {("status",), ("reason",)}
    assert (second["value"], second["time"], second["base"]) == (None, RUN_STARTED + 125, None)
    done = project.council("state", "resolve", NAME, "--take", "1", "--json").result
    assert done == {"conflict": NAME, "key": str(API), "version": 5, "value": first["value"]}
    assert project.council("state", "conflicts", "--json").result == {"conflicts": [], "damage": []}


async def pending(repository: Repository) -> dict[str, Any]:
    """Return the task in conflict as it would be after a retry."""
    async with FileStore.open(repository.log, ManualClock(RUN_STARTED + 200)) as store:
        found = await store.get(API)
    assert found is not None
    return {**found.value, "status": "pending"}


async def test_own_value_resolves_a_conflict(project: Repository) -> None:
    """From a file or from standard input."""
    value = await pending(project)
    command = [sys.executable, "-m", "orchestrator.cli.main", "state", "resolve", "task/api", "--value", "-", "--json"]
    done = subprocess.run(
        command,
        cwd=project.top,
        env=project.environ,
        input=json.dumps(value),
        text=True,
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"conflict": NAME, "key": str(API), "version": 5, "value": value}


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing", "--take", "1"], f"no pending conflict 'nothing': pending conflicts: {NAME}"),
        ([NAME, "--take", "3"], f"conflict '{NAME}' has no candidate 3: choose one of 1 to 2"),
        ([NAME], "use either --take or --value"),
        ([NAME, "--take", "1", "--value", "-"], "use either --take or --value"),
        ([NAME, "--value", "-"], "standard input is not valid JSON"),
        ([NAME, "--take", "2"], f"{API} is part of run {RUN}: `council clean --runs` removes whole runs"),
        ([NAME, "--value", "odd.json"], f"{API} has no field 'x': put your own fields under `annotations`"),
        ([NAME, "--value", "list.json"], "list.json is not a JSON object"),
        ([NAME, "--value", "missing.json"], "missing.json"),
    ],
)
async def test_impossible_choice_is_rejected(project: Repository, words: list[str], says: str) -> None:
    """Exit code 2 with the reason; the conflict stays open."""
    (project.top / "list.json").write_text("[1]")
    (project.top / "odd.json").write_text('{"status": "pending", "x": 1}')
    ended = project.council("state", "resolve", *words)
    assert (ended.code, ended.stdout) == (2, "")
    assert says in ended.stderr
    async with Council.open(project.top, environ=project.environ) as council:
        assert [one.id for one in await council.state.conflicts()] == [NAME]


async def test_changed_document_needs_force(project: Repository) -> None:
    """The list shows it, the error has author and time."""
    await change(project, API, await pending(project))
    assert f"{API}  version 4, now version 5" in project.council("state", "conflicts").stdout
    refused = project.council("state", "resolve", "task/api", "--take", "1")
    assert (refused.code, "was changed by" in refused.stderr) == (2, True)
    assert project.council("state", "resolve", "task/api", "--take", "1", "--force").code == 0


async def test_ambiguous_document_needs_the_id(project: Repository) -> None:
    async with FileStore.open(project.log, ManualClock(RUN_STARTED + 200)) as store:
        await apply_updates(store, await updates(store), "manual")
    async with Council.open(project.top, environ=project.environ) as council:
        first, second = await council.state.conflicts()
        with pytest.raises(
            RefusedError, match=f"{API} has 2 pending conflicts: choose one by its id: {first.id}, {second.id}"
        ):
            await council.state.resolve_conflict("task/api", 1)
        again = await pending(project)
        resolved = await council.state.resolve_conflict(second.id, again)
        assert resolved.document is not None
        assert (resolved.conflict, resolved.document.value) == (second, again)


async def test_update_can_not_make_a_run_unreadable(project: Repository) -> None:
    """An invalid field of a document, or the removal of a task that the run needs."""
    async with Council.open(project.top, environ=project.environ) as council:
        position = await council.history.position()
        for value, expected in (
            ({"status": "odd"}, "can't have this value: status: "),
            (None, f"is part of run {RUN}"),
        ):
            with pytest.raises(RefusedError, match=expected):
                await council.state.apply_updates([DocumentUpdate(API, 1.0, "me", value)])
        assert await council.history.position() == position
        assert [one.run for one in await council.runs.list()] == [RUN]


async def test_active_run_is_not_written_to(project: Repository) -> None:
    """Neither by `resolve` nor by updates; documents of other runs, and of no run, are written."""
    hub = Hub(project.top / "hub")
    for folder in (hub.trusted, hub.root / "locks"):
        folder.mkdir(parents=True)
    async with Council.open(project.top, environ=project.environ) as council:
        note = DocumentUpdate(Key("memo", "x"), 1.0, "me", {"a": 1})
        again = await pending(project)
        mine = DocumentUpdate(API, 1.0, "me", again)
        async with hub.run_lock(RUN).hold(0):
            with pytest.raises(RefusedError, match=f"task/{RUN}/api belongs to run {RUN}, which is active"):
                await council.state.resolve_conflict(NAME, 1, force=True)
            with pytest.raises(RefusedError, match="which is active"):
                await council.state.apply_updates([note, mine])
            assert (await council.state.apply_updates([note])).written == [note.key]
        applied = await council.state.apply_updates(
            [mine, DocumentUpdate(API, 2.0, "you", {**again, "reason": "b"})], "first_write_wins"
        )
        assert (applied.resolved, applied.waiting) == ([API], [])
        assert (await council.history.at(await council.history.position())).documents[API].value == again
