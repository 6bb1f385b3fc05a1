"""CLI homes of tasks: settings that a session finds, regardless of leftovers of earlier ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.domain.settings.run_settings import PathAccess
from orchestrator.errors import RefusedError
from orchestrator.protocols import SessionHome, SettingsOverlay
from orchestrator.sessions.setup.adapter_homes import remove_homes, set_up, write_back_logins


@pytest.fixture
def user(tmp_path: Path) -> Path:
    folder = tmp_path / "user"
    (folder / ".tool").mkdir(parents=True)
    (folder / ".tool/login").write_text("theirs")
    (folder / ".tool/settings").write_text("set")
    return folder


LINKS = {"login": "~/.tool/login", "conf/settings": "~/.tool/settings", "missing": "~/.tool/missing"}


async def test_home_has_files_and_links_to_the_users(tmp_path: Path, user: Path) -> None:
    home = tmp_path / "logs/homes/task/tool"
    what = SessionHome({"a/servers.json": "{}"}, LINKS, ("login",))
    reach = await set_up(home, what, {"HOME": str(user)})
    assert (home / "a/servers.json").read_text() == "{}"
    assert (home / "a/servers.json").stat().st_mode & 0o777 == 0o600
    assert (home / "login").read_text() == "theirs"
    assert (home / "conf/settings").read_text() == "set"
    assert not (home / "missing").is_symlink()
    assert reach == PathAccess(writable=(home, user / ".tool/login"), readable=(user / ".tool/settings",))


async def test_renewed_login_in_place_of_a_link_stays(tmp_path: Path, user: Path) -> None:
    home = tmp_path / "home"
    await set_up(home, SessionHome({}, LINKS, ("login",)), {"HOME": str(user)})
    (home / "login").unlink()
    (home / "login").write_text("newer")
    reach = await set_up(home, SessionHome({}, LINKS, ("login",)), {"HOME": str(user)})
    assert (home / "login").read_text() == "newer"
    assert user / ".tool/login" not in reach.writable


async def test_renewed_login_in_another_file_is_copied_back(tmp_path: Path, user: Path) -> None:
    home, what = tmp_path / "home", SessionHome({}, LINKS, ("login",))
    await set_up(home, what, {"HOME": str(user)})
    (home / "new").write_text("newer, and longer than before")
    (home / "new").replace(home / "login")
    (home / "conf/settings").unlink()
    (home / "conf/settings").write_text("changed")
    await write_back_logins(home, what, {"HOME": str(user)})
    assert (user / ".tool/login").read_text() == "newer, and longer than before"
    assert (user / ".tool/settings").read_text() == "set"
    await set_up(home, what, {"HOME": str(user)})
    assert (home / "login").is_symlink()


async def test_home_replaced_by_a_link_is_recreated(tmp_path: Path, user: Path) -> None:
    home = tmp_path / "homes/t/a"
    home.parent.mkdir(parents=True)
    home.symlink_to(user)
    await set_up(home, SessionHome({".tool/settings": "ours"}), {})
    assert (user / ".tool/settings").read_text() == "set"
    assert (home / ".tool/settings").read_text() == "ours"


@pytest.mark.extended
async def test_deep_trees_are_handled(tmp_path: Path) -> None:
    home = tmp_path / "logs/homes/t/a"
    await set_up(home, SessionHome(), {})
    deepen = "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')"
    (home / "file").mkdir()
    subprocess.run([sys.executable, "-S", "-c", deepen], cwd=home / "file", check=True)
    await set_up(home, SessionHome({"file": "ours"}), {})
    assert (home / "file").read_text() == "ours"
    subprocess.run([sys.executable, "-S", "-c", deepen], cwd=home, check=True)
    await remove_homes(tmp_path / "logs", ["t", "other"], {})
    assert not (tmp_path / "logs/homes/t").exists()


async def test_settings_that_are_not_a_file_are_rejected(tmp_path: Path, user: Path) -> None:
    (user / ".tool/settings").unlink()
    os.mkfifo(user / ".tool/settings")
    with pytest.raises(RefusedError, match="is not a regular file"):
        await set_up(
            tmp_path / "home", SessionHome(settings={"x": SettingsOverlay("~/.tool/settings", {})}), {"HOME": str(user)}
        )
    (user / ".tool/settings").unlink()
    (user / ".tool/settings").write_text('{"a":' * 100_000)
    with pytest.raises(RefusedError, match="not valid JSON"):
        await set_up(
            tmp_path / "home", SessionHome(settings={"x": SettingsOverlay("~/.tool/settings", {})}), {"HOME": str(user)}
        )


async def test_links_left_by_a_session_are_not_followed(tmp_path: Path, user: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    outside.mkdir()
    (outside / "victim").write_text("precious")
    (home / "folder").symlink_to(outside)
    (home / "file").symlink_to(outside / "victim")
    (home / "was-folder").mkdir()
    (home / "was-folder/x").touch()
    files = {"folder/victim": "ours", "file": "ours", "was-folder": "ours"}
    await set_up(home, SessionHome(files, {"conf/settings": "~/.tool/settings"}), {"HOME": str(user)})
    assert [path.name for path in outside.iterdir()] == ["victim"]
    assert (outside / "victim").read_text() == "precious"
    assert [(home / name).read_text() for name in files] == ["ours"] * 3


async def test_settings_override_the_users(tmp_path: Path, user: Path) -> None:
    home = tmp_path / "home"
    theirs = {"ui": {"theme": "dark", "size": 1}, "list": [1, 2], "odd": {"a": 1}}
    (user / ".tool/settings").write_text(json.dumps(theirs))
    over = {"ui": {"size": 2}, "list": [3], "odd": None, "new": {"b": 2}}
    await set_up(
        home, SessionHome(settings={"set.json": SettingsOverlay("~/.tool/settings", over)}), {"HOME": str(user)}
    )
    merged = {"ui": {"theme": "dark", "size": 2}, "list": [3], "odd": None, "new": {"b": 2}}
    assert json.loads((home / "set.json").read_text()) == merged
    assert json.loads((user / ".tool/settings").read_text()) == theirs
    await set_up(
        home, SessionHome(settings={"set.json": SettingsOverlay("~/.tool/missing", over)}), {"HOME": str(user)}
    )
    assert json.loads((home / "set.json").read_text()) == over


async def test_settings_that_are_not_json_are_rejected(tmp_path: Path, user: Path) -> None:
    with pytest.raises(RefusedError, match="settings is not valid JSON"):
        await set_up(
            tmp_path / "home", SessionHome(settings={"x": SettingsOverlay("~/.tool/settings", {})}), {"HOME": str(user)}
        )


async def test_missing_user_home_links_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert await set_up(home, SessionHome({}, LINKS), {}) == PathAccess(writable=(home,))
    assert list(home.iterdir()) == []


async def test_list_settings_are_appended(tmp_path: Path, user: Path) -> None:
    """Lists are appended; other settings override the user's."""
    (user / ".tool/settings").write_text('{"hooks": {"before": ["theirs"], "after": ["theirs"]}, "keep": [1]}')
    added = {"hooks": {"before": ["ours"]}, "new": ["ours"]}
    what = SessionHome(settings={"s.json": SettingsOverlay("~/.tool/settings", {"hooks": {"after": []}}, added)})
    await set_up(tmp_path / "home", what, {"HOME": str(user)})
    found = json.loads((tmp_path / "home/s.json").read_text())
    assert found == {"hooks": {"before": ["theirs", "ours"], "after": []}, "keep": [1], "new": ["ours"]}
