"""Idle timeouts on a clock driven by the test."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.sessions.supervision import idle_timeout
from orchestrator.sessions.supervision.idle_timeout import FolderScan, IdleWatch
from tests.waiting import wait_for

LIMIT = 8.0


class Clock:
    """Replaces the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(idle_timeout, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def ends_at(watch: IdleWatch, clock: Clock, until: float, changes: dict[float, Path] | None = None) -> float | None:
    """Advance the clock like a poll, writing files at the times of `changes`; return the end."""
    pending = sorted((changes or {}).items())
    while clock.now < until:
        clock.now += max(watch.seconds_until_check(), 0.001)
        while pending and pending[0][0] <= clock.now:
            with pending.pop(0)[1].open("a") as file:
                file.write("x")
        if watch.has_expired():
            return clock.now
        if watch._scan is not None:
            wait_for(lambda: watch._scan is None or watch._scan.done)
    return None


@pytest.mark.parametrize("change", [None, 0.5, 1.9, 2.1, 3.0, 4.1, 5.0, 7.9, 9.5])
def test_timeout_ends_between_one_and_one_and_a_half_times_the_limit(
    tmp_path: Path, clock: Clock, change: float | None
) -> None:
    """Counted from the last activity, at any point between two polls."""
    began = clock.now
    watch = IdleWatch(LIMIT, [str(tmp_path)])
    changes = {} if change is None else {began + change: tmp_path / "file"}
    end = ends_at(watch, clock, began + 100, changes)
    assert end is not None
    last = began + (change or 0)
    assert LIMIT <= end - last + (0 if change is None else 0.1) <= 1.5 * LIMIT


def test_output_restarts_the_timeout(tmp_path: Path, clock: Clock) -> None:
    """With output no folder is scanned."""
    watch = IdleWatch(LIMIT, [str(tmp_path)])
    for _ in range(100):
        clock.now += 1
        watch.note_output()
        assert not watch.has_expired()
        assert watch._scan is None
    last = clock.now
    end = ends_at(watch, clock, last + 100)
    assert end is not None
    assert LIMIT <= end - last <= 1.5 * LIMIT


def test_failed_walk_proves_nothing(tmp_path: Path, clock: Clock) -> None:
    """A missing folder ends nothing; once readable, the time starts at the first successful scan."""
    folder = tmp_path / "folder"
    watch = IdleWatch(LIMIT, [str(folder)])
    assert ends_at(watch, clock, clock.now + 10 * LIMIT) is None
    folder.mkdir()
    again = clock.now
    end = ends_at(watch, clock, clock.now + 10 * LIMIT)
    assert end is not None
    assert end - again >= LIMIT


def walked(*folders: Path) -> tuple[int, int] | None:
    walk = FolderScan([str(folder) for folder in folders], give_up=float("inf"))
    wait_for(lambda: walk.done)
    return walk.fingerprint


def test_each_change_is_detected(tmp_path: Path) -> None:
    """Content of the same size, name, mode, forged mtime, at any depth; a scan alone changes nothing."""
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "file").write_text("one")
    (deep / "link").symlink_to("/")
    seen = [walked(tmp_path)]
    assert walked(tmp_path) == seen[0]
    changes: list[Callable[[], object]] = [
        lambda: (deep / "file").write_text("two"),
        lambda: os.utime(deep / "file", (1, 1)),
        lambda: (deep / "file").chmod(0o600),
        lambda: (deep / "file").rename(deep / "other"),
        (deep / "other").unlink,
        (tmp_path / "new").mkdir,
    ]
    for change in changes:
        time.sleep(0.02)  # the kernel's file clock has steps of up to 10 ms
        change()
        seen.append(walked(tmp_path))
    assert None not in seen
    assert len(set(seen)) == len(seen)


def test_oversized_tree_is_a_failed_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan is bounded by entries and by time."""
    for number in range(600):
        (tmp_path / str(number)).touch()
    assert walked(tmp_path) is not None
    walk = FolderScan([str(tmp_path)], give_up=0)
    wait_for(lambda: walk.done)
    assert walk.fingerprint is None
    monkeypatch.setattr(idle_timeout, "MAX_ENTRIES", 500)
    assert walked(tmp_path) is None
