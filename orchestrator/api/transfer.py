"""Whole stores from one place to another: what is at a URL or in a folder, and files that hold one."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import IO

import anyio
from anyio import to_thread

from orchestrator.config.store import MEMORY, require_local_folder, scheme_of, to_store_url
from orchestrator.errors import RefusedError
from orchestrator.plugins import Plugins, load_plugins
from orchestrator.project import council_home
from orchestrator.protocols import Store
from orchestrator.state.log.identity import adopt_store, check_trusted
from orchestrator.state.stores.file import require_store
from orchestrator.state.transfer.copying import CopyResult, copy_store, export_to_stream, import_from_stream
from orchestrator.state.transfer.export_file import StagedFile
from orchestrator.state.transfer.target import TargetFolder
from orchestrator.system.clock import Clock, SystemClock


@asynccontextmanager
async def open_store(
    place: str | Path,
    *,
    is_there: bool = False,
    plugins: Plugins | None = None,
    clock: Clock | None = None,
    environ: Mapping[str, str] = os.environ,
) -> AsyncIterator[Store]:
    """Open the store at a URL or in a folder, for the body of the `async with`.

    With `is_there`, a folder that holds none is refused (RefusedError), where else one would be made.
    """
    url = to_store_url(str(place))
    if is_there:
        await to_thread.run_sync(require_store, url)
    if scheme_of(url) == "file":
        await to_thread.run_sync(check_trusted, url, council_home(environ))
    if plugins is None:
        plugins = await to_thread.run_sync(load_plugins, environ)
    async with plugins.open_store(url, clock or SystemClock()) as store:
        yield store


@asynccontextmanager
async def open_target(
    place: str | Path,
    source: str | Path | None = None,
    *,
    plugins: Plugins | None = None,
    clock: Clock | None = None,
    environ: Mapping[str, str] = os.environ,
) -> AsyncIterator[Store]:
    """Open the store at a URL or in a folder to load a whole one into it, for the body of the `async with`.

    Where that fails and nothing was committed to it, nothing of a folder stays that was made for it. RefusedError for
    the store that is gone with the process, and for a folder that can't be one of a store of its own; `source` is where
    that to copy is.
    """
    url = to_store_url(str(place))
    if url == MEMORY:
        raise RefusedError("what is copied to memory: is gone at once", "name a folder, or the URL of another store")
    folder, within = (
        require_local_folder(url),
        require_local_folder(to_store_url(str(source))) if source is not None else None,
    )
    if folder is None:
        async with open_store(url, plugins=plugins, clock=clock, environ=environ) as store:
            yield store
        return
    target = await to_thread.run_sync(TargetFolder, folder, within)
    try:
        async with open_store(url, plugins=plugins, clock=clock, environ=environ) as store:
            yield store
    except BaseException:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(target.undo)
        raise


async def copy_state(
    source: str | Path,
    target: str | Path,
    *,
    plugins: Plugins | None = None,
    clock: Clock | None = None,
    environ: Mapping[str, str] = os.environ,
) -> CopyResult:
    """Copy a whole store into an empty one, each named by its URL or folder, also while a run is at work in it.

    Positions, times, versions, events: the past of the copy is that of the original. RefusedError, with nothing
    changed, where not all of the original can be trusted, where something is in the target already that is not the
    same, and where no store of its own can be there.
    """
    if plugins is None:
        plugins = await to_thread.run_sync(load_plugins, environ)
    async with AsyncExitStack() as stores:
        original = await stores.enter_async_context(
            open_store(source, is_there=True, plugins=plugins, clock=clock, environ=environ)
        )
        copied = await stores.enter_async_context(
            open_target(target, source, plugins=plugins, clock=clock, environ=environ)
        )
        return await copy_store(original, copied)


async def adopt_state(place: str | Path, *, environ: Mapping[str, str] = os.environ) -> str:
    """Have a store used on this machine that was made elsewhere, by its URL or folder; return its URL.

    What is in it is obeyed from then on: the commands of its runs are executed by `resume`. RefusedError where there is
    none.
    """
    url = to_store_url(str(place))
    if url == MEMORY or not (scheme_of(url) == "file" or await to_thread.run_sync(_is_installed, url, environ)):
        raise RefusedError(f"{scheme_of(url)}: is no kind of store that can be adopted", "name the folder of a store")
    await to_thread.run_sync(adopt_store, url, council_home(environ))
    return url


def _is_installed(url: str, environ: Mapping[str, str]) -> bool:
    return scheme_of(url) in load_plugins(environ).stores


async def export_store(
    store: Store, file: str | Path | IO[bytes], *, force: bool = False, clock: Clock | None = None
) -> CopyResult:
    """Write a whole store as it is now to one file; see `Council.export_state`. A stream is written to as it is."""
    now = (clock or SystemClock()).now()
    if not isinstance(file, str | Path):
        return await export_to_stream(store, file, now)
    staged = await to_thread.run_sync(partial(StagedFile, Path(file), force=force))
    try:
        copied = await export_to_stream(store, staged.stream, now)
        await to_thread.run_sync(staged.put)
    finally:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(staged.discard)
    return copied


async def import_store(file: str | Path | IO[bytes], store: Store) -> CopyResult:
    """Load a file that `export_store` wrote into an empty store; see `Council.import_state`. A stream is closed."""
    if not isinstance(file, str | Path):
        return await import_from_stream("what comes in", lambda: file, store)
    if not await to_thread.run_sync(os.path.isfile, file):
        raise RefusedError(f"there is no file {file}", "name one that `council state export` wrote")
    return await import_from_stream(str(file), lambda: Path(file).open("rb"), store)
