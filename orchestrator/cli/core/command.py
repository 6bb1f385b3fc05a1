"""Shared parts of commands: options, the context, and execution."""

from __future__ import annotations

import gc
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import update_wrapper, wraps
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import anyio
import anyio.to_thread
import click
from anyio.abc import TaskStatus

from orchestrator.api.council import Council
from orchestrator.api.opening import OnOutage
from orchestrator.cli.core.completion import complete_runs
from orchestrator.cli.core.error_boundary import (
    EXIT_INTERNAL_ERROR,
    EXIT_INTERRUPTED,
    EXIT_UNAVAILABLE,
    ErrorLog,
    error_boundary,
)
from orchestrator.cli.core.options import json_option, remember_option, wants_json
from orchestrator.cli.render.output import Output
from orchestrator.cli.render.text import printable
from orchestrator.cli.streams import write_error_message
from orchestrator.config.store import to_store_url
from orchestrator.domain.security.secrets import redact_urls
from orchestrator.engine.reports.report import RunReport
from orchestrator.errors import CouncilError, RefusedError, StoreUnavailable, describe_shortage
from orchestrator.state.stores.file import require_store

if TYPE_CHECKING:
    from orchestrator.config.model import RunConfig
    from orchestrator.plugins import Plugins
    from orchestrator.protocols import JsonObject
    from orchestrator.repo.git.change_counts import Changes

P = ParamSpec("P")
CommandT = TypeVar("CommandT", bound=Callable[..., Any] | click.Command)

_RUN, _STORE, _VERBOSE = (f"orchestrator.{name}" for name in ("run", "store", "verbose"))


_HELP_OF_RUN = "The run: its id, a unique prefix of it, or latest; default: the newest."
_TERMINATING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_option(command: CommandT, words: str = _HELP_OF_RUN) -> CommandT:
    """Add the option `--run` to a command, passed as `run`."""
    return click.option("--run", "run", metavar="RUN", help=words, shell_complete=complete_runs)(command)


def _resolve_run(context: click.Context, _: click.Parameter, named: str | None) -> str | None:
    also = context.meta.get(_RUN)
    if also is not None and named not in {None, also}:
        raise click.UsageError(f"two different runs: {named!r} and {also!r}: omit one.")
    return also or named


def run_argument(command: CommandT) -> CommandT:
    """Add the argument RUN to a command, and the equivalent option `--run`."""
    argument = click.argument("run", required=False, callback=_resolve_run, shell_complete=complete_runs)
    option = click.option(
        "--run",
        "run_of_option",
        metavar="RUN",
        help="Same as RUN.",
        expose_value=False,
        is_eager=True,
        callback=remember_option(_RUN),
        shell_complete=complete_runs,
    )
    return argument(option(command))


store_option = click.option(
    "--state",
    metavar="URL",
    expose_value=False,
    callback=remember_option(_STORE),
    help="The store of the state; default: COUNCIL_STATE, the store in the file, or that of the project.",
)


def store_option_url() -> str | None:
    """Return the URL of the store in `--state`; None if the option is absent."""
    chosen: str | None = click.get_current_context().meta.get(_STORE)
    return None if chosen is None else to_store_url(chosen)


def explicit_store_url() -> str:
    """Return the store URL of `--state` or `COUNCIL_STATE`; empty without both."""
    return store_option_url() or to_store_url(os.environ.get("COUNCIL_STATE", ""))


#: The maximum number of landed tasks with line counts: git needs a few milliseconds for each in a large repository.
_MAX_COUNTED = 300
#: The number of new objects after which Python collects garbage.
_GC_THRESHOLD = 100_000


verbose_option = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=remember_option(_VERBOSE),
    help="Print all tasks at the end, not only those that need attention.",
)


@dataclass(frozen=True, slots=True)
class CommandContext:
    """The context of a command."""

    output: Output
    log: ErrorLog
    interrupt: InterruptHandler


@dataclass(frozen=True, slots=True)
class CouncilContext(CommandContext):
    """The context of a command that needs a project."""

    council: Council

    async def show_result(self, report: RunReport, code: int | None = None, *, was_finished: bool = False) -> int:
        """Print the state of a run and return the exit code.

        The exit code is `code`, by default that of the run. `was_finished`: nothing was left to resume. The text is
        brief if the command has `verbose_option` and it is absent; otherwise it includes the size of landed changes, if
        known.
        """
        output, council = self.output, self.council
        whole = bool(click.get_current_context().meta.get(_VERBOSE, True))
        changes: Mapping[str, Changes] = {}
        commits = {task.id: task.landed for task in report.tasks if task.landed is not None}
        if whole and commits and not output.as_json:
            with suppress(CouncilError, OSError):
                changes = await council.reports.landed_changes(report.run, dict(islice(commits.items(), _MAX_COUNTED)))
        is_newest = True
        with suppress(StoreUnavailable):
            is_newest = output.as_json or await council.runs.newest() == report.run
        output.result(report, code, changes=changes, is_newest=is_newest, whole=whole, was_finished=was_finished)
        top = council.project.top.resolve()
        if not output.as_json and not explicit_store_url() and not Path.cwd().is_relative_to(top):
            output.text(
                printable(f"Run commands about this run in its folder: cd {shlex.quote(str(top))}\n", keep="\n")
            )
        return report.exit_code if code is None else code

    def answer_with_damage(self, to_json: Callable[[], JsonObject], lines: Iterable[str]) -> None:
        """Print an answer, and the damage to the state log that was found while reading."""
        self.output.answer(lambda: {**to_json(), "damage": list(self.council.damage)}, lines)
        self.print_damage()

    def print_damage(self) -> None:
        """Print the damage to the state log, only as text."""
        for damage in self.council.damage:
            self.output.notice(printable(f"The state log is damaged: {damage}"))


@asynccontextmanager
async def open_council(
    context: CommandContext,
    source: Path | RunConfig | None = None,
    plugins: Plugins | None = None,
    on_outage: OnOutage = "fail",
) -> AsyncIterator[CouncilContext]:
    """Open the council of a run or a folder, by default of the current folder.

    Without `source`, an explicit store must exist, so that a mistyped name is noticed; only commands that wait for a
    server may run before the first run.
    """
    url = explicit_store_url() if source is None else ""
    if url:
        await anyio.to_thread.run_sync(require_store, url)
    async with Council.open(source, plugins=plugins, state=store_option_url(), on_outage=on_outage) as council:
        context.log.path = council.project.log_file
        if url and council.is_empty and on_outage != "wait":
            raise RefusedError(f"there is no state in {redact_urls(url)}", "correct the URL, or start a run there")
        for notice in council.notices:
            Output(as_json=False).notice(printable(notice))
        yield CouncilContext(context.output, context.log, context.interrupt, council)


def async_command(
    *, is_short_lived: bool = False, prints_json: bool = True
) -> Callable[[Callable[Concatenate[CommandContext, P], Awaitable[int | None]]], Callable[P, None]]:
    """Turn a coroutine function into the callback of a click command.

    Its first argument is the context. It returns the exit code, or None for 0. `prints_json` adds the option `--json`.
    With `is_short_lived`, a command skips garbage collection and cleanup of memory. A group does nothing here if
    a subcommand follows.
    """

    def decorate(body: Callable[Concatenate[CommandContext, P], Awaitable[int | None]]) -> Callable[P, None]:
        @wraps(body)
        def callback(*args: P.args, **kwargs: P.kwargs) -> None:
            if click.get_current_context().invoked_subcommand is None:
                run_command(lambda context: body(context, *args, **kwargs), is_short_lived=is_short_lived)

        return json_option(callback) if prints_json else callback

    return decorate


def council_command(
    *, is_short_lived: bool = False, prints_json: bool = True, on_outage: OnOutage = "fail"
) -> Callable[[Callable[Concatenate[CouncilContext, P], Awaitable[int | None]]], Callable[P, None]]:
    """Extend `async_command` for a command that needs a project; add `--state`.

    `on_outage` is that of `Council.open`.
    """

    def decorate(body: Callable[Concatenate[CouncilContext, P], Awaitable[int | None]]) -> Callable[P, None]:
        async def with_council(context: CommandContext, /, *args: P.args, **kwargs: P.kwargs) -> int | None:
            async with open_council(context, on_outage=on_outage) as opened:
                return await body(opened, *args, **kwargs)

        update_wrapper(with_council, body)
        return store_option(async_command(is_short_lived=is_short_lived, prints_json=prints_json)(with_council))

    return decorate


def run_command(command: Callable[[CommandContext], Awaitable[int | None]], *, is_short_lived: bool = False) -> None:
    """Run a command and exit with its code. See `async_command`."""
    output, log = Output(wants_json()), ErrorLog()

    async def guarded() -> int:
        context = CommandContext(output, log, InterruptHandler(output, log))
        return await context.interrupt.guard(command(context))

    # Imported modules and the documents of a large run stay in memory: searching them for cycles takes half of the time
    # of commands that only read.
    gc.freeze()
    gc.set_threshold(0 if is_short_lived else _GC_THRESHOLD)
    with error_boundary(output, log):
        _check_folder()
        _check_descriptors()
        code = anyio.run(guarded)
    if output.write_error is not None:
        output.text(f"council: {write_error_message(output.write_error)}\n", err=True)
        is_short = describe_shortage(output.write_error) is not None
        code = code or (EXIT_UNAVAILABLE if is_short else EXIT_INTERNAL_ERROR)
    if is_short_lived:
        os._exit(code)  # the output is flushed; freeing thousands of documents one by one has no use
    sys.exit(code)


def _check_descriptors() -> None:
    """Raise the error of missing descriptors, which asyncio would report with tracebacks of its own."""
    for descriptor in (*os.pipe(), *os.pipe()):
        os.close(descriptor)


def _check_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise RefusedError("the current folder no longer exists", "cd to an existing folder") from None


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
        self.message = "interrupted"
        """The message of a cancelled command."""

    async def guard(self, command: Awaitable[int | None]) -> int:
        """Await a command and return its exit code, or the code of an interruption."""
        async with anyio.create_task_group() as group:
            await group.start(self._listen, group.cancel_scope)
            code = await command or 0
            group.cancel_scope.cancel()
            return code
        self._output.failure({"status": "interrupted", "exit": EXIT_INTERRUPTED}, f"council: {self.message}")
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
