"""Scanning for session leftovers while others remove them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.worktrees import list_worktrees


def test_folder_removed_during_the_scan_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The removal of the last session removes the run's folder too."""
    hub = Hub(tmp_path / "hub")
    folder = hub.sessions / "run"
    folder.mkdir(parents=True)

    def gone(path: Path) -> Iterator[Path]:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr(Path, "iterdir", gone)
    assert list_worktrees(hub, "run", ["t"]) == []
