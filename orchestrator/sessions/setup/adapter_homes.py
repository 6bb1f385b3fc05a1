"""The folder that a task's sessions with one adapter have to themselves: for what their CLI keeps from one to the next.

A session may write in it what it likes, links too. So all that we read and write there goes through
`orchestrator.system.untrusted_files`.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import anyio.to_thread

from orchestrator.config.model import PathAccess
from orchestrator.errors import GitError, RefusedError
from orchestrator.protocols import JsonObject, SessionHome, SettingsOverlay
from orchestrator.repo.worktrees.file_trees import remove_all
from orchestrator.system import untrusted_files

#: Bytes of settings and of a login, at most.
_LARGEST = 1 << 20
_SHARE = "set `home: shared`, with which it is left as it is"


def home_path(logs: Path, task: str, adapter: str) -> Path:
    """Return the home of a task's sessions with an adapter, among the logs of their run."""
    return logs / "homes" / task / adapter


async def set_up(folder: Path, what: SessionHome, environ: Mapping[str, str]) -> PathAccess:
    """Put into a home what a session is to find there; return what it may reach for it.

    Raises OSError and GitError; RefusedError where settings are to go over what is not JSON.
    """
    in_the_way = await anyio.to_thread.run_sync(_make, folder, [*what.files, *what.settings])
    if in_the_way:
        await remove_all(in_the_way, environ)
    return await anyio.to_thread.run_sync(_furnish, folder, what, environ)


async def write_back_logins(folder: Path, what: SessionHome, environ: Mapping[str, str]) -> None:
    """Give the user a login that a session renewed by putting a new file in the place of the link. Best effort."""
    with suppress(OSError):
        await anyio.to_thread.run_sync(_bring_back, folder, what, environ)


async def remove_homes(logs: Path, tasks: Sequence[str], environ: Mapping[str, str]) -> None:
    """Remove all homes of some tasks; what can't be removed stays with the logs of the run."""
    found = await anyio.to_thread.run_sync(_homes_of, logs, tasks)
    with suppress(OSError, GitError):
        if found:
            await remove_all(found, environ)


def _homes_of(logs: Path, tasks: Sequence[str]) -> list[Path]:
    folder, named = logs / "homes", frozenset(tasks)
    return [one for one in folder.iterdir() if one.name in named] if folder.is_dir() else []


def _make(folder: Path, names: Iterable[str]) -> list[Path]:
    """Make a home, and return the folders that are where files and links are to be.

    They are not removed here: an agent may have made trees of any depth.
    """
    for one in (folder.parents[1], folder.parent, folder):
        if one.is_symlink():
            one.unlink()
        one.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return [folder / name for name in names if untrusted_files.file_type(folder, name) == stat.S_IFDIR]


def _furnish(folder: Path, what: SessionHome, environ: Mapping[str, str]) -> PathAccess:
    texts = {name: _overlay_settings(one, environ) for name, one in what.settings.items()}
    for name, text in {**what.files, **texts}.items():
        untrusted_files.write_file(folder, name, text.encode())
    readable: list[Path] = []
    writable = [folder]
    for name, leads_to in what.links.items():
        target = _expanded(leads_to, environ)
        if target is None or not target.exists():
            continue
        # What the program has put in its place, such as a newer login, stays.
        if untrusted_files.file_type(folder, name) in {None, stat.S_IFLNK}:
            untrusted_files.make_link(folder, name, target)
            (writable if name in what.renewed else readable).append(target)
    return PathAccess(writable=tuple(writable), readable=tuple(readable))


def _bring_back(folder: Path, what: SessionHome, environ: Mapping[str, str]) -> None:
    for name in what.renewed:
        target = _expanded(what.links[name], environ)
        if target is None or not target.is_file():
            continue
        with suppress(OSError):  # still the link, or nothing that is a login
            content = untrusted_files.read_file(folder, name, _LARGEST, sole=True)
            with target.open("r+b") as theirs:
                theirs.write(content)
                theirs.truncate()
            untrusted_files.remove_file(folder, name)


def _overlay_settings(settings: SettingsOverlay, environ: Mapping[str, str]) -> str:
    file = _expanded(settings.of, environ)
    found: object = {}
    if file is not None and file.exists():
        if not file.is_file() or file.stat().st_size > _LARGEST:
            raise RefusedError(f"{file} is no file of settings, or over 1 MiB", f"correct it, or {_SHARE}")
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            what = f"{file} is not JSON that can be read, and settings of a session's own are to go over it"
            raise RefusedError(what, f"correct it (comments are none of JSON), or {_SHARE}") from None
    over = _merged(found if isinstance(found, dict) else {}, settings.over)
    return json.dumps(_merged(over, settings.added, adds=True))


def _merged(below: JsonObject, over: JsonObject, *, adds: bool = False) -> JsonObject:
    """Return `over` over `below`; where it `adds`, lists follow each other."""
    both = dict(below)
    for key, value in over.items():
        match below.get(key), value:
            case dict(under), dict():
                both[key] = _merged(under, value, adds=adds)
            case list(under), list() if adds:
                both[key] = [*under, *value]
            case _:
                both[key] = value
    return both


def _expanded(path: str, environ: Mapping[str, str]) -> Path | None:
    if not path.startswith("~/"):
        return Path(path)
    home = environ.get("HOME")
    return None if not home else Path(home) / path[2:]
