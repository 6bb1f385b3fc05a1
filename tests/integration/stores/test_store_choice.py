"""The choice of a command's store: by option, environment, file, or the newest run's file."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.store import folder_url
from tests.conftest import Repository
from tests.sandboxes import needs_sandbox

_TASK = {"id": "one", "prompt": "write one.txt 1", "attempts": 1}


def holds_a_log(folder: Path) -> bool:
    """Return whether a store in a folder was written to."""
    return any(folder.glob("*/*.jsonl*"))


@pytest.mark.extended
@pytest.mark.parametrize("form", ["url", pytest.param("folder", marks=pytest.mark.slow)])
def test_later_commands_use_the_store_of_the_newest_run(repository: Repository, tmp_path: Path, form: str) -> None:
    """A store named only by the file is used without the file, until a newer run names another."""
    elsewhere = tmp_path / "state of mine"
    named: dict[str, Any] = {"state": folder_url(elsewhere)} if form == "url" else {"state_dir": "state of mine"}
    ended = repository.council("run", str(repository.configure([_TASK], **named)), "--json")
    assert ended.states == {"one": "landed"}, ended
    assert holds_a_log(elsewhere)
    assert not holds_a_log(repository.top / ".council/state")
    first = repository.council("status", "--json").result["run"]
    assert first == ended.result["run"]
    assert repository.council("where", "--json").result["state"] == str(elsewhere)
    assert repository.council("state", "show", "--json").result["run"] == first
    repository.git("commit", "--quiet", "--allow-empty", "--message", "more")
    second = repository.council("run", str(repository.configure([_TASK | {"prompt": "write two.txt 2"}])), "--json")
    assert holds_a_log(repository.top / ".council/state")
    assert repository.council("status", "--json").result["run"] == second.result["run"]
    assert repository.council("status", "--json", "--state", str(elsewhere)).result["run"] == first


@pytest.mark.extended
def test_option_overrides_environment_which_overrides_the_file(repository: Repository, tmp_path: Path) -> None:
    """Each source overrides the next ones, and an option is not remembered."""
    folders = {name: tmp_path / name for name in ("flag", "environment", "file")}
    path = repository.configure([_TASK], state=folder_url(folders["file"]))
    repository.environ["COUNCIL_STATE"] = folder_url(folders["environment"])
    assert repository.council("run", str(path), "--state", folder_url(folders["flag"])).code == 0
    assert {name: holds_a_log(folder) for name, folder in folders.items()} == {
        "flag": True, "environment": False, "file": False,
    }  # fmt: skip
    repository.council("run", str(path))
    assert holds_a_log(folders["environment"])
    assert not holds_a_log(folders["file"])
    del repository.environ["COUNCIL_STATE"]
    assert "has no run" in repository.council("status").stderr or repository.council("status").code == 2
    repository.council("run", str(path))
    assert holds_a_log(folders["file"])


@pytest.mark.extended_variants
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"file:///a\nfile:///b\n", b"file://[", b"a folder", None])
def test_invalid_store_is_reported(repository: Repository, content: bytes | None) -> None:
    """With the file, whatever replaced it; a pipe does not block."""
    (repository.top / ".council/state").mkdir(parents=True)
    chosen = repository.top / ".council/store"
    if content is None:
        os.mkfifo(chosen)
    else:
        chosen.write_bytes(content)
    ended = repository.council("runs", "--json")
    assert (ended.code, ended.result["status"]) == (2, "refused"), ended
    assert str(chosen) in ended.result["error"]
    assert "remove it" in ended.result["remedy"]
    chosen.unlink()
    assert repository.council("runs", "--json").code == 0


@pytest.mark.extended
def test_run_continues_in_the_store_of_its_file(repository: Repository, tmp_path: Path) -> None:
    """`resume` and `retry` find it without the file."""
    path = repository.configure([_TASK | {"prompt": "exit 1"}], state_dir=str(tmp_path / "state"))
    assert repository.council("run", str(path)).code == 1
    assert repository.council("retry", "one").code == 0
    resumed = repository.council("resume", "--json")
    assert resumed.states == {"one": "failed"}
    assert resumed.result["tasks"][0]["attempts"] == 1


@needs_sandbox
def test_session_sees_no_store(repository: Repository, tmp_path: Path) -> None:
    """State in another folder is also hidden from sessions."""
    store = tmp_path / "state"
    path = repository.configure(
        [_TASK], state_dir=str(store), adapters={"look": {"use": "command", "argv": ["sh", "-c", f"ls {store} >seen"]}}
    )
    ended = repository.council("run", str(path), "--json")
    assert ended.states["one"] in {"landed", "failed"}
    seen = repository.top / "seen"
    assert not seen.exists() or seen.read_text() == ""


@pytest.mark.extended
def test_clean_keeps_hubs_of_runs_in_another_store(repository: Repository, tmp_path: Path) -> None:
    """A run of one store is not left over just because another store does not know it."""
    path = repository.configure([_TASK], state_dir=str(tmp_path / "state"))
    assert repository.council("run", str(path), failpoints="session.ended=kill").code == -signal.SIGKILL
    own = repository.configure([_TASK | {"prompt": "write two.txt 2"}])
    ended = repository.council("run", str(own))
    assert ended.code == 0, ended.stdout
    cleaned = repository.council("clean", "--preserved", "--yes", "--json").result
    assert [one for one in cleaned["found"] if one["kind"] != "slot"] == []
    assert repository.council("resume", "--state", str(tmp_path / "state")).code == 0
    assert (repository.top / "one.txt").exists()


@pytest.mark.extended_variants
@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"state": "state"}, "is not a store URL"),
        ({"state": "file:state"}, "is not a folder on this machine"),
        ({"state": "file://[a"}, "is not a folder on this machine"),
        ({"state": {"url": "memory:"}, "state_dir": "x"}, "`state` already sets the store"),
        ({"state": 3}, "a store can't be"),
        ({"state": {"retention": "5000d"}}, "too long"),
        ({"state": {"max_size": "1"}}, "a size can't be"),
    ],
)
def test_unusable_store_is_reported_with_its_position(
    repository: Repository, settings: dict[str, Any], reported: str
) -> None:
    """The file's mistakes are found before anything is opened."""
    path = repository.configure([_TASK], **settings)
    ended = repository.council("validate", str(path), "--json")
    assert ended.code == 2
    assert reported in json.dumps(ended.result, ensure_ascii=False)
