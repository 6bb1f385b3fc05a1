"""Read the failed tests of a JUnit XML report. Programs that agents control write it, so it is not trusted."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final
from xml.parsers import expat

from orchestrator.system import untrusted_files

MAX_REPORT_BYTES: Final = 4 * 2**20
MAX_TESTS: Final = 50  # names of failed tests
MAX_NAME_CHARS: Final = 200
#: The maximum depth of elements; reports have four.
_MAX_DEPTH = 32


class _UnsafeReportError(Exception):
    """The report has a document type, which could define entities, or is nested too deeply."""


def stamp_report(top: Path, path: str) -> tuple[int, ...] | None:
    """Return metadata that every write to a report beneath `top` changes; None without a regular file. Blocks."""
    with suppress(OSError):
        descriptor = untrusted_files.open_file(top, path)
        try:
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return None


def read_failed_tests(top: Path, path: str) -> tuple[str, ...]:
    """Return the failed tests of a report beneath `top`; empty if it can't be read. Blocks."""
    with suppress(OSError):
        return parse_failed_tests(untrusted_files.read_file(top, path, MAX_REPORT_BYTES))
    return ()


def parse_failed_tests(report: bytes) -> tuple[str, ...]:
    """Return the names of the first failed tests before any error in the report."""
    parser, cases = expat.ParserCreate("utf-8"), _FailedCases()
    parser.StartDoctypeDeclHandler = cases.reject_doctype
    parser.StartElementHandler, parser.EndElementHandler = cases.begin, cases.end
    with suppress(expat.ExpatError, _UnsafeReportError):
        parser.Parse(report, True)
    return tuple(cases.failed)


class _FailedCases:
    """Collects the names of test cases that contain a failure or an error."""

    def __init__(self) -> None:
        self.failed: dict[str, None] = {}
        self._name, self._depth = "", 0

    def reject_doctype(self, *_: object) -> None:
        raise _UnsafeReportError

    def begin(self, tag: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _UnsafeReportError
        if tag == "testcase":
            self._name = ".".join(filter(None, [attributes.get("classname"), attributes.get("name")]))
        elif tag in {"failure", "error"} and self._name and len(self.failed) < MAX_TESTS:
            self.failed[_clean_name(self._name)] = None

    def end(self, tag: str) -> None:
        self._depth -= 1
        if tag == "testcase":
            self._name = ""


def _clean_name(name: str) -> str:
    """Return a name on one line, without control characters, of limited length."""
    printable = "".join(char if char.isprintable() else " " for char in name[: MAX_NAME_CHARS * 2])
    line = " ".join(printable.split())
    return line if len(line) <= MAX_NAME_CHARS else f"{line[: MAX_NAME_CHARS - 1]}…"
