"""Handling of SIGINT, SIGTERM and SIGHUP.

The first signal ends a command cleanly, the second immediately.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable

import anyio
from anyio.abc import TaskStatus

from orchestrator.cli.core.error_boundary import EXIT_INTERRUPTED, ErrorLog
from orchestrator.cli.render.output import Output

_TERMINATING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class InterruptHandler:
    """The signal handler of a command.

    The first signal calls `stop` if the command has set it, or else cancels the command.
    """

    def __init__(self, output: Output, log: ErrorLog) -> None:
        self._output = output
        self._log = log
        self.is_stopping = False
        """Whether a signal was received."""
        self.stop: Callable[[], None] | None = None
        """Called instead of the cancellation, if set; the command then ends by itself."""

    async def guard(self, command: Awaitable[int | None]) -> int:
        """Await a command and return its exit code, or the code of an interruption."""
        async with anyio.create_task_group() as group:
            await group.start(self._listen, group.cancel_scope)
            code = await command or 0
            group.cancel_scope.cancel()
            return code
        self._output.failure({"status": "interrupted", "exit": EXIT_INTERRUPTED}, "council: interrupted")
        return EXIT_INTERRUPTED

    async def _listen(self, scope: anyio.CancelScope, *, task_status: TaskStatus[None]) -> None:
        # Signals that were ignored when this process started, as by nohup, stay ignored.
        handled = [one for one in _TERMINATING_SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
        with anyio.open_signal_receiver(*handled) as signals:
            task_status.started()
            async for _ in signals:
                if self.is_stopping:
                    # The supervisors notice that this process has exited, and kill their sessions; the recorded state
                    # is sufficient for `resume`.
                    self._output.failure(
                        {"status": "interrupted", "exit": EXIT_INTERRUPTED},
                        f"council: stopped; `{self._log.resume}` continues the run",
                    )
                    sys.stdout.flush()
                    os._exit(EXIT_INTERRUPTED)
                self.is_stopping = True
                if self.stop is None:
                    scope.cancel()
                else:
                    self._output.notice("stopping sessions and saving their work; press Ctrl-C again to stop now")
                    self.stop()
