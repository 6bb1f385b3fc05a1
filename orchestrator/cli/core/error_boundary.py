"""The only place that turns errors into messages, JSON and exit codes.

0 all landed · 1 some did not, the machine lacks a resource, or another process took over · 2 bad input ·
130 interrupted · 3 internal error, with the path of the log
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from io import IOBase
from pathlib import Path, PurePath

import click

from orchestrator.cli.render.output import Output
from orchestrator.domain.security.secrets import Redactor, secret_values
from orchestrator.errors import (
    ConfigError,
    CouncilError,
    HubDamaged,
    LeaseLost,
    RefusedError,
    StateLost,
    describe_shortage,
    to_path_refusal,
)
from orchestrator.protocols import JsonObject

EXIT_UNAVAILABLE = EXIT_TAKEN_OVER = 1
EXIT_BAD_INPUT = 2
EXIT_INTERNAL_ERROR = 3
EXIT_INTERRUPTED = 130


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _redactor().text(super().format(record))


def _redactor() -> Redactor:
    return Redactor(secret_values(os.environ))


class ErrorLog:
    """The log of internal errors; a temporary file until the project is known."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.run: str | None = None
        """The run that the command executes."""

    @property
    def resume(self) -> str:
        """The command that resumes the run."""
        return "council resume" if self.run is None else f"council resume {self.run}"

    def write(self, error: BaseException) -> Path | None:
        """Append the error with its traceback, and return the path of the log.

        Uses a temporary file if the project's log is not writable. Returns None if no file can be written.
        """
        raised = (type(error), error, error.__traceback__)
        record = logging.LogRecord("council", logging.ERROR, "", 0, "%s", (error,), raised)
        text = _RedactingFormatter("%(asctime)s %(levelname)s %(message)s").format(record)
        for path in (self.path, None):
            with suppress(OSError):
                return _append(path or Path(tempfile.mkdtemp(prefix="council-")) / "council.log", f"{text}\n")
        return None


def _append(path: Path, text: str) -> Path:
    with path.open("a", encoding="utf-8") as file:
        path.chmod(0o600)
        file.write(text)
    return path


@contextmanager
def error_boundary(output: Output, log: ErrorLog) -> Iterator[None]:
    """Turn errors of the body into a message and an exit code.

    Click reports its own errors.
    """
    try:
        yield
    except BaseException as raised:  # noqa: BLE001  the error boundary: no traceback may reach the user
        error = _root_cause(raised)
        if isinstance(error, click.exceptions.Exit | click.ClickException):
            raise error from None
        code, result, message = describe_error(raised, log)
        output.failure({**result, "exit": code}, message)
        sys.exit(code)


def describe_error(raised: BaseException, log: ErrorLog) -> tuple[int, JsonObject, str]:
    """Return the exit code, JSON object and text of an error, redacted; log internal errors."""
    code, result, message = _describe(_root_cause(raised), partial(log.write, raised), log.resume)
    redactor = _redactor()
    return code, redactor.json(result), redactor.text(message)


def _describe(error: BaseException, write_log: Callable[[], Path | None], resume: str) -> tuple[int, JsonObject, str]:
    """Return the exit code, JSON object and text of an error; log internal errors.

    `resume` is the command that resumes the run.
    """
    if isinstance(error, OSError):
        name_failed_file(error)
        error = to_path_refusal(error) or error
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, {"status": "interrupted", "error": "interrupted"}, "interrupted"
    if isinstance(error, ConfigError):
        return EXIT_BAD_INPUT, {"status": "invalid", "errors": [*map(asdict, error.problems)]}, str(error)
    if isinstance(error, RefusedError | HubDamaged):
        result = {"status": "refused", "error": error.message, "remedy": error.remedy}
        return EXIT_BAD_INPUT, result, f"council: {error}"
    if (lack := describe_shortage(error)) is not None:
        message, remedy = lack
        result = {"status": "unavailable", "error": message, "remedy": remedy}
        return EXIT_UNAVAILABLE, result, f"council: {message}: {remedy}; no recorded work is lost"
    if isinstance(error, LeaseLost):  # this process was paused for long: not an internal error
        return EXIT_TAKEN_OVER, {"status": "taken_over", "error": str(error)}, f"council: {error}"
    path = write_log()
    message = str(error) if isinstance(error, CouncilError) else f"internal error: {type(error).__name__}: {error}"
    state = f"The recorded state is intact: `{resume}` continues the run."
    if isinstance(error, StateLost):
        state = "Some recorded state is lost."
    details = "" if path is None else f" Details: {path}"
    failure = {"status": "error", "error": message, "log": None if path is None else str(path)}
    return EXIT_INTERNAL_ERROR, failure, f"council: {message}\n{state}{details}"


def name_failed_file(error: BaseException) -> None:
    """Add the file name to an error of a read or write, if its traceback contains the file.

    Unlike an error of `open`, such an error names no file: the innermost frame with an open file or a path raised it.
    """
    if not isinstance(error, OSError) or error.errno is None or error.filename is not None:
        return
    for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)]):
        values = frame.f_locals.values()
        names = [getattr(value, "name", None) for value in values if isinstance(value, IOBase)]
        names += [value for value in values if isinstance(value, PurePath)]
        if found := [name for name in names if isinstance(name, str | PurePath)]:  # that of a descriptor is a number
            error.filename = str(found[0])
            return


def _root_cause(error: BaseException) -> BaseException:
    """Return the error of a group to report, by default the first CouncilError.

    A lack of machine resources and a takeover by another process come first: they probably caused the others.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [_root_cause(one) for one in error.exceptions]
    short = (one for one in leaves if describe_shortage(one) is not None)
    known = (one for kind in (LeaseLost, CouncilError) for one in leaves if isinstance(one, kind))
    return next(short, next(known, leaves[0]))
