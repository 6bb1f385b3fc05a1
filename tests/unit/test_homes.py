"""What sessions find in the homes of their tasks, whatever an earlier one left there."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config.model import Reach
from orchestrator.protocols import Home
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


async def test_without_a_home_of_the_users_nothing_is_linked(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert await furnish(home, Home({}, LINKS), {}) == Reach(writable=(home,))
    assert list(home.iterdir()) == []
