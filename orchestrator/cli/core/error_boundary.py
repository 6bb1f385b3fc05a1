"""The one place where errors become messages and exit codes, so that code and JSON always agree.

0 all landed · 1 some did not, the machine lacks something now, or another process took over · 2 bad input ·
130 interrupted · 3 internal error, with the log's path
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.cli.render.output import Output
from orchestrator.errors import (
    ConfigError,
    CouncilError,
    LeaseLost,
    RefusedError,
    StateLost,
    describe_shortage,
    to_permission_refusal,
)
from orchestrator.protocols import JsonObject

if TYPE_CHECKING:
    from orchestrator.domain.security.secrets import Redactor

EXIT_UNAVAILABLE = EXIT_TAKEN_OVER = 1
EXIT_BAD_INPUT = 2
EXIT_INTERNAL_ERROR = 3
EXIT_INTERRUPTED = 130


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _redactor().text(super().format(record))


def _redactor() -> Redactor:
    # Late: compiling its expressions takes long, and most commands end well.
    from orchestrator.domain.security.secrets import Redactor, secret_values  # noqa: PLC0415

    return Redactor(secret_values(os.environ))


class ErrorLog:
    """The log of internal errors; a temporary file until the project is known."""

    def __init__(self) -> None:
        self.path: Path | None = None

    def write(self, error: BaseException) -> Path | None:
        """Append the error with its traceback; return the file, a temporary one if the project's is not writable.

        None where no file can be written.
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
    """Convert the errors of the body into a message and an exit code."""
    try:
        yield
    except (click.exceptions.Exit, click.ClickException):
        raise
    except KeyboardInterrupt:
        _fail_and_exit(output, EXIT_INTERRUPTED, {"status": "interrupted", "error": "interrupted"}, "interrupted")
    except BaseException as raised:  # noqa: BLE001  the one boundary: nothing may leave as a traceback
        error = _root_cause(raised)
        if isinstance(error, OSError):
            error = to_permission_refusal(error) or error
        if isinstance(error, ConfigError):
            problems = [asdict(problem) for problem in error.problems]
            _fail_and_exit(output, EXIT_BAD_INPUT, {"status": "invalid", "errors": problems}, str(error))
        if isinstance(error, RefusedError):
            _fail_and_exit(
                output,
                EXIT_BAD_INPUT,
                {"status": "refused", "error": error.what, "remedy": error.remedy},
                f"council: {error}",
            )
        if (lack := describe_shortage(error)) is not None:
            what, remedy = lack
            result = {"status": "unavailable", "error": what, "remedy": remedy}
            _fail_and_exit(output, EXIT_UNAVAILABLE, result, f"council: {what}: {remedy}; no recorded work is lost")
        if isinstance(error, LeaseLost):  # a process that was stopped for long, which is no fault of anybody's
            _fail_and_exit(output, EXIT_TAKEN_OVER, {"status": "taken over", "error": str(error)}, f"council: {error}")
        path = log.write(raised)
        what = str(error) if isinstance(error, CouncilError) else f"internal error: {type(error).__name__}: {error}"
        stands = "The recorded state is intact: `council resume` continues the run."
        if isinstance(error, StateLost):
            stands = "Some recorded state is lost."
        details = "" if path is None else f" Details: {path}"
        failure: JsonObject = {"status": "error", "error": what, "log": None if path is None else str(path)}
        _fail_and_exit(output, EXIT_INTERNAL_ERROR, failure, f"council: {what}\n{stands}{details}")


def _root_cause(error: BaseException) -> BaseException:
    """Return the error of a group to report: what may have caused the rest, else the first of ours.

    That is a shortage of the machine, or that another process took over.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [_root_cause(one) for one in error.exceptions]
    short = (one for one in leaves if describe_shortage(one) is not None)
    ours = (one for kind in (LeaseLost, CouncilError) for one in leaves if isinstance(one, kind))
    return next(short, next(ours, leaves[0]))


def _fail_and_exit(output: Output, code: int, result: JsonObject, message: str) -> None:
    redactor = _redactor()
    output.failure({**redactor.json(result), "exit": code}, redactor.text(message))
    sys.exit(code)
