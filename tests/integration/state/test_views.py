"""The readable views equal the store, whatever happens to them; and nothing depends on them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from orchestrator.engine.views import document_path, encode_json, export_views, version_path, version_view
from orchestrator.errors import RefusedError
from orchestrator.project import Project
from orchestrator.protocols import VERSIONS_KEPT, Commit, Event, JsonObject, Key, Store, Write
from orchestrator.state.documents.validation import DOCUMENT_KINDS
from orchestrator.state.log.identity import ensure_log
from orchestrator.state.stores.file import FileStore
from orchestrator.state.stores.memory import MemoryStore
from orchestrator.system.clock import SystemClock
from orchestrator.testing.clock import ManualClock
from tests.conftest import Repository
from tests.recorded_run import RUN, RUN_STARTED, record_run, recorded_project, run_document
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs/state.md").read_text()
MODELS = Key("task", f"{RUN}/models")
#: Files with another source than documents.
OTHERS = {"index.json", "events.jsonl", "ownership.json"}


def content(views: Path) -> dict[str, bytes]:
    """Return all files."""
    return {str(path.relative_to(views)): path.read_bytes() for path in views.rglob("*") if path.is_file()}


async def assert_equal(views: Path, store: Store) -> None:
    """Check that the views equal the store, with nothing missing or extra."""
    found = content(views)
    expected: dict[str, bytes] = {}
    for kind in (*DOCUMENT_KINDS, "other"):
        for document in await store.list(kind):
            expected[document_path(document.key)] = encode_json(document.to_json())
            if kind == "task":
                for version in await store.history(document.key):
                    expected[version_path(document.key, version.version)] = encode_json(
                        version_view(document.key, version)
                    )
    assert {
        name: data for name, data in found.items() if name not in OTHERS and not name.startswith("context/")
    } == expected
    position, events = await store.position(), []
    async for record in store.watch():
        events += [(record.position, record.time, event.type, event.data) for event in record.events]
        if record.position == position:
            break
    reported = [json.loads(line) for line in found["events.jsonl"].splitlines()]
    assert [(one["position"], one["time"], one["type"], one["data"]) for one in reported] == events
    assert json.loads(found["index.json"])["position"] == position
    for path in (views, *views.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


async def assert_equal_in(repository: Repository) -> None:
    """Check the views of a project."""
    async with FileStore.open(repository.log, SystemClock()) as store:
        await assert_equal(repository.top / ".council/views", store)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Return a folder with state."""
    made = Project(tmp_path)
    made.create()
    return made


@pytest.fixture(params=["memory", "file"])
async def store(request: pytest.FixtureRequest, project: Project) -> AsyncIterator[Store]:
    """Yield a store of each kind with a run of two tasks, one landed, one running."""
    clock = ManualClock(RUN_STARTED)
    if request.param == "memory":
        memory = MemoryStore(clock)
        await record_run(memory, clock, run_document(project.top))
        yield memory
    else:
        async with FileStore.open(ensure_log(project.state_folder), clock, segment_bytes=4000) as opened:
            await record_run(opened, clock, run_document(project.top))
            yield opened


async def rewrite(store: Store, key: Key, times: int) -> None:
    """Rewrite a document this many times."""
    for number in range(times):
        found = await store.get(key)
        value: JsonObject = {**(found.value if found else {}), "reason": f"number {number}"}
        await store.commit(
            Commit([Write(key, found.version if found else 0, value)], [Event("wrote", {"n": 2**70 + number})])
        )


async def test_views_equal_the_store_after_a_run(repository: Repository) -> None:
    """Every document, version and event; a run writes them only if they were requested before."""
    tasks = [
        {"id": "models", "prompt": "write a.txt a", "owns": ["a.txt"]},
        {"id": "API", "prompt": "attempt 1 exit 1\nwrite b.txt b", "needs": ["models"]},
    ]
    config = str(repository.configure(tasks))
    assert repository.council("run", config, "--json").code == 0
    top = repository.top / ".council/views"
    assert not top.exists()
    assert repository.council("state", "views").code == 0
    await assert_equal_in(repository)
    assert repository.council("run", config, "--json").code in {0, 1}
    await assert_equal_in(repository)
    assert json.loads((top / "ownership.json").read_text()) == {"owners": []}
    assert not list(top.glob("context/*/*"))
    before = content(top)
    reported = repository.council("state", "views", "--json").result
    assert (reported["path"], reported["position"]) == (str(top), json.loads(before["index.json"])["position"])
    assert {**content(top), "index.json": b""} == {**before, "index.json": b""}
    await repository.assert_invariants()


async def test_running_session_is_shown(repository: Repository) -> None:
    tasks = [{"id": "slow", "prompt": "hang", "owns": ["src/", "a.txt"]}]
    child = repository.start("run", str(repository.configure(tasks)))
    top = repository.top / ".council/views"
    try:

        def find_context() -> list[JsonObject]:
            repository.council("state", "views")
            contexts = [json.loads(file.read_text()) for file in top.glob("context/*/slow.json")]
            return [found for found in contexts if found["worktree"]]

        [context] = wait_for(find_context)
        assert Path(context["worktree"], "README.md").is_file()
        assert (context["task"], context["attempt"], context["adapter"]) == ("slow", 1, "fake")
        assert context["branch"] == f"council/{context['run']}/slow/1"
        [owner] = json.loads((top / "ownership.json").read_text())["owners"]
        assert (owner["run"], owner["task"], owner["owns"]) == (context["run"], "slow", ["src/", "a.txt"])
        assert owner["started"] == context["started"]
        state = json.loads((top / "tasks" / context["run"] / "slow/state.json").read_text())
        assert state["value"]["status"] == "running"
    finally:
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=30)
    await assert_equal_in(repository)
    assert not list(top.glob("context/*/*"))


async def test_deleted_and_modified_views_are_restored(repository: Repository) -> None:
    """By the command, and by the next run; the state itself is unaffected."""
    config = repository.configure([{"id": "a", "prompt": "write a.txt a"}])
    assert repository.council("run", str(config)).code == 0
    assert repository.council("state", "views").code == 0
    top = repository.top / ".council/views"
    status = repository.council("status", "--json").result

    def damage(name: str, text: str | None) -> None:
        for path in top.glob(name):
            if text is not None:
                path.write_text(text)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    index = json.loads((top / "index.json").read_text())
    for name, text in (
        ("tasks/*/a/state.json", '{"value": {"status": "failed"}}'),
        ("events.jsonl", None),
        ("tasks", None),
        ("index.json", json.dumps({**index, "position": index["position"] - 1})),
        ("index.json", json.dumps({**index, "position": 99_999})),
        ("index.json", "lies"),
    ):
        damage(name, text)
        async with FileStore.open(repository.log, SystemClock()) as store:
            await export_views(store, Project(repository.top), 0.0)
            await assert_equal(top, store)
    damage("tasks/*/a/state.json", '{"value": {"status": "failed"}}')
    damage("runs", None)
    assert repository.council("status", "--json").result == status
    assert repository.council("state", "views").code == 0
    await assert_equal_in(repository)
    shutil.rmtree(top)
    assert repository.council("state", "views").code == 0
    await assert_equal_in(repository)


async def test_export_replaces_links_without_following_them(store: Store, project: Project, tmp_path: Path) -> None:
    """The target keeps its content and mode; a file in place of the folder is an error."""
    elsewhere = tmp_path / "elsewhere"
    project.views.write_text("mine")
    with pytest.raises(RefusedError, match="is not a folder"):
        await export_views(store, project, 0.0)
    project.views.unlink()
    await rewrite(store, Key("task", "r/a"), 3)
    await export_views(store, project, 0.0)
    await assert_equal(project.views, store)
    run = project.views / "tasks/r"
    shutil.copytree(run, elsewhere)
    elsewhere.chmod(0o755)
    before = content(elsewhere)
    shutil.rmtree(run)
    run.symlink_to(elsewhere)
    await rewrite(store, Key("task", "r/b"), 3)
    await export_views(store, project, 0.0)
    await assert_equal(project.views, store)
    assert content(elsewhere) == before
    assert elsewhere.stat().st_mode & 0o777 == 0o755


@pytest.mark.extended_variants
@pytest.mark.parametrize("name", ["views.written", "views.replaced"])
async def test_killed_export_is_completed(repository: Repository, name: str) -> None:
    """Nothing is duplicated, missing, or left of the killed one."""
    config = repository.configure([{"id": "a", "prompt": "write a.txt a"}])
    (repository.top / ".council/views").mkdir(parents=True)
    assert repository.council("run", str(config), failpoints=f"{name}=kill").code == -signal.SIGKILL
    assert repository.council("state", "views").code == 0
    await assert_equal_in(repository)
    killed = repository.council("state", "views", failpoints=f"{name}=kill")
    assert killed.code == -signal.SIGKILL
    assert repository.council("state", "views").code == 0
    await assert_equal_in(repository)
    assert sorted(path.name for path in (repository.top / ".council").glob("views*")) == ["views", "views.lock"]


async def test_unwritable_views_do_not_fail_a_run(repository: Repository) -> None:
    """It is recorded once; a file is in place of their folder."""
    config = repository.configure([{"id": name, "prompt": f"write {name}.txt a"} for name in ("a", "b")])
    (repository.top / ".council").mkdir()
    (repository.top / ".council/views").write_text("no folder")
    ended = repository.council("run", str(config), "--json")
    assert ended.code == 0, ended
    assert set(ended.states.values()) == {"landed"}
    [reported] = [line for line in ended.lines if line.get("event") == "views.failing"]
    assert ".council/views" in reported["reason"]
    refused = repository.council("state", "views")
    assert refused.code != 0


async def test_repeated_export_shows_the_newest_state(store: Store, project: Project) -> None:
    """Only the last ten versions stay; deleted documents are removed; unusual ids get files."""
    for times in (1, 4, 25):
        await rewrite(store, MODELS, times)
        await store.commit(Commit([Write(Key("other", f"{times}/A/../é"), 0, {"n": 2**70})]))
        await export_views(store, project, 0.0)
        await assert_equal(project.views, store)
    await store.commit(Commit([Write(Key("other", "25/A/../é"), 1, None), Write(Key("task", "r/A/b"), 0, {})]))
    await export_views(store, project, 0.0)
    await assert_equal(project.views, store)
    assert len(list(project.views.glob(f"tasks/{RUN}/models/history/*"))) == VERSIONS_KEPT


async def test_export_of_another_store_replaces_all_files(store: Store, project: Project) -> None:
    """Equal positions prove nothing."""
    await export_views(store, project, 0.0)
    clock = ManualClock(RUN_STARTED + 1000)
    other = MemoryStore(clock)
    await record_run(other, clock, run_document(project.top, "20270102-030405-ab12"))
    await rewrite(other, Key("other", "x"), 5)
    await export_views(other, project, 0.0)
    await assert_equal(project.views, other)


async def test_concurrent_exports_leave_complete_views(store: Store, project: Project) -> None:
    """One waits for the other."""
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(export_views, store, project, 0.0)
    await assert_equal(project.views, store)


async def test_documents_behind_the_compacted_log_are_exported(project: Project) -> None:
    """Documents and their last versions; events from the start of the log."""
    clock = ManualClock(RUN_STARTED)
    async with FileStore.open(ensure_log(project.state_folder), clock, segment_bytes=2000) as store:
        await record_run(store, clock, run_document(project.top))
        await rewrite(store, MODELS, 15)
        first = (await store.compact(clock.now() + 1, 0)).first
        assert first > 0
        await export_views(store, project, 0.0)
        found = content(project.views)
        for document in await store.list("task"):
            assert found[document_path(document.key)] == encode_json(document.to_json())
            for version in await store.history(document.key):
                assert json.loads(found[version_path(document.key, version.version)])["value"] == version.value
        assert [json.loads(line)["position"] > first for line in found["events.jsonl"].splitlines()].count(False) == 0


async def test_damage_is_shown(project: Project) -> None:
    """An older value is in the view with the flag that it has in the store."""
    clock = ManualClock(RUN_STARTED)
    key = Key("task", "r/a")
    async with FileStore.open(ensure_log(project.state_folder), clock) as store:
        await store.commit(Commit([Write(key, 0, {"n": "first"})]))
        await store.commit(Commit([Write(key, 1, {"n": "second"})]))
        await store.commit(Commit())
        await export_views(store, project, 0.0)
    [log] = project.state_folder.glob("*/*.jsonl")
    log.write_bytes(log.read_bytes().replace(b'"second"', b'"sec0nd"'))
    async with FileStore.open(ensure_log(project.state_folder), clock) as store:
        await export_views(store, project, 0.0)
        reported = json.loads((project.views / "tasks/r/a/state.json").read_text())
        assert (reported["damaged"], reported["value"], reported["version"]) == (True, {"n": "first"}, 2)
        assert json.loads((project.views / "index.json").read_text())["damage"]


@pytest.mark.parametrize("example", re.findall(r"```sh\n\$ (.*?)```", GUIDE, re.DOTALL), ids=lambda text: text[:40])
async def test_guide_examples_work(repository: Repository, monkeypatch: pytest.MonkeyPatch, example: str) -> None:
    """The shell commands of docs/state.md print what it shows."""
    line, _, expected = example.partition("\n")
    if line.startswith("jq") and shutil.which("jq") is None:
        pytest.skip("jq is missing")
    repository.environ["TZ"] = "UTC"
    async with recorded_project(repository.top, monkeypatch):
        pass
    assert repository.council("state", "views").code == 0
    done = subprocess.run(["sh", "-c", line], cwd=repository.top, capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == expected
