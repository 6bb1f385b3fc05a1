"""The output of commands: JSON lines for programs, or text."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import click

from orchestrator.cli.render import result
from orchestrator.cli.render.events import event_line, is_shown
from orchestrator.cli.render.summary import summary_lines
from orchestrator.cli.render.text import escape_unprintable, printable, wrapped
from orchestrator.cli.streams import is_reader_gone, redirect_to_null
from orchestrator.domain.security.secrets import redact_urls

if TYPE_CHECKING:
    from orchestrator.engine.reports.report import RunReport
    from orchestrator.protocols import Event, JsonObject
    from orchestrator.repo.git.change_counts import Changes


#: The variable that disables tables on a terminal. NO_COLOR is only about colour.
_NO_TABLES_VARIABLE = "CI"
_SHOW_CURSOR = "\x1b[?25h"


@dataclass(slots=True)
class Output:
    """The printer of a command's output, as one JSON object per line or as text."""

    as_json: bool
    print_above_table: Callable[[str], None] | None = field(default=None, init=False)
    """Prints a line above the live table; None while there is no table."""
    write_error: OSError | None = field(default=None, init=False)
    """The error that made the output incomplete; None if there was none, or if the reader has exited."""
    is_reader_gone: bool = field(default=False, init=False)
    """Whether the reader of standard output has exited."""

    @property
    def can_draw_tables(self) -> bool:
        """Whether standard output is a terminal that can show tables."""
        if self.as_json or os.environ.get(_NO_TABLES_VARIABLE):
            return False
        return os.environ.get("TERM", "dumb") not in {"", "dumb", "unknown"} and sys.stdout.isatty()

    @property
    def has_colors(self) -> bool:
        """Whether text may have colours: on a terminal without NO_COLOR (https://no-color.org)."""
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def _say(self, text: str | bytes, *, err: bool = False, newline: bool = True) -> None:
        """Print text without passwords in URLs; all output passes through here.

        Errors are recorded, so that the run continues after the reader has exited.
        """
        stream = sys.stderr if err else sys.stdout
        text = redact_urls(text) if isinstance(text, str) else text
        try:
            click.echo(text, file=stream, nl=newline)
        except OSError as error:
            redirect_to_null(stream)
            if not err and is_reader_gone(error):
                self.is_reader_gone = True
            elif not err:
                self.write_error = error

    def event(self, time: float, event: Event) -> None:
        """Print an event."""
        if self.as_json:
            self._line({"event": event.type, "time": time, **event.data})
        elif is_shown(event):
            self._say(event_line(time, event))

    def result(
        self,
        report: RunReport,
        code: int | None = None,
        *,
        changes: Mapping[str, Changes] | None = None,
        is_newest: bool = True,
        whole: bool = True,
        was_finished: bool = False,
    ) -> None:
        """Print the final result of a run; `code` replaces the run's own exit code.

        `was_finished`: nothing was left to resume.

        The text includes the `changes` of each landed task. Unless `whole`, it has only the totals and the tasks that
        need attention. JSON is always complete.
        """
        if self.as_json:
            self._line(report.to_json() | ({} if code is None else {"exit": code}))
            return
        if not whole:
            for line in summary_lines(report, is_newest=is_newest, was_finished=was_finished):
                self._say(line)
            return
        rows = list(result.result_rows(report, changes or {}, is_newest=is_newest, now=time.time()))
        for line in wrapped(result.run_summary(report)):
            self._say(line)
        if self.can_draw_tables:
            from orchestrator.cli.render.rich_tables import render_result_table  # noqa: PLC0415  rich is slow to import

            self._say(render_result_table(rows), newline=False)
        else:
            self._say("\n".join(result.result_lines(rows)))
        for hint in chain.from_iterable(hint.splitlines() for hint in result.next_step_hints(report)):
            for line in wrapped(hint):
                self._say(line)
        if was_finished:
            self._say(result.retry_hint(report, is_newest=is_newest))

    def failure(self, result: JsonObject, message: str) -> None:
        """Print the error of a command."""
        if self.print_above_table is not None:  # the process ends immediately, and the table stays on the screen
            self._say(f"\n{_SHOW_CURSOR}", newline=False)
        if self.as_json:
            self._line(result)
        else:
            self._say(printable(message, keep="\n"), err=True)

    def text(self, text: str, *, err: bool = False) -> None:
        """Print program output unchanged; on a terminal, replace control characters."""
        stream = sys.stderr if err else sys.stdout
        self._say(printable(text, keep="\n\t") if stream.isatty() else text, err=err, newline=False)

    def styled(self, line: str, style: str = "") -> None:
        """Print a line of program output, on a terminal in a style (ECMA-48 SGR parameters)."""
        if style and self.has_colors:
            text = printable(line, keep="\t")
            self._say(f"\x1b[{style}m{text}\x1b[m")
        else:
            self.text(f"{line}\n")

    def difference(self, difference: bytes, *, color: bool | None = None) -> None:
        """Print an uncoloured diff.

        With `color` (default: `has_colors`), or on a terminal, control and invisible characters are escaped; `color`
        adds colours. Otherwise the bytes are printed unchanged, so that the output can be applied as a patch.
        """
        color = self.has_colors if color is None else color
        if not color and not sys.stdout.isatty():
            self.bytes(difference)
            return
        lines = difference.decode(errors="replace").split("\n")
        self._say("\n".join(_colored(line) if color else escape_unprintable(line) for line in lines), newline=False)

    def bytes(self, data: bytes) -> None:
        """Print bytes unchanged."""
        self._say(data, newline=False)

    def json(self, value: JsonObject) -> None:
        """Print one JSON object as a line."""
        self._line(value)

    def answer(self, to_json: Callable[[], JsonObject], lines: Iterable[str]) -> None:
        """Print one JSON object, or lines of text without control characters."""
        if self.as_json:
            self._line(to_json())
            return
        for line in lines:
            self._say(printable(line, keep="\t"))

    def notice(self, text: str) -> None:
        """Print a message that is not an event, only as text."""
        if self.print_above_table is not None:
            self.print_above_table(text)
        elif not self.as_json:
            self._say(text, err=True)

    def _line(self, value: JsonObject) -> None:
        self._say(json.dumps(value, ensure_ascii=True, separators=(",", ":")))


#: The prefixes of diff lines with their colours (ECMA-48 SGR), the same as git's.
_COLORS = (
    *((start, "1") for start in ("diff ", "index ", "--- ", "+++ ", "new file ", "deleted file ", "old mode ")),
    *((start, "1") for start in ("new mode ", "similarity ", "rename ")),
    ("@@", "36"),
    ("+", "32"),
    ("-", "31"),
    ("#", "33"),
)


def _colored(line: str) -> str:
    code = next((code for start, code in _COLORS if line.startswith(start)), None)
    return escape_unprintable(line) if code is None else f"\x1b[{code}m{escape_unprintable(line)}\x1b[m"
