"""What every store asks of a log that is copied: that it is sound where it comes from, and that none is missing."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from orchestrator.errors import RefusedError
from orchestrator.protocols import Dump, VerificationReport
from orchestrator.state.log.codec import LogLine, from_dumped

_REPAIR = "`council state verify --repair` restores the readable state, then try again"


def check_intact(found: VerificationReport) -> None:
    """Raise RefusedError if not all that a store holds can be trusted."""
    if not found.is_sound:
        keys = ", ".join(map(str, (*found.damaged, *found.mismatched)))
        told = [one.describe() for one in found.damage] or [f"not to be trusted: {keys}"]
        raise RefusedError(f"the state to copy is damaged: {'; '.join(told)}", _REPAIR)


def damaged_log_error(position: int) -> RefusedError:
    """Return how to refuse a log that can't be read behind a commit."""
    return RefusedError(f"the state to copy is damaged behind position {position}", _REPAIR)


async def read_dump_lines(dump: Dump) -> AsyncGenerator[LogLine]:
    """Yield the commits of a dump as lines of the log; RefusedError if they are not those that it promises."""
    position = 0
    async with aclosing(dump.commits) as commits:
        async for commit in commits:
            is_left_over = position < commit.position <= dump.first
            if not (is_left_over or commit.position == max(position, dump.first) + 1):
                raise _broken(f"commit {commit.position} stands behind commit {position}")
            yield from_dumped(commit)
            position = commit.position
    if max(position, dump.first) != dump.position:
        raise _broken(f"it ends at commit {position}, not {dump.position}")


def _broken(what: str) -> RefusedError:
    return RefusedError(f"what is to be loaded is not whole: {what}", "dump it anew")


def not_empty_error(place: str, position: int) -> RefusedError:
    """Return how to refuse a store that something was committed to."""
    what = f"{place} is not empty: it is at position {position}" if position else f"{place} was begun by somebody else"
    return RefusedError(what, "name a store that nothing was committed to, such as a new folder")
