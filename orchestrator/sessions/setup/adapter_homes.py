"""Home folders of CLIs, one per task and adapter, for state between sessions.

Sessions may write anything there, including links, so we access it only through `orchestrator.system.untrusted_files`.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import anyio.to_thread

from orchestrator.domain.settings.run_settings import PathAccess
from orchestrator.errors import GitError, RefusedError
from orchestrator.protocols import JsonObject, SessionHome, SettingsOverlay
from orchestrator.repo.worktrees.files.file_trees import remove_all
from orchestrator.system import untrusted_files

#: Maximum size of a settings file or a login.
_MAX_BYTES = 1 << 20
_SHARE = "set `home: shared` to use it unchanged"


def home_path(logs: Path, task: str, adapter: str) -> Path:
    """Return the home for a task's sessions with an adapter, in the run's logs folder."""
    return logs / "homes" / task / adapter


async def set_up(folder: Path, home: SessionHome, environ: Mapping[str, str]) -> PathAccess:
    """Write a home's files, links and settings; return the access that it needs.

    Raises OSError or GitError if the home can't be written, and RefusedError if settings to overlay are not JSON.
    """
    obstructing = await anyio.to_thread.run_sync(_create, folder, [*home.files, *home.settings])
    if obstructing:
        await remove_all(obstructing, environ)
    return await anyio.to_thread.run_sync(_write_content, folder, home, environ)


async def write_back_logins(folder: Path, home: SessionHome, environ: Mapping[str, str]) -> None:
    """Copy logins that a session renewed back to the user. Best effort.

    A CLI renews a login by replacing the link with a file.
    """
    with suppress(OSError):
        await anyio.to_thread.run_sync(_copy_back, folder, home, environ)


async def remove_homes(logs: Path, tasks: Sequence[str], environ: Mapping[str, str]) -> None:
    """Remove all homes of these tasks; failures stay in the run's logs."""
    homes = await anyio.to_thread.run_sync(_homes_of, logs, tasks)
    with suppress(OSError, GitError):
        if homes:
            await remove_all(homes, environ)


def _homes_of(logs: Path, tasks: Sequence[str]) -> list[Path]:
    folder, names = logs / "homes", frozenset(tasks)
    return [path for path in folder.iterdir() if path.name in names] if folder.is_dir() else []


def _create(folder: Path, names: Iterable[str]) -> list[Path]:
    """Create a home; return the folders in it that obstruct files and links.

    They are not removed here, because an agent may have created trees of any depth.
    """
    for path in (folder.parents[1], folder.parent, folder):
        if path.is_symlink():
            path.unlink()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return [folder / name for name in names if untrusted_files.file_type(folder, name) == stat.S_IFDIR]


def _write_content(folder: Path, home: SessionHome, environ: Mapping[str, str]) -> PathAccess:
    texts = {name: _overlay_settings(settings, environ) for name, settings in home.settings.items()}
    for name, text in {**home.files, **texts}.items():
        untrusted_files.write_file(folder, name, text.encode())
    readable: list[Path] = []
    writable = [folder]
    for name, leads_to in home.links.items():
        target = _expanded(leads_to, environ)
        if target is None or not target.exists():
            continue
        # Preserve a file that the program has created, such as a newer login.
        if untrusted_files.file_type(folder, name) in {None, stat.S_IFLNK}:
            untrusted_files.make_link(folder, name, target)
            (writable if name in home.renewed else readable).append(target)
    return PathAccess(writable=tuple(writable), readable=tuple(readable))


def _copy_back(folder: Path, home: SessionHome, environ: Mapping[str, str]) -> None:
    for name in home.renewed:
        target = _expanded(home.links[name], environ)
        if target is None or not target.is_file():
            continue
        with suppress(OSError):  # still the link, or not a login
            content = untrusted_files.read_file(folder, name, _MAX_BYTES, sole=True)
            with target.open("r+b") as user_file:
                user_file.write(content)
                user_file.truncate()
            untrusted_files.remove_file(folder, name)


def _overlay_settings(settings: SettingsOverlay, environ: Mapping[str, str]) -> str:
    file = _expanded(settings.file, environ)
    base: object = {}
    if file is not None and file.exists():
        if not file.is_file() or file.stat().st_size > _MAX_BYTES:
            raise RefusedError(f"{file} is not a regular file of at most 1 MiB", f"fix it, or {_SHARE}")
        try:
            base = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            message = f"{file} is not valid JSON, so the settings of a session can't be merged into it"
            raise RefusedError(message, f"fix it (JSON has no comments), or {_SHARE}") from None
    merged = _merge(base if isinstance(base, dict) else {}, settings.overrides)
    return json.dumps(_merge(merged, settings.added, append_lists=True))


def _merge(base: JsonObject, override: JsonObject, *, append_lists: bool = False) -> JsonObject:
    """Merge `override` into `base`; `append_lists` concatenates lists."""
    merged = dict(base)
    for key, value in override.items():
        match base.get(key), value:
            case dict(old), dict():
                merged[key] = _merge(old, value, append_lists=append_lists)
            case list(old), list() if append_lists:
                merged[key] = [*old, *value]
            case _:
                merged[key] = value
    return merged


def _expanded(path: str, environ: Mapping[str, str]) -> Path | None:
    if not path.startswith("~/"):
        return Path(path)
    home = environ.get("HOME")
    return None if not home else Path(home) / path[2:]
