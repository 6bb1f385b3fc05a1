"""The folder that a task's sessions with one adapter have to themselves: for what their CLI keeps from one to the next.

A session may write in it what it likes, links too. So what we put there never goes through one of them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio.to_thread

from orchestrator.config.model import Reach
from orchestrator.errors import RefusedError
from orchestrator.protocols import Home, JsonObject, Overlay


def home_folder(logs: Path, task: str, adapter: str) -> Path:
    """Return the home of a task's sessions with an adapter, among the logs of their run."""
    return logs / "homes" / task / adapter


async def furnish(folder: Path, what: Home, environ: Mapping[str, str]) -> Reach:
    """Put into a home what a session is to find there; return what it may reach for it.

    Raises OSError; RefusedError where settings are to go over what is not JSON.
    """
    return await anyio.to_thread.run_sync(_furnish, folder, what, environ)


async def remove(logs: Path, task: str) -> None:
    """Remove all homes of a task."""
    await anyio.to_thread.run_sync(partial(shutil.rmtree, logs / "homes" / task, ignore_errors=True))


def _furnish(folder: Path, what: Home, environ: Mapping[str, str]) -> Reach:
    for one in (folder.parents[1], folder.parent, folder):
        one.mkdir(mode=0o700, parents=True, exist_ok=True)
    texts = {name: _laid_over(one, environ) for name, one in what.settings.items()}
    for name, text in {**what.files, **texts}.items():
        path = _clear(folder, name)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    readable: list[Path] = []
    writable = [folder]
    for name, leads_to in what.links.items():
        target = _expanded(leads_to, environ)
        if target is None or not target.exists():
            continue
        path = folder / name
        # What the program has put in its place, such as a newer login, stays.
        if path.is_symlink() or not path.exists():
            _clear(folder, name).symlink_to(target)
            (writable if name in what.renewed else readable).append(target)
    return Reach(writable=tuple(writable), readable=tuple(readable))


def _laid_over(settings: Overlay, environ: Mapping[str, str]) -> str:
    file = _expanded(settings.of, environ)
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.exists() else {}
    except ValueError:
        remedy = "correct it (comments are none of JSON), or set `home: shared`, with which it is left as it is"
        raise RefusedError(f"{file} is not JSON, and settings of a session's own are to go over it", remedy) from None
    return json.dumps(_merged(found if isinstance(found, dict) else {}, settings.over))


def _merged(below: JsonObject, over: JsonObject) -> JsonObject:
    both = {
        key: _merged(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
        for key, value in over.items()
    }
    return {**below, **both}


def _expanded(path: str, environ: Mapping[str, str]) -> Path | None:
    if not path.startswith("~/"):
        return Path(path)
    home = environ.get("HOME")
    return None if not home else Path(home) / path[2:]


def _clear(folder: Path, name: str) -> Path:
    """Return the path of a name where nothing is any more, and that no link leads to."""
    path = folder
    for part in Path(name).parts[:-1]:
        path /= part
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            path.mkdir(mode=0o700)
    path /= Path(name).name
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return path
