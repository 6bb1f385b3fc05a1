"""`council state copy`, `export` and `import` on a made-up run, and during an active one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import Council, copy_state
from orchestrator.errors import RefusedError
from orchestrator.project import council_home
from orchestrator.protocols import Commit, Event, Key
from orchestrator.state.documents.update import update_document
from orchestrator.state.log.identity import ensure_log
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock
from tests.conftest import Repository
from tests.recorded_run import RUN, recorded_project
from tests.waiting import wait_for

pytestmark = pytest.mark.extended_rest


@pytest.fixture
async def project(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """Return a repository with the recorded run."""
    async with recorded_project(repository.top, monkeypatch):
        pass
    return repository


def log_of(repository: Repository, *words: str) -> str:
    """Return all commits of a store as `council state log` prints them."""
    return repository.council("state", "log", "--json", *words).stdout


async def test_state_is_copied_from_folder_to_file_to_folder(project: Repository, tmp_path: Path) -> None:
    """Each command prints the size; the last log equals the first."""
    copied = project.council("state", "copy", ".council/state", str(tmp_path / "copy"), "--json").result
    assert (copied["position"], copied["first"], copied["commits"], copied["documents"]) == (11, 0, 11, 9)
    assert (copied["file_bytes"], copied["compression_ratio"], copied["already_present"]) == (None, None, False)
    url = (tmp_path / "copy").as_uri()
    assert log_of(project, "--state", url) == log_of(project)
    exported = project.council("state", "export", "file", "--state", url, "--json").result
    assert exported["bytes"] == copied["bytes"]
    assert exported["file_bytes"] == (project.top / "file").stat().st_size
    assert exported["compression_ratio"] == pytest.approx(exported["bytes"] / exported["file_bytes"], abs=0.01)
    again = str(tmp_path / "again")
    imported = project.council("state", "import", "file", "--state", again, "--json").result
    assert imported == {**exported, "already_present": False}
    assert log_of(project, "--state", (tmp_path / "again").as_uri()) == log_of(project)
    shown = project.council("state", "import", "file", "--state", again)
    assert (shown.code, shown.stdout.split(":")[0]) == (0, "already imported"), shown


@pytest.mark.extended
async def test_state_is_copied_through_a_pipe(project: Repository, tmp_path: Path) -> None:
    """Messages do not mix with the data; a truncated stream is rejected."""
    council = [sys.executable, "-m", "orchestrator.cli.main", "state"]
    sent = subprocess.run(
        [*council, "export", "-", "--json"], cwd=project.top, env=project.environ, capture_output=True, check=True
    )
    assert json.loads(sent.stderr)["file_bytes"] == len(sent.stdout)
    where = ["import", "-", "--state", str(tmp_path / "copy")]
    half = subprocess.run(
        [*council, *where], cwd=tmp_path, env=project.environ, input=sent.stdout[:900], capture_output=True, check=False
    )
    assert (half.returncode, b"truncated" in half.stderr) == (2, True), half
    whole = subprocess.run(
        [*council, *where], cwd=tmp_path, env=project.environ, input=sent.stdout, capture_output=True, check=True
    )
    assert whole.stdout.startswith(b"imported ")
    assert log_of(project, "--state", (tmp_path / "copy").as_uri()) == log_of(project)
    gone = subprocess.run(
        f"{' '.join(council)} export - | true; exit ${{PIPESTATUS[0]}}",
        cwd=project.top, env=project.environ, shell=True, executable="/bin/bash", capture_output=True, check=False,
    )  # fmt: skip
    assert gone.returncode in {0, 2}, gone  # it may all have fitted into the pipe buffer
    assert b"Traceback" not in gone.stderr


async def test_impossible_copy_is_rejected(project: Repository, tmp_path: Path) -> None:
    """With a remedy, and nothing changed."""
    (tmp_path / "other").mkdir()
    (project.top / "file").write_text("mine")
    (project.top / "text").write_text("no export\n")
    async with FileStore.open(project.log_in(tmp_path / "taken"), SystemClock()) as store:
        await store.commit(Commit(events=[Event("e")]))
    for words, error, remedy in (
        (["copy", str(tmp_path / "other"), str(tmp_path / "copy")], "there is no state in", "the folder of a store"),
        (["copy", ".council/state", str(tmp_path / "taken")], "not empty", "such as a new folder"),
        (["export", "file"], "already exists", "--force"),
        (["export", "nowhere/file"], "can't be created", "in an existing folder"),
        (["export", "out", "--state", "none"], "there is no state in /", "the folder of a store"),
        (["import", "text", "--state", str(tmp_path / "copy")], "not a state export", "export the state again"),
    ):
        refused = project.council("state", *words, "--json")
        assert (refused.code, refused.result["status"]) == (2, "refused"), (words, refused)
        assert error in refused.result["error"], words
        assert remedy in refused.result["remedy"], words
    assert (project.top / "file").read_text() == "mine"
    assert not any((tmp_path / "other").iterdir())
    assert not (project.top / "out").exists()
    assert project.council("state", "export", "file", "--force").code == 0
    elsewhere = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli.main", "state", "import", str(project.top / "file")],
        cwd=tmp_path / "other", env=project.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert elsewhere.returncode == 2
    assert "--state .council/state" in elsewhere.stderr


async def test_copy_needs_a_location_for_the_store(project: Repository, tmp_path: Path) -> None:
    """Neither loaded; nothing is created or changed there."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    os.mkfifo(outside / "pipe")
    (outside / "loop").symlink_to("loop")
    assert project.council("state", "export", str(tmp_path / "whole")).code == 0
    before = [sorted(folder.rglob("*")) for folder in (outside, project.top / ".council/state")]
    for target, error in (
        (outside / "file", "is not a folder"),
        (outside / "file" / "under", "is not a folder"),
        (outside / "pipe", "is not a folder"),
        (outside / "loop", "is not a folder"),
        (outside / ("x" * 300), "can't be used"),
        (outside, "contains files but no store"),
        (project.top, "contains files but no store"),
        ("memory:", "is not kept"),
    ):
        for words in (
            ["copy", ".council/state", str(target)],
            ["import", str(tmp_path / "whole"), "--state", str(target)],
        ):
            refused = project.council("state", *words, "--json")
            assert (refused.code, refused.result["status"]) == (2, "refused"), (words, refused)
            assert error in refused.result["error"], words
            assert "resume" not in refused.stderr
    inside = project.council("state", "copy", ".council/state", ".council/state/sub/copy")
    assert inside.code == 2
    assert "inside the store to copy" in inside.stderr
    assert [sorted(folder.rglob("*")) for folder in (outside, project.top / ".council/state")] == before


@pytest.mark.parametrize("is_there", [True, False])
async def test_rejected_copy_leaves_nothing(project: Repository, tmp_path: Path, *, is_there: bool) -> None:
    """Neither a new folder nor new files in an existing one; an empty one stays empty."""
    (project.top / "text").write_text("no export\n")
    target = tmp_path / "new" / "folder"
    if is_there:
        target.mkdir(parents=True)
    segment = next((project.top / ".council/state").glob("*/*.jsonl"))
    segment.write_bytes(segment.read_bytes().replace(b'"landed":"4f0c2d1e9b', b'"landed":"000000000b', 1))
    for words in (["import", "text", "--state", str(target)], ["copy", ".council/state", str(target)]):
        assert project.council("state", *words).code == 2
        assert target.exists() == (tmp_path / "new").exists() == is_there
        assert not is_there or not any(target.iterdir())


async def test_damage_is_not_copied(project: Repository, tmp_path: Path) -> None:
    """The repaired state is copied instead."""
    segment = next((project.top / ".council/state").glob("*/*.jsonl"))
    segment.write_bytes(segment.read_bytes().replace(b'"landed":"4f0c2d1e9b', b'"landed":"000000000b', 1))
    for words in (["copy", ".council/state", str(tmp_path / "copy")], ["export", "file"]):
        refused = project.council("state", *words)
        assert refused.code == 2
        assert f"task/{RUN}/models" in refused.stderr
        assert "council state verify --repair" in refused.stderr
    assert not (project.top / "file").exists()
    assert project.council("state", "verify", "--repair").code == 0
    assert project.council("state", "copy", ".council/state", str(tmp_path / "copy")).code == 0
    assert project.council("state", "verify", "--state", (tmp_path / "copy").as_uri()).code == 0


@pytest.mark.extended
async def test_active_run_can_be_copied(repository: Repository, tmp_path: Path) -> None:
    """It continues and lands; the copy is one of its states."""
    child = repository.start("run", str(repository.configure([{"id": "a", "prompt": "write a.txt a\nhang"}])))
    wait_for((repository.top / ".council/state/identity").exists)
    wait_for(lambda: '"task.started"' in log_of(repository), 60)
    copied = repository.council("state", "copy", ".council/state", str(tmp_path / "copy"), "--json").result
    assert repository.council("cancel", "a").code == 0
    child.communicate(timeout=60)
    url = (tmp_path / "copy").as_uri()
    reported = log_of(repository, "--state", url)
    assert len(reported.splitlines()) == copied["position"] > 0
    assert log_of(repository).startswith(reported)
    await repository.assert_invariants()


async def test_copy_works_from_python(project: Repository, tmp_path: Path) -> None:
    async with Council.open(project.top, environ=project.environ) as council:
        exported = await council.state.export_to(str(tmp_path / "file"))
        with pytest.raises(RefusedError, match="not empty"):
            await council.state.import_from(await _another(tmp_path, council))
    copied = await copy_state(project.top / ".council/state", tmp_path / "copy")
    assert (copied.commits, copied.bytes) == (exported.commits, exported.bytes)
    async with Council.open(project.top, state=str(tmp_path / "new"), environ=project.environ) as council:
        assert (await council.state.import_from(str(tmp_path / "file"))).documents == 9
        assert await council.runs.ids() == [RUN]


async def _another(folder: Path, council: Council) -> Path:
    """Return an export of a store of another program."""
    async with FileStore.open(ensure_log(folder / "else", council_home(os.environ)), SystemClock()) as store:
        await store.commit(Commit(events=[Event("else")]))
    async with Council.open(council.project.top, state=(folder / "else").as_uri()) as other:
        await other.state.export_to(folder / "other-file")
    return folder / "other-file"


def test_imported_state_is_not_part_of_the_repository(repository: Repository, tmp_path: Path) -> None:
    """git ignores it once it becomes the project's state, before any run."""
    assert repository.council("run", str(repository.configure([{"id": "a", "prompt": "write a.txt a"}]))).code == 0
    assert repository.council("state", "export", str(tmp_path / "file")).code == 0
    new = tmp_path / "new"
    repository.git("clone", "--quiet", str(repository.top), str(new))
    subprocess.run(
        [sys.executable, "-m", "orchestrator.cli.main", "state", "import", str(tmp_path / "file"),
         "--state", ".council/state"],
        cwd=new, env=repository.environ, capture_output=True, check=True,
    )  # fmt: skip
    assert repository.git("-C", str(new), "status", "--porcelain") == ""


async def test_unreadable_documents_are_reported(project: Repository, tmp_path: Path) -> None:
    """They are copied unchanged; each command names them, with the defect and the fix."""
    key, flaw = f"task/{RUN}/api", "progress: extra inputs are not permitted"
    async with Council.open(project.top, environ=project.environ) as council:
        await update_document(
            council._context.store, Key("task", f"{RUN}/api"), lambda value: {**(value or {}), "progress": "50%"}
        )
    again = str(tmp_path / "again")
    for words in (["export", "file"], ["import", "file", "--state", again], ["copy", again, str(tmp_path / "copy")]):
        done = project.council("state", *words)
        assert (done.code, f"warning: {key} can't be read: {flaw}\n" in done.stderr) == (0, True), done
        assert "`council state verify --repair`" in done.stderr
    result = project.council("state", "import", "file", "--state", again, "--json").result
    assert result["unreadable"] == {key: flaw}
    assert project.council("state", "verify", "--repair", "--state", again).code == 0
    copied = await copy_state(again, tmp_path / "sound")
    assert copied.unreadable == {}
