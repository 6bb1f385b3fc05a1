"""Handling of SIGINT, SIGTERM and SIGHUP: the first ends a command cleanly, the second at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable

import anyio
from anyio.abc import TaskStatus

from orchestrator.cli.core.error_boundary import EXIT_INTERRUPTED
from orchestrator.cli.render.output import Output

_TERMINATING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class InterruptHandler:
    """The reaction to the first signal: cancels the command, unless it has a cleaner way to end."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self.is_stopping = False
        """Whether the first signal has come."""
        self.stop: Callable[[], None] | None = None
        """Called instead, where it is set; the command then ends by itself."""

    async def guard(self, command: Awaitable[int | None]) -> int:
        """Await the command and return its exit code (None is 0), or that of an interruption."""
        async with anyio.create_task_group() as group:
            await group.start(self._listen, group.cancel_scope)
            code = await command or 0
            group.cancel_scope.cancel()
            return code
        self._output.failure({"status": "interrupted", "exit": EXIT_INTERRUPTED}, "council: interrupted")
        return EXIT_INTERRUPTED

    async def _listen(self, scope: anyio.CancelScope, *, task_status: TaskStatus[None]) -> None:
        # What was ignored when we were started (by nohup, say) stays ignored.
        heeded = [one for one in _TERMINATING_SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
        with anyio.open_signal_receiver(*heeded) as signals:
            task_status.started()
            async for _ in signals:
                if self.is_stopping:
                    # The supervisors see us go and kill what they run; all that is recorded is there for `resume`.
                    self._output.failure(
                        {"status": "interrupted", "exit": EXIT_INTERRUPTED},
                        "council: stopped at once; `council resume` continues the run",
                    )
                    sys.stdout.flush()
                    os._exit(EXIT_INTERRUPTED)
                self.is_stopping = True
                if self.stop is None:
                    scope.cancel()
                else:
                    self._output.notice("stopping sessions and saving their work; press Ctrl-C again to stop at once")
                    self.stop()
