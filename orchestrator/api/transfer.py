"""Copy, adoption, export and import of whole stores.

A store is named by a URL, a folder or a file.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Final

import anyio
from anyio import to_thread

from orchestrator.config.store import MEMORY, require_local_folder, scheme_of, to_store_url
from orchestrator.errors import RefusedError
from orchestrator.plugins import Plugins, load_plugins
from orchestrator.project import council_home
from orchestrator.protocols import Store
from orchestrator.state.log.identity import IDENTITY_FILE, adopt_store, check_trusted, find_log
from orchestrator.state.stores.file import require_store
from orchestrator.state.transfer.copying import CopyResult, copy_store, export_to_stream, import_from_stream
from orchestrator.system.clock import Clock, SystemClock
from orchestrator.system.files import StagedFile

#: The files of a store without any commit.
_EMPTY_STORE: Final = ("lock", "compaction.lock")
#: Errors of a path at which no file can be created.
_IMPOSSIBLE_PATH: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})


@asynccontextmanager
async def open_store(
    location: str | Path,
    *,
    must_exist: bool = False,
    plugins: Plugins | None = None,
    clock: Clock | None = None,
    environ: Mapping[str, str] = os.environ,
) -> AsyncIterator[Store]:
    """Open the store at a URL or in a folder, for the body of the `async with`.

    By default, creates a store in a folder without one; with `must_exist`, raises RefusedError.
    """
    url = to_store_url(str(location))
    if must_exist:
        await to_thread.run_sync(require_store, url)
    await to_thread.run_sync(check_trusted, url, council_home(environ))
    if plugins is None:
        plugins = await to_thread.run_sync(load_plugins, environ)
    async with plugins.open_store(url, clock or SystemClock()) as store:
        yield store


@asynccontextmanager
async def open_target(
    location: str | Path,
    source: str | Path | None = None,
    *,
    plugins: Plugins | None = None,
    clock: Clock | None = None,
    environ: Mapping[str, str] = os.environ,
) -> AsyncIterator[Store]:
    """Open the store at a URL or in a folder as the target of a copy.

    `source` is the location of the original. If the body fails and nothing was committed, the folders created for the
    store are removed. Raises RefusedError for the memory store, and for a folder that can't become a separate store.
    """
    url = to_store_url(str(location))
    if url == MEMORY:
        raise RefusedError("a copy in a memory store is not kept", "use a folder, or another store's URL")
    folder, within = (
        require_local_folder(url),
        require_local_folder(to_store_url(str(source))) if source is not None else None,
    )
    if folder is None:
        async with open_store(url, plugins=plugins, clock=clock, environ=environ) as store:
            yield store
        return
    target = await to_thread.run_sync(_TargetFolder, folder, within)
    is_complete = False
    try:
        async with open_store(url, plugins=plugins, clock=clock, environ=environ) as store:
            yield store
        is_complete = True
    finally:
        if not is_complete:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(target.undo)


async def copy_state(
    source: str | Path,
    target: str | Path,
    *,
    plugins: Plugins | None = None,
    clock: Clock | None = None,
    environ: Mapping[str, str] = os.environ,
) -> CopyResult:
    """Copy a whole store into an empty one, each named by its URL or folder.

    Runs may be active. The copy has the same positions, times, versions and events. Raises RefusedError, with nothing
    changed, if the original is damaged, or if the target has other content or can't become a separate store.
    """
    if plugins is None:
        plugins = await to_thread.run_sync(load_plugins, environ)
    async with AsyncExitStack() as stores:
        original = await stores.enter_async_context(
            open_store(source, must_exist=True, plugins=plugins, clock=clock, environ=environ)
        )
        copied = await stores.enter_async_context(
            open_target(target, source, plugins=plugins, clock=clock, environ=environ)
        )
        return await copy_store(original, copied)


async def adopt_state(location: str | Path, *, environ: Mapping[str, str] = os.environ) -> str:
    """Trust a store that was created on another machine; return its URL.

    From then on, `resume` executes the commands of its runs. Raises RefusedError if there is no such store.
    """
    url = to_store_url(str(location))
    if url == MEMORY or not await to_thread.run_sync(_is_installed, url, environ):
        raise RefusedError(f"{scheme_of(url)}: stores can't be adopted", "use the folder of a store")
    await to_thread.run_sync(adopt_store, url, council_home(environ))
    return url


def _is_installed(url: str, environ: Mapping[str, str]) -> bool:
    return scheme_of(url) in load_plugins(environ).stores


async def export_store(
    store: Store, file: str | Path | IO[bytes], *, force: bool = False, clock: Clock | None = None
) -> CopyResult:
    """Write a whole store to one file or stream; see `State.export_to`."""
    now = (clock or SystemClock()).now()
    if not isinstance(file, str | Path):
        return await export_to_stream(store, file, now)
    staged = await to_thread.run_sync(_stage_export, Path(file), force)
    try:
        copied = await export_to_stream(store, staged.file, now)
        await to_thread.run_sync(_publish_export, staged, Path(file), force)
    finally:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(staged.discard)
    return copied


def _stage_export(path: Path, force: bool) -> StagedFile:
    _check_export_path(path, force)
    try:
        return StagedFile(path)
    except OSError as error:
        if error.errno in _IMPOSSIBLE_PATH:
            message = f"{path} can't be created: {(error.strerror or str(error)).lower()}"
            raise RefusedError(message, "use a file in an existing folder") from None
        raise


def _publish_export(staged: StagedFile, path: Path, force: bool) -> None:
    try:
        _check_export_path(path, force)
        staged.publish(durable=True, replace=force)
    except FileExistsError:
        _check_export_path(path, force)
        raise


def _check_export_path(path: Path, force: bool) -> None:
    if os.path.isdir(path):  # noqa: PTH112  a name that is too long is reported later
        raise RefusedError(f"{path} is a folder", "use a file")
    if not os.path.lexists(path):
        return
    if path.is_symlink():  # replacing it would leave its target unchanged, and outdated
        raise RefusedError(f"{path} is a link", "use its target")
    if not path.is_file():  # never replace a device or a pipe
        raise RefusedError(f"{path} is not a regular file", "use a regular file, or write to it with `- > FILE`")
    if not force:
        raise RefusedError(f"{path} already exists", "use another file, or overwrite it with --force")


async def import_store(file: str | Path | IO[bytes], store: Store) -> CopyResult:
    """Load an export into an empty store; see `State.import_from`.

    Closes a stream.
    """
    if not isinstance(file, str | Path):
        return await import_from_stream("the input", lambda: file, store)
    if not await to_thread.run_sync(os.path.isfile, file):
        raise RefusedError(f"there is no file {file}", "use a file that `council state export` wrote")
    return await import_from_stream(str(file), lambda: Path(file).open("rb"), store)


class _TargetFolder:
    """The target folder of a copied store. Blocks."""

    _REMEDY: Final = "use a folder that exists or can be created"

    def __init__(self, folder: Path, source: Path | None) -> None:
        """Check a folder, which need not exist; `source` is that of the original.

        Raises RefusedError if the folder is inside the source, can't be created, or contains files of anything but a
        store, which would mix with the store's files.
        """
        self._folder = folder
        try:
            self._is_store = find_log(folder) is not None
            self._check(source)
            self._created = [one for one in (folder, *folder.parents) if not one.exists()]
        except OSError as error:
            message = f"{folder} can't be used: {(error.strerror or str(error)).lower()}"
            raise RefusedError(message, self._REMEDY) from None

    def _check(self, source: Path | None) -> None:
        folder = self._folder
        nearest = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
        if not nearest.is_dir():
            raise RefusedError(f"{nearest} is not a folder", self._REMEDY)
        if source is not None and folder != source and folder.resolve().is_relative_to(source.resolve()):
            raise RefusedError(f"{folder} is inside the store to copy", "use a folder outside it")
        if not self._is_store and folder.is_dir() and any(folder.iterdir()):
            raise RefusedError(f"{folder} contains files but no store", "use a new or empty folder")

    def undo(self) -> None:
        """Remove all created files and folders, unless something was committed."""
        if self._is_store or not self._folder.is_dir():
            return
        log = find_log(self._folder)
        if log is not None:
            if log.is_dir() and any(one.name not in _EMPTY_STORE for one in log.iterdir()):
                return
            (self._folder / IDENTITY_FILE).unlink()
            shutil.rmtree(log, ignore_errors=True)
        with suppress(OSError):  # not empty: another program has added files
            for folder in self._created:
                folder.rmdir()
