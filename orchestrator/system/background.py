"""Run tasks concurrently with a block, and code of plugins apart from it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import anyio

from orchestrator.errors import PluginFailed, RefusedError, plugin_code

T = TypeVar("T")


@asynccontextmanager
async def run_in_background(
    *tasks: Callable[[], Coroutine[Any, Any, None]], grace: float = 0, grace_after_error: float | None = None
) -> AsyncIterator[None]:
    """Run tasks concurrently with the block.

    They are cancelled `grace` seconds after it ends. After an error in the block, `grace_after_error` applies if given.
    The error is raised unchanged, not in an exception group.
    """
    raised: Exception | None = None
    async with anyio.create_task_group() as group:
        for task in tasks:
            group.start_soon(task)
        try:
            yield
        except Exception as error:  # noqa: BLE001  (raised again below, outside of the task group)
            raised = error
            grace = grace if grace_after_error is None else grace_after_error
        group.cancel_scope.deadline = anyio.current_time() + grace
    if raised is not None:
        raise raised


async def call_plugin(call: Callable[[], Awaitable[T]]) -> T:
    """Call code of a plugin in a separate task, so that a cancellation inside it does not cancel the caller.

    Raises its errors unchanged, so that its own context managers see them.
    """
    results: list[T] = []
    raised: BaseException = RuntimeError("the plugin cancelled its own task")

    async def run() -> None:
        nonlocal raised
        try:
            with plugin_code():
                results.append(await call())
        except PluginFailed as failed:
            raised = failed.__cause__ or failed

    async with anyio.create_task_group() as group:
        group.start_soon(run)
    if not results:
        raise raised
    return results[0]


async def ask_plugin(call: Callable[[], Awaitable[T]], seconds: float) -> T:
    """Call code of a plugin like `call_plugin`, for at most `seconds`.

    Raises RefusedError, TimeoutError, or PluginFailed for other errors.
    """
    with plugin_code(RefusedError, TimeoutError), anyio.fail_after(seconds):
        return await call_plugin(call)


@asynccontextmanager
async def open_plugin(opened: Callable[[], AbstractAsyncContextManager[T]], seconds: float) -> AsyncIterator[T]:
    """Open an object of a plugin for the body, within `seconds`; raise errors like `ask_plugin`."""
    async with AsyncExitStack() as stack:
        with plugin_code(RefusedError, TimeoutError), anyio.fail_after(seconds):
            made = await stack.enter_async_context(opened())
        yield made
