"""The one place where errors become messages and exit codes, so that code and JSON always agree.

0 all landed · 1 some did not · 2 bad input · 3 our fault, with the log's path · 130 interrupted
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.cli.output import Output
from orchestrator.errors import ConfigError, CouncilError, RefusedError, StateLost, as_refusal
from orchestrator.protocols import JsonObject

if TYPE_CHECKING:
    from orchestrator.domain.secrets import Redactor

BAD_INPUT = 2
OUR_FAULT = 3
INTERRUPTED = 130


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _redactor().text(super().format(record))


def _redactor() -> Redactor:
    # Late: compiling its expressions takes long, and most commands end well.
    from orchestrator.domain.secrets import Redactor, secret_values  # noqa: PLC0415

    return Redactor(secret_values(os.environ))


class Log:
    """Where the details of a fault go; a temporary file until the project is known."""

    def __init__(self) -> None:
        self.path: Path | None = None

    def write(self, error: BaseException) -> Path:
        """Append the error with its traceback, and return the file; a temporary one where the project's can't be."""
        try:
            return self._append(self.path or _temporary(), error)
        except OSError:
            return self._append(_temporary(), error)

    def _append(self, path: Path, error: BaseException) -> Path:
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(_Redacting("%(asctime)s %(levelname)s %(message)s"))
        path.chmod(0o600)
        raised = (type(error), error, error.__traceback__)
        handler.emit(logging.LogRecord("council", logging.ERROR, "", 0, "%s", (error,), raised))
        handler.close()
        return path


def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="council-")) / "council.log"


@contextmanager
def boundary(output: Output, log: Log) -> Iterator[None]:
    """Turn whatever the body raises into a message and an exit code."""
    try:
        yield
    except (click.exceptions.Exit, click.ClickException):
        raise
    except KeyboardInterrupt:
        _end(output, INTERRUPTED, {"status": "interrupted", "error": "interrupted"}, "interrupted")
    except BaseException as raised:  # noqa: BLE001  the one boundary: nothing may leave as a traceback
        error = _cause(raised)
        if isinstance(error, OSError):
            error = as_refusal(error) or error
        if isinstance(error, ConfigError):
            problems = [asdict(problem) for problem in error.problems]
            _end(output, BAD_INPUT, {"status": "invalid", "errors": problems}, str(error))
        if isinstance(error, RefusedError):
            _end(
                output,
                BAD_INPUT,
                {"status": "refused", "error": error.what, "remedy": error.remedy},
                f"council: {error}",
            )
        path = log.write(raised)
        what = str(error) if isinstance(error, CouncilError) else f"internal error: {type(error).__name__}: {error}"
        stands = "Nothing that was recorded is lost: `council resume` goes on."
        if isinstance(error, StateLost):
            stands = "Some of what was recorded is lost."
        message = f"council: {what}\n{stands} Details: {path}"
        _end(output, OUR_FAULT, {"status": "error", "error": what, "log": str(path)}, message)


def _cause(error: BaseException) -> BaseException:
    """Return what to tell of a group of errors: the first that is ours, else the first."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [_cause(one) for one in error.exceptions]
    return next((one for one in leaves if isinstance(one, CouncilError)), leaves[0])


def _end(output: Output, code: int, result: JsonObject, message: str) -> None:
    redactor = _redactor()
    output.failure({**redactor.json(result), "exit": code}, redactor.text(message))
    sys.exit(code)
