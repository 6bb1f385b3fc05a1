"""Opening of a council: project, plugins and store, from a file or a folder."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import anyio.to_thread

from orchestrator.api.context import LazyPlugins, ProjectContext, StopSignal
from orchestrator.client.session import SessionRequestError, find_session
from orchestrator.config.store import folder_url, scheme_of, to_store_url
from orchestrator.errors import CouncilError, RefusedError, StoreUnreachable
from orchestrator.project import (
    LEGACY_RECORD,
    Project,
    council_home,
    exclude_from_git,
    find_project,
    is_import_complete,
)
from orchestrator.protocols import Store
from orchestrator.repo.git.command import Git
from orchestrator.repo.source.user_checkouts import find_repository, refuse_tracked_project_folder
from orchestrator.state import offline
from orchestrator.state.log.identity import check_trusted
from orchestrator.state.stores.file import open_if_file
from orchestrator.system.clock import Clock

if TYPE_CHECKING:
    from orchestrator.config.model import RunConfig
    from orchestrator.config.schema import Config
    from orchestrator.plugins import Plugins

OnOutage = Literal["fail", "pause", "wait"]
"""What to do while the server of the store does not answer; see `Council.open`."""
_IN_SESSION: Final = (
    "sessions have no access to the state of runs",
    "use the commands for sessions, such as `council ask TASK`, `council peers` and `council notes`",
)


@asynccontextmanager
async def open_project(
    source: str | Path | Config | RunConfig | None,
    plugins: Plugins | None,
    state: str | None,
    clock: Clock,
    environ: Mapping[str, str],
    on_outage: OnOutage,
    stop: StopSignal,
) -> AsyncIterator[tuple[ProjectContext, RunConfig | None, Sequence[str]]]:
    """Open a project and its store during the body; see `Council.open`. The store gives up waiting after `stop`.

    Yields the project, the run of the source if it is not a folder, and messages about how the state was opened.
    """
    source = "." if source is None else source
    config, is_known = None, True
    chosen = to_store_url(state or environ.get("COUNCIL_STATE", "")) or None
    if isinstance(source, str | Path) and await anyio.to_thread.run_sync(os.path.isdir, source):
        project, is_known = await anyio.to_thread.run_sync(_find_source_project, Path(source), chosen, environ)
    else:
        from orchestrator.api.loading import load_run  # noqa: PLC0415  slow; commands that show a run read no file

        plugins, config, project = await load_run(source, plugins, environ)
    await refuse_tracked_project_folder(project, environ)
    if is_known:  # outside its project, a store is only read
        await anyio.to_thread.run_sync(project.create)
    url = await anyio.to_thread.run_sync(_resolve_store_url, project, config) if chosen is None else chosen
    is_named = chosen is not None or config is not None or url == folder_url(project.state_folder)
    await anyio.to_thread.run_sync(partial(check_trusted, url, council_home(environ), is_named=is_named))
    lazy_plugins = LazyPlugins(plugins, environ, [project.top])
    async with _open_store(url, lazy_plugins, clock, on_outage, stop) as store:
        notices = await _import_legacy_state(store, project, clock, environ) if state is None else ()
        context = ProjectContext(project, store, url, clock, environ, lazy_plugins, follows_file=chosen is None)
        yield context, config, notices


def _find_source_project(folder: Path, chosen: str | None, environ: Mapping[str, str]) -> tuple[Project, bool]:
    """Return the project that contains a folder, and True. Blocks.

    Outside a project, returns the folder itself as a project, and False; this requires a `chosen` store. Raises
    RefusedError if there is neither.
    """
    try:
        return find_project(folder), True
    except RefusedError:
        if chosen is None:
            with suppress(SessionRequestError):
                find_session(environ, str(folder.absolute()))
                raise RefusedError(*_IN_SESSION) from None
            raise
        return Project(folder.absolute()), False


def _resolve_store_url(project: Project, config: RunConfig | None) -> str:
    """Return the store URL of the file, or else of the newest run. Blocks."""
    if config is None:
        return project.store()
    return config.state.url or folder_url(project.state_folder)


async def _import_legacy_state(
    store: Store, project: Project, clock: Clock, environ: Mapping[str, str]
) -> Sequence[str]:
    """Import state in an earlier format into an empty store; return notices.

    Completes an interrupted import.
    """
    record = await store.get(LEGACY_RECORD)
    if await store.position() if record is None else is_import_complete(record):
        return ()
    if not await anyio.to_thread.run_sync(project.has_legacy):
        return ()
    from orchestrator.state.legacy.importer import import_legacy_state  # noqa: PLC0415  slow, and needed once per project

    with suppress(CouncilError, OSError):  # a folder without a repository needs no exclusion
        repository = await find_repository(project.top, Git(None, as_user=True, environ=environ))
        await anyio.to_thread.run_sync(exclude_from_git, repository.git_dir)
    return await import_legacy_state(store, project, clock.now())


@asynccontextmanager
async def _open_store(
    url: str, plugins: LazyPlugins, clock: Clock, on_outage: OnOutage, stop: StopSignal
) -> AsyncIterator[Store]:
    """Open the store at a URL, without loading plugins if it is a built-in one."""
    async with AsyncExitStack() as stack:

        async def enter() -> Store:
            opened = open_if_file(url, clock)
            if opened is None:
                from orchestrator.state.stores.plugin import BUILTIN_STORES  # noqa: PLC0415  (slow, and not for files)

                open_store = BUILTIN_STORES.get(scheme_of(url)) or (await plugins.load()).open_store
                opened = open_store(url, clock)
            return await stack.enter_async_context(opened)

        try:
            store = await enter()
        except StoreUnreachable as error:
            if on_outage != "wait":
                raise
            store = await offline.wait_for_server(enter, error, clock)
        if on_outage != "fail" and not store.local_paths():
            store = offline.pausing_store(store, clock, lambda: stop.is_set)
        yield store
