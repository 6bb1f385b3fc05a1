"""What sessions find in the homes of their tasks, whatever an earlier one left there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.config.model import Reach
from orchestrator.errors import RefusedError
from orchestrator.protocols import Home, Overlay
from orchestrator.sessions.homes import furnish


@pytest.fixture
def user(tmp_path: Path) -> Path:
    folder = tmp_path / "user"
    (folder / ".tool").mkdir(parents=True)
    (folder / ".tool/login").write_text("theirs")
    (folder / ".tool/settings").write_text("set")
    return folder


LINKS = {"login": "~/.tool/login", "conf/settings": "~/.tool/settings", "missing": "~/.tool/missing"}


async def test_it_has_files_and_links_to_what_the_user_has(tmp_path: Path, user: Path) -> None:
    home = tmp_path / "logs/homes/task/tool"
    what = Home({"a/servers.json": "{}"}, LINKS, ("login",))
    reach = await furnish(home, what, {"HOME": str(user)})
    assert (home / "a/servers.json").read_text() == "{}"
    assert (home / "a/servers.json").stat().st_mode & 0o777 == 0o600
    assert (home / "login").read_text() == "theirs"
    assert (home / "conf/settings").read_text() == "set"
    assert not (home / "missing").is_symlink()
    assert reach == Reach(writable=(home, user / ".tool/login"), readable=(user / ".tool/settings",))


async def test_a_newer_login_that_took_a_links_place_stays(tmp_path: Path, user: Path) -> None:
    home = tmp_path / "home"
    await furnish(home, Home({}, LINKS, ("login",)), {"HOME": str(user)})
    (home / "login").unlink()
    (home / "login").write_text("newer")
    reach = await furnish(home, Home({}, LINKS, ("login",)), {"HOME": str(user)})
    assert (home / "login").read_text() == "newer"
    assert user / ".tool/login" not in reach.writable


async def test_nothing_is_written_through_a_link_that_a_session_left(tmp_path: Path, user: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    outside.mkdir()
    (outside / "victim").write_text("precious")
    (home / "folder").symlink_to(outside)
    (home / "file").symlink_to(outside / "victim")
    (home / "was-folder").mkdir()
    (home / "was-folder/x").touch()
    files = {"folder/victim": "ours", "file": "ours", "was-folder": "ours"}
    await furnish(home, Home(files, {"conf/settings": "~/.tool/settings"}), {"HOME": str(user)})
    assert [path.name for path in outside.iterdir()] == ["victim"]
    assert (outside / "victim").read_text() == "precious"
    assert [(home / name).read_text() for name in files] == ["ours"] * 3


async def test_settings_go_over_those_of_the_users(tmp_path: Path, user: Path) -> None:
    home = tmp_path / "home"
    theirs = {"ui": {"theme": "dark", "size": 1}, "list": [1, 2], "odd": {"a": 1}}
    (user / ".tool/settings").write_text(json.dumps(theirs))
    over = {"ui": {"size": 2}, "list": [3], "odd": None, "new": {"b": 2}}
    await furnish(home, Home(settings={"set.json": Overlay("~/.tool/settings", over)}), {"HOME": str(user)})
    merged = {"ui": {"theme": "dark", "size": 2}, "list": [3], "odd": None, "new": {"b": 2}}
    assert json.loads((home / "set.json").read_text()) == merged
    assert json.loads((user / ".tool/settings").read_text()) == theirs
    await furnish(home, Home(settings={"set.json": Overlay("~/.tool/missing", over)}), {"HOME": str(user)})
    assert json.loads((home / "set.json").read_text()) == over


async def test_settings_that_are_not_json_are_refused(tmp_path: Path, user: Path) -> None:
    with pytest.raises(RefusedError, match="settings is not JSON"):
        await furnish(tmp_path / "home", Home(settings={"x": Overlay("~/.tool/settings", {})}), {"HOME": str(user)})


async def test_without_a_home_of_the_users_nothing_is_linked(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert await furnish(home, Home({}, LINKS), {}) == Reach(writable=(home,))
    assert list(home.iterdir()) == []
