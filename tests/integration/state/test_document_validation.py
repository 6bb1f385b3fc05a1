"""Documents of our own that others write: rejected, or harmless; and values that are stored already."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from orchestrator import Council, DocumentUpdate, Key, RefusedError
from orchestrator.errors import CouncilError, UnreadableDocument
from orchestrator.protocols import Commit, Document, JsonObject, Store, Write
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.state.documents.update import update_document
from orchestrator.state.documents.validation import (
    DOCUMENT_KINDS,
    check_manual_change,
    find_document_error,
    find_unreadable,
)
from orchestrator.testing.clock import ManualClock
from tests.conftest import Repository
from tests.hypothesis_settings import example_settings
from tests.recorded_run import RUN, RUN_STARTED, record_run, recorded_project, run_document

pytestmark = pytest.mark.extended

API = Key("task", f"{RUN}/api")
RECORDED = ("api", "models")
OTHER = "20260102-040000-cd34"


@pytest.fixture
async def council(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Council]:
    """A project with two runs that were interrupted, `OTHER` is the newer one."""
    async with recorded_project(repository.top, monkeypatch) as store:
        clock = ManualClock(RUN_STARTED + 3600)
        await record_run(store, clock, run_document(repository.top, OTHER, clock.now()))
    hub = Hub(repository.top / "hub")
    for folder in (hub.trusted, hub.root / "locks"):
        folder.mkdir(parents=True)
    async with Council.open(
        repository.top, environ=repository.environ, clock=ManualClock(RUN_STARTED + 9000)
    ) as opened:
        yield opened


async def put(store: Store, key: Key, change: Callable[[JsonObject], JsonObject]) -> None:
    """Write a document past all validation, as another version or program could."""
    await update_document(store, key, lambda value: change(value or {}))


def merge(changes: JsonObject, value: JsonObject | None) -> JsonObject:
    """Return a document with changed fields."""
    return {**(value or {}), **changes}


def read_run(council: Council, run: str) -> Mapping[str, Callable[[], Awaitable[object]]]:
    """Read a run as the commands do."""
    reports = council.reports
    return {
        "status": lambda: council.runs.status(run),
        "metrics": lambda: reports.metrics(run),
        "usage": lambda: reports.usage(run),
        "summary": lambda: reports.summary(run),
        "details": lambda: council.tasks.details("api", run),
        "failures": lambda: reports.last_failures(run),
        "checkpoint": lambda: council.checkpoints.create(run),
        "restoration": lambda: restoration(council, run),
        "is_live": lambda: council.runs.is_live(run),
        "contexts": lambda: council.sessions.list(run),
        "notes": lambda: council.notes.list(run),
        "check": lambda: council.state.verify_run(run),
        "resume": lambda: council.runs.resume(run),
    }


async def restoration(council: Council, run: str) -> object:
    """Return the effect of restoring the first checkpoint of a run."""
    return [await council.checkpoints.plan_restore(one.id) for one in await council.checkpoints.list(run)]


async def read_project(council: Council) -> None:
    """Read everything that belongs to no single run; nothing of it may fail."""
    await council.runs.list()
    await council.runs.list(active=True)
    await council.runs.newest()
    assert (await council.state.check_health()).findings
    await council.state.compact()
    await council.state.verify()
    await council.state.conflicts()
    await council.locks.list()
    await council.state.paths()
    await council.locks.named.held()
    await council.locks.named.cleanup_expired()
    await council.cleaner.find()
    assert [run async for run in council.runs.live()] == []
    whole = await council.checkpoints.create(whole=True)
    await council.checkpoints.list()
    await council.checkpoints.plan_restore(whole.id)
    await council.history.at(await council.history.position())


@pytest.mark.parametrize("changes", [{"progress": "50%"}, {"status": "completed"}, {"status": "in_progress"}])
async def test_update_with_unknown_fields_is_rejected_with_the_known_ones(
    council: Council, changes: JsonObject
) -> None:
    """An unknown field of a task, an invalid status; nothing is written."""
    position = await council.history.position()
    with pytest.raises(RefusedError) as refused:
        await council.state.update(API, lambda value: {**(value or {}), **changes})
    assert ("under `annotations`" if "progress" in changes else "'pending', 'running'") in str(refused.value)
    assert await council.history.position() == position
    await read_project(council)


async def test_progress_is_accepted(council: Council) -> None:
    """`annotations` of a task and of a run takes any fields, next to the states that a person can set."""
    noted = {"progress": "50%", "files": ["a.py"], "metrics": {"lines": 3}}
    made = await council.state.update(API, lambda task: {**(task or {}), "annotations": noted, "status": "failed"})
    assert made is not None
    assert (made.value["annotations"], made.value["status"]) == (noted, "failed")
    run = await council.state.update(Key("run", RUN), lambda value: {**(value or {}), "annotations": {"owner": "ada"}})
    assert run is not None
    assert {one.run for one in await council.runs.list()} == {RUN, OTHER}


async def test_recorded_progress_is_restored_by_a_repair(council: Council) -> None:
    """Also integers of more than 64 bits, which some JSON encoders reject."""
    noted = {"x": 2**80, "name": "é\u2028", "files": []}
    for key in (API, Key("run", RUN)):
        await council.state.update(key, partial(merge, {"annotations": noted}))
        await put(council._context.store, key, lambda value: {**value, "progress": "50%"})
        assert (await council.state.repair()).is_valid
        repaired = await council.state.get(key)
        assert repaired is not None
        assert repaired.value["annotations"] == noted


async def test_only_a_run_records_work(council: Council) -> None:
    """A writer can't mark work as landed; attempts, commits and claims are not writable."""
    words: list[JsonObject] = [{"status": "landed"}, {"status": "queued"}, {"attempts": []}, {"commit": "0" * 40}]
    for changes in words:
        with pytest.raises(RefusedError, match=r"written only by the run|manually|can't have"):
            await council.state.update(API, partial(merge, changes))
    for key in (Key("claim", f"{RUN}/api"), Key("lease", f"run/{RUN}"), Key("spec", f"{RUN}/api"), Key("note", "x")):
        with pytest.raises(RefusedError, match="written only by council"):
            await council.state.update(key, lambda _: {"epoch": 99})
    with pytest.raises(RefusedError, match="does not exist"):
        await council.state.update(Key("run", "made-up"), lambda _: {})
    assert await council.state.update(Key("memo", "x"), lambda _: {"any": ["thing"]}) is not None


DEEP: JsonObject = {}
for _ in range(220):
    DEEP = {"x": DEEP}
ROUND: JsonObject = {}
ROUND["x"] = ROUND
#: Values that no store takes.
IMPOSSIBLE: Mapping[str, Any] = {
    "a list": [1],
    "text": "x",
    "NaN": {"annotations": {"x": float("nan")}},
    "an infinity": {"ended": float("inf"), "reason": float("inf")},
    "a set": {"annotations": {"x": {1}}},
    "bytes": {"annotations": {"x": b"x"}},
    "a name that is a number": {"annotations": {1: 2}},
    "a field that is a number": {1: 2},
    "an unpaired surrogate": {"annotations": {"x": "\ud800"}},
    "itself": {"annotations": ROUND},
    "more than fits": {"annotations": {"x": "x" * (5 << 20)}},
}
#: Values that a document of ours must not have.
UNFIT: Mapping[str, tuple[Key, JsonObject]] = {
    "depth": (API, {"annotations": DEEP}),
    "an end behind all dates": (Key("run", RUN), {"ended": 1e300}),
    "no capacity": (Key("run", RUN), {"capacity": 0}),
    "less than no capacity": (Key("run", RUN), {"capacity": -3}),
    "more capacity than there is": (Key("run", RUN), {"capacity": 10**15}),
}


@pytest.mark.parametrize("state", [None, "memory:"])
@pytest.mark.parametrize("key", [API, Key("run", RUN), Key("memo", "x")], ids=str)
async def test_unstorable_value_is_rejected(
    council: Council, repository: Repository, key: Key, state: str | None
) -> None:
    """Each writing function raises our error, and nothing is written."""
    async with Council.open(repository.top, state=state, environ=repository.environ) as opened:
        if state is not None:
            for each in (await council.history.at(await council.history.position())).documents.values():
                await opened._context.store.commit(Commit([Write(each.key, 0, each.value)]))
        position = await opened.history.position()
        for name, value in IMPOSSIBLE.items():
            before = await opened.state.get(key)
            whole = {**(before.value if before else {}), **value} if isinstance(value, dict) else value
            for write in (
                lambda whole=whole: opened.state.update(key, lambda _: whole),
                lambda whole=whole: opened.state.apply_updates([DocumentUpdate(key, RUN_STARTED, "me", whole)]),
            ):
                with pytest.raises(CouncilError):
                    await write()
                assert await opened.history.position() == position, name


@pytest.mark.parametrize("name", UNFIT)
async def test_value_that_breaks_commands_is_rejected(council: Council, name: str) -> None:
    """They have the right type, but nothing could be shown or started with them."""
    key, changes = UNFIT[name]
    with pytest.raises(RefusedError, match="can't have this value"):
        await council.state.update(key, partial(merge, changes))
    await put(council._context.store, key, partial(merge, changes))
    await read_project(council)
    with pytest.raises(UnreadableDocument):
        await council.runs.status(RUN)
    with pytest.raises(UnreadableDocument):  # its writable fields are unknown
        await council.state.update(key, lambda value: {**(value or {}), "annotations": {"a": 1}})
    assert (await council.state.repair()).is_valid


CHECKPOINT: JsonObject = {
    "position": 1,
    "reason": "",
    "created_by": "user",
    "status": None,
    "task_counts": {},
    "sessions": [],
}
BROKEN: Mapping[str, tuple[Key, Callable[[JsonObject], JsonObject]]] = {
    "a field too many": (API, lambda value: {**value, "progress": "50%"}),
    "an unknown status": (API, lambda value: {**value, "status": "completed"}),
    "a current attempt that is not there": (API, lambda value: {**value, "current": 7}),
    "running without an attempt": (API, lambda value: {**value, "attempts": []}),
    "a run started at some word": (Key("run", RUN), lambda value: {**value, "started": "now"}),
    "a run whose retention is none": (Key("run", RUN), lambda value: {**value, "retention": {"age": "x"}}),
    "a run that says nothing": (Key("run", RUN), lambda _: {}),
    "a run shared in some other way": (Key("run", RUN), lambda value: {**value, "coordination": {"x": 1}}),
    "a run of other workflows": (Key("run", RUN), lambda value: {**value, "workflows": {"fix": [{"x": 1}]}}),
    "an order without its fields": (Key("spec", f"{RUN}/api"), lambda _: {"id": "api"}),
    "a claim of nobody": (Key("claim", f"{RUN}/api"), lambda _: {"epoch": 1}),
    "an orchestrator that is none": (Key("orchestrator", f"{RUN}/box-4711-9b3e50"), lambda _: {"ended": None}),
    "an adapter that is none": (Key("adapter", f"{RUN}/fixer"), lambda _: {"cooldowns": "x"}),
    "a cooldown that is none": (Key("cooldown", "fixer/aa"), lambda _: {"until": "x"}),
    "a request that is none": (Key("request", f"{RUN}/x"), lambda _: {"action": "sing"}),
    "a checkpoint that is none": (Key("checkpoint", f"{RUN}/9"), lambda _: {"position": "x"}),
    "a checkpoint without a number": (Key("checkpoint", f"{RUN}/models"), lambda _: {}),
    "a checkpoint by nobody": (Key("checkpoint", f"{RUN}/9"), lambda _: {**CHECKPOINT, "created_by": "them"}),
    "a status that is a list": (API, lambda value: {**value, "status": ["running"]}),
    "a lock that is none": (Key("named_lock", "deploy"), lambda _: {"holders": [{}], "waiters": []}),
    "a conflict that is none": (Key("conflict", "x"), lambda _: {"key": "x"}),
    "an ownership that is none": (Key("ownership", f"aa/{RUN}/api.1"), lambda _: {"run": 1}),
    "a context that is none": (Key("context", f"{RUN}/api.1"), lambda _: {"run": 1}),
    "a lease to land that is none": (Key("lease", "merge/aa"), lambda _: {"waiting": 3}),
    "a note that is none": (Key("note", "aa/1"), lambda _: {"text": 3}),
    "ports that are none": (Key("ports", "box/4000"), lambda _: {"slot": 3}),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_unreadable_document_affects_its_run_only(council: Council, name: str) -> None:
    """The error names it and the fix; all else works; a repair goes back to the last readable version."""
    key, change = BROKEN[name]
    before = await council.state.get(key)
    await put(council._context.store, key, change)
    await read_project(council)
    assert OTHER in [one.run for one in await council.runs.list()]
    for what, look in read_run(council, OTHER).items():
        if what != "resume":
            await look()
    refused: list[str] = []
    for look in read_run(council, RUN).values():
        try:
            await look()
        except RefusedError as error:
            refused.append(str(error))
    assert "\n" not in "".join(refused)
    found = await council.state.verify()
    assert (list(found.unreadable), found.is_valid) == ([key], False)
    assert str(key) in " ".join(f"{one.name} {one.message}" for one in (await council.state.check_health()).findings)

    after = await council.state.repair()
    assert after.is_valid
    now = await council.state.get(key)
    assert (now is None) == (before is None)
    if now is not None and before is not None:
        assert {**now.value, "epoch": 0} == {**before.value, "epoch": 0}
    kept = [one.value for one in await council.history.versions(key)]
    assert change(before.value if before else {}) in kept
    assert {one.run for one in await council.runs.list()} == {RUN, OTHER}


async def test_rejection_names_the_document_and_the_fix(council: Council, repository: Repository) -> None:
    """In one line, by `status` and `resume`; `runs` lists the others and reports it."""
    await put(council._context.store, Key("task", f"{OTHER}/api"), lambda value: {**value, "status": "completed"})
    for command in (["status"], ["resume"], ["state", "show"], ["checkpoint", "create"]):
        ended = repository.council(*command)
        if command[0] != "checkpoint":
            assert ended.code == 2, ended
            assert f"task/{OTHER}/api can't be read: status: " in ended.stderr
            assert "`council state verify --repair`" in ended.stderr
        assert "internal" not in ended.stderr
    listed = repository.council("runs")
    assert (listed.code, RUN in listed.stdout, f"task/{OTHER}/api can't be read" in listed.stderr) == (0, True, True)
    verified = repository.council("state", "verify")
    assert (verified.code, f"task/{OTHER}/api: can't be read: status: " in verified.stdout) == (1, True)
    assert repository.council("state", "verify", "--repair").code == 0
    assert repository.council("status").code == 130


@pytest.mark.parametrize("place", ["state.appended", "state.published"])
async def test_killed_repair_continues(council: Council, repository: Repository, place: str) -> None:
    """Some documents are restored by then; the next repair does the rest, and the one after that nothing."""
    keys = [Key(kind, f"{run}/{task}") for kind in ("task", "spec") for run in (RUN, OTHER) for task in RECORDED]
    before = [found and found.value for found in [await council.state.get(key) for key in keys]]
    for key in keys:
        await put(council._context.store, key, lambda value: {**value, "progress": "50%"})
    repair = ["state", "verify", "--repair"]
    for number in (1, 2, 3):
        assert repository.council(*repair, failpoints=f"{place}=kill@{number}").code == -signal.SIGKILL
    assert repository.council("state", "verify").code == 1
    assert repository.council(*repair).code == 0
    assert [found and found.value for found in [await council.state.get(key) for key in keys]] == before
    position = await council.history.position()
    assert repository.council(*repair).code == 0
    assert await council.history.position() == position


def test_each_kind_is_known(council: Council) -> None:
    """Every document that the project's runs have recorded is readable, regardless of its kind."""
    assert {"run", "task", "spec", "lease", "claim", "orchestrator"} <= DOCUMENT_KINDS


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1e6, 1e6) | st.sampled_from(["", "x", "landed", RUN]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "epoch", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """Return a value with one part replaced or removed."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        name = draw(st.sampled_from(sorted(value)))
        if not draw(st.integers(0, 5)):
            return {key: one for key, one in value.items() if key != name}
        return {**value, name: draw(changed(value[name]))}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(changed(value[place])), *value[place + 1 :]]
    return draw(VALUES)


@given(data=st.data())
@example_settings(40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
async def test_commands_work_with_any_overwritten_document(council: Council, data: st.DataObject) -> None:
    """The write is rejected, or all commands work as before."""
    documents = (await council.history.at(22)).documents  # as the fixture made them, at each example
    key = data.draw(st.sampled_from(sorted(key for key in documents if key.kind in DOCUMENT_KINDS)))
    value = data.draw(changed(documents[key].value))
    with suppress(RefusedError):
        await council.state.update(key, lambda _: value if isinstance(value, dict) else {"x": value})
    await read_project(council)
    for run in (RUN, OTHER):
        for name, look in read_run(council, run).items():
            if name not in {"resume", "checkpoint"}:
                await look()
    assert await find_unreadable(council._context.store) == []


@given(data=st.data())
@example_settings(15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
async def test_commands_work_with_foreign_documents_of_one_run(council: Council, data: st.DataObject) -> None:
    """Past all validation, any of its documents: no other run is affected, and a repair works."""
    documents = {key: one for key, one in (await council.history.at(22)).documents.items() if OTHER not in key.id}
    key = data.draw(st.sampled_from(sorted(documents)))
    value = data.draw(changed(documents[key].value))
    await put(council._context.store, key, lambda _: value if isinstance(value, dict) else {"x": value})
    await read_project(council)
    for what, look in read_run(council, OTHER).items():
        if what != "resume":
            await look()
    for look in read_run(council, RUN).values():
        with suppress(RefusedError):
            await look()
    assert (await council.state.repair()).is_valid
    assert (await council.state.repair()).is_valid
    await read_project(council)
    await put(council._context.store, key, lambda _: documents[key].value)


@given(data=st.data())
@example_settings(150, deadline=None)
def test_accepted_value_is_readable(data: st.DataObject) -> None:
    """For any change of any document of ours: an accepted value has no error."""
    value = json.loads(run_document(Path("/"), RUN).model_dump_json())
    key = data.draw(st.sampled_from([Key("run", RUN), API]))
    before = value if key.kind == "run" else {"status": "pending", "attempts": [], "annotations": {}}
    after = data.draw(changed(before))
    found = Document(key, 1, json.dumps(before).encode(), 1)
    if isinstance(after, dict):
        try:
            check_manual_change(key, found, after)
        except RefusedError:
            return
        assert find_document_error(found._replace(encoded=json.dumps(after).encode())) is None


async def test_unreadable_document_has_its_own_error(council: Council) -> None:
    """The exception has the document's key."""
    found = await council._context.store.get(API)
    assert found is not None
    await council._context.store.commit(Commit([Write(API, found.version, {"status": "odd"})]))
    with pytest.raises(UnreadableDocument) as caught:
        await council.runs.status(RUN)
    assert caught.value.key == str(API)
