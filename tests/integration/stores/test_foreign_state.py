"""A state from another machine is not used, however it got into the folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.store import folder_url
from orchestrator.errors import RefusedError
from orchestrator.project import Project, council_home
from orchestrator.state.log.identity import IDENTITY_FILE, check_trusted, ensure_log, find_log
from tests.conftest import Repository
from tests.faults import SHELL_ADAPTER

pytestmark = pytest.mark.extended

NOT_OURS = "created on another machine"


def forged(repository: Repository, tmp_path: Path) -> tuple[Path, Path]:
    """Return the `.council` of another machine with an interrupted run whose command leaves a trace, and the trace."""
    trace = tmp_path / "trace"
    task = {"id": "evil", "prompt": f"touch {trace}", "adapter": "sh"}
    config = repository.configure([task], adapters={"sh": SHELL_ADAPTER}, sandbox="off")
    elsewhere = {**repository.environ, "COUNCIL_HOME": str(tmp_path / "another-machine")}
    attacker = Repository(repository.top, elsewhere, repository.spawns)
    assert attacker.council("run", str(config), failpoints="worktree.created=kill").code < 0
    assert not trace.exists()
    made = tmp_path / "made"
    shutil.move(repository.top / ".council", made)
    return made, trace


async def test_file_name_does_not_make_a_segment(repository: Repository, tmp_path: Path) -> None:
    """Not even one that would replace the whole log: `verify`, `status` and `resume` ignore it."""
    made, trace = forged(repository, tmp_path)
    ended = repository.council("run", str(repository.configure([{"id": "mine", "prompt": "write a.txt a"}])), "--json")
    state = Project(repository.top).state_folder
    for segment in (made / "state").glob("*/*.jsonl"):
        for name in (segment.name, f"{1:020d}-{99999999:020d}.jsonl", f"{12:020d}.jsonl"):
            shutil.copy(segment, state / name)
    shutil.copytree(next(path.parent for path in (made / "state").glob("*/*.jsonl")), state / ("0" * 32))
    for command in (["status"], ["resume"]):
        assert repository.council(*command, "--json").result["run"] == ended.result["run"]
    assert repository.council("state", "verify").code == 0
    assert [one["run"] for one in repository.council("runs", "--json").result["runs"]] == [ended.result["run"]]
    assert not trace.exists()
    await repository.assert_invariants()


def test_foreign_state_is_rejected_until_adopted(repository: Repository, tmp_path: Path) -> None:
    """By every command, also after the printed fix, which deletes nothing."""
    made, trace = forged(repository, tmp_path)
    shutil.copytree(made, repository.top / ".council")
    repository.git("add", "--force", ".council")
    repository.git("commit", "--quiet", "--message", "bring it")
    files = sorted(path for path in (repository.top / ".council").rglob("*"))
    tracked = repository.council("resume")
    assert (tracked.code, "git rm -r --cached .council" in tracked.stderr) == (2, True)
    repository.git("rm", "-r", "--quiet", "--cached", ".council")
    repository.git("commit", "--quiet", "--message", "as it said")
    for command in (
        ["resume"],
        ["status"],
        ["state", "verify"],
        ["state", "copy", ".council/state", str(tmp_path / "c")],
    ):
        refused = repository.council(*command)
        assert (refused.code, NOT_OURS in refused.stderr) == (2, True), (command, refused)
    assert sorted(path for path in (repository.top / ".council").rglob("*") if path.name != "council.log") == files
    assert not trace.exists()
    assert repository.council("state", "adopt").code == 0
    assert repository.council("status").code != 2


def test_other_spelling_of_the_folder_is_rejected(repository: Repository) -> None:
    """On a case-insensitive file system it is the same folder."""
    repository.commit({".Council/state/x": "x"})
    assert repository.council("run", str(repository.configure([{"id": "t", "prompt": "x"}]))).code == 2


@pytest.mark.parametrize(
    "url",
    [
        "file:///ELSEWHERE",
        *(
            pytest.param(url, marks=pytest.mark.slow)
            for url in ("file:///KNOWN", "postgresql://attacker@127.0.0.1:9/db")
        ),
    ],
)
def test_foreign_store_named_by_a_file_is_rejected(repository: Repository, tmp_path: Path, url: str) -> None:
    """Only a run writes that file; otherwise its writer could choose the runs to resume."""
    made, trace = forged(repository, tmp_path)
    assert repository.council("run", str(repository.configure([{"id": "mine", "prompt": "write a.txt a"}]))).code == 0
    known = tmp_path / "known"
    assert repository.council("state", "copy", ".council/state", str(known)).code == 0
    url = url.replace("file:///ELSEWHERE", folder_url(made / "state")).replace("file:///KNOWN", folder_url(known))
    (repository.top / ".council" / "store").write_text(f"{url}\n")
    refused = repository.council("resume")
    assert (refused.code, NOT_OURS in refused.stderr) == (2, True), refused
    assert not trace.exists()


def test_moved_project_is_known(repository: Repository, tmp_path: Path) -> None:
    """The log is known, not its path."""
    assert repository.council("run", str(repository.configure([{"id": "mine", "prompt": "write a.txt a"}]))).code == 0
    moved = Repository(tmp_path / "moved", repository.environ, repository.spawns)
    shutil.move(repository.top, moved.top)
    assert moved.council("status").code == 0


def test_lost_identity_is_found_and_a_lost_log_named(repository: Repository) -> None:
    """Neither a state without its identity nor one without its log becomes an empty state."""
    ended = repository.council("run", str(repository.configure([{"id": "mine", "prompt": "write a.txt a"}])), "--json")
    state = Project(repository.top).state_folder
    (state / IDENTITY_FILE).unlink()
    assert repository.council("status", "--json").result["run"] == ended.result["run"]
    shutil.rmtree(repository.log)
    for command in (["status"], ["runs"], ["state", "verify"], ["resume"]):
        refused = repository.council(*command)
        assert (refused.code, "is missing" in refused.stderr) == (2, True), (command, refused)


def test_link_is_not_a_log(repository: Repository, tmp_path: Path) -> None:
    """A link to another log, in a folder whose own identity is known."""
    made, trace = forged(repository, tmp_path)
    assert repository.council("run", str(repository.configure([{"id": "mine", "prompt": "write a.txt a"}]))).code == 0
    log = repository.log
    shutil.rmtree(log)
    log.symlink_to(next(path.parent for path in (made / "state").glob("*/*.jsonl")))
    refused = repository.council("resume")
    assert (refused.code, "is missing" in refused.stderr) == (2, True), refused
    assert not trace.exists()


def test_session_sees_no_state_of_another_project(repository: Repository, tmp_path: Path) -> None:
    """A session that reads its identity could forge it."""
    other = tmp_path / "other"
    assert repository.council("run", str(repository.configure([{"id": "mine", "prompt": "write a.txt a"}]))).code == 0
    assert repository.council("state", "copy", ".council/state", str(other)).code == 0
    script = f"cat {other}/identity >stolen || echo nothing >stolen"
    config = repository.configure([{"id": "thief", "prompt": script}], adapters={"sh": SHELL_ADAPTER})
    assert repository.council("run", str(config)).code == 0
    assert (repository.top / "stolen").read_text() == "nothing\n"


def test_adoptable_state_is_adopted(repository: Repository, tmp_path: Path) -> None:
    """An existing state in a `.council` that git does not track; no other file is reported."""
    made, _ = forged(repository, tmp_path)
    for url in ("memory:", "nosuch://x/y", str(tmp_path / "nothing")):
        assert repository.council("state", "adopt", "--state", url).code == 2, url
    shutil.copytree(made, repository.top / ".council")
    repository.git("add", "--force", ".council")
    assert "git rm -r --cached .council" in repository.council("state", "adopt").stderr


def test_unusable_home_is_rejected(repository: Repository, tmp_path: Path) -> None:
    """With its path and the fix, not as an internal error; `doctor` reports an unknown state."""
    made, _ = forged(repository, tmp_path)
    shutil.copytree(made, repository.top / ".council")
    assert NOT_OURS in repository.council("doctor").stdout
    (tmp_path / "file").touch()
    repository.environ["COUNCIL_HOME"] = str(tmp_path / "file")
    refused = repository.council("status")
    assert (refused.code, "set COUNCIL_HOME" in refused.stderr) == (2, True), refused


def test_state_above_a_repository_is_not_its_own(repository: Repository) -> None:
    """For example one in a folder that all users can write to."""
    assert repository.council("run", str(repository.configure([{"id": "mine", "prompt": "write a.txt a"}]))).code == 0
    inner = Repository(repository.top / "inner", repository.environ, repository.spawns)
    inner.top.mkdir()
    assert inner.council("status").code == 0
    inner.git("init", "--quiet")
    assert "there is no run in" in inner.council("status").stderr


def test_store_gets_one_identity(tmp_path: Path, environ: dict[str, Any]) -> None:
    """It is recorded before it counts; a damaged one is reported."""
    home, folder = council_home(environ), tmp_path / "state"
    assert find_log(folder) is None
    check_trusted(folder_url(folder), home)
    log = ensure_log(folder, home)
    assert log == ensure_log(folder) == find_log(folder)
    check_trusted(folder_url(folder), home)
    with pytest.raises(RefusedError, match=NOT_OURS):
        check_trusted(folder_url(folder), tmp_path / "another-home")
    (folder / IDENTITY_FILE).write_text("../../evil\n")
    with pytest.raises(RefusedError, match="does not contain a log identity"):
        check_trusted(folder_url(folder), home)
