"""Log files of sessions and checks: names, size limits, and reading the tail."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import anyio.to_thread

MAX_OUTPUT_BYTES = 16 * 2**20  # kept from the beginning of each stream, in addition to its end
STOP_GRACE = 5.0  # seconds between the first signal of a stop and SIGKILL
TAIL_BYTES = 1 << 16


def log_file_name(task: str, attempt: int, stream: str) -> str:
    """Return the name of `log_path`."""
    return f"{task}.{attempt}.{stream}"


def log_path(logs: Path, task: str, attempt: int, stream: str) -> Path:
    """Return the file with a stream of an attempt's output.

    `stream` is stdout, stderr, or before, after or check followed by a number; base checks append the process.
    """
    return logs / log_file_name(task, attempt, stream)


def last_activity(logs: Path, task: str, attempt: int, alive: float, now: float) -> float:
    """Return the time of an interrupted attempt's last known activity, at least `alive`. Blocks.

    Later time is not charged to the attempt.
    """
    latest = alive
    for stream in ("stdout", "stderr"):
        with suppress(OSError):
            latest = max(latest, log_path(logs, task, attempt, stream).stat().st_mtime)
    return min(latest, max(now, alive))


def slot_log_path(logs: Path, slot: int, stream: str) -> Path:
    """Return the file with the output of commands in a worktree slot outside attempts.

    `stream` is setup or teardown followed by a number.
    """
    return logs / f"slot-{slot}.{stream}"


def list_attempt_streams(names: Iterable[str]) -> list[str]:
    """Return the names that are streams of an attempt, in the order of their start."""
    matches = [match for name in names if (match := _STREAM.fullmatch(name))]
    return [match.group() for match in sorted(matches, key=_stream_order)]


_STREAM = re.compile(r"(stdout|stderr)|(before|after|check)([0-9]+)")
_STREAM_ORDER = ("before", "stdout", "stderr", "after", "check")


def _stream_order(match: re.Match[str]) -> tuple[int, int]:
    return _STREAM_ORDER.index(match[1] or match[2]), int(match[3] or 0)


async def read_tail(file: Path, size: int = TAIL_BYTES) -> str:
    """Return the whole lines in the last `size` bytes of a file; empty if missing."""
    return await anyio.to_thread.run_sync(_read_tail, file, size)


def _read_tail(path: Path, size: int) -> str:
    try:
        with path.open("rb") as file:
            length = file.seek(0, 2)
            file.seek(max(0, length - size))
            data = file.read(size)
    except FileNotFoundError:
        return ""
    text = data.decode(errors="replace")
    return text.partition("\n")[2] or text if length > size else text
