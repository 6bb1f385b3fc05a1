"""Checks of a copied log that every store makes: it is intact at its source, and no commit is missing."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from orchestrator.errors import RefusedError
from orchestrator.protocols import Dump, VerificationReport
from orchestrator.state.log.codec import LogLine, from_dumped

_REPAIR = "`council state verify --repair` restores the readable state, then try again"


def check_intact(report: VerificationReport) -> None:
    """Raise RefusedError if verification found an error."""
    if not report.is_valid:
        keys = ", ".join(map(str, (*report.damaged, *report.mismatched)))
        errors = [damage.describe() for damage in report.damage] or [f"wrong documents: {keys}"]
        raise RefusedError(f"the state to copy is damaged: {'; '.join(errors)}", _REPAIR)


def damaged_log_error(position: int) -> RefusedError:
    """Return the error for a log that can't be read after a commit."""
    return RefusedError(f"the state to copy is damaged after position {position}", _REPAIR)


async def read_dump_lines(dump: Dump) -> AsyncGenerator[LogLine]:
    """Yield the commits of a dump as lines of the log; RefusedError if its positions are inconsistent."""
    position = 0
    async with aclosing(dump.commits) as commits:
        async for commit in commits:
            is_left_over = position < commit.position <= dump.first
            if not (is_left_over or commit.position == max(position, dump.first) + 1):
                raise _broken(f"commit {commit.position} follows commit {position}")
            yield from_dumped(commit)
            position = commit.position
    if max(position, dump.first) != dump.position:
        raise _broken(f"it ends at commit {position}, not {dump.position}")


def _broken(what: str) -> RefusedError:
    return RefusedError(f"the state to load is incomplete: {what}", "dump it again")


def not_empty_error(location: str, position: int) -> RefusedError:
    """Return the error for a target store that is not empty."""
    what = (
        f"{location} is not empty: it is at position {position}"
        if position
        else f"{location} is being loaded by another process"
    )
    return RefusedError(what, "name an empty store, such as a new folder")
