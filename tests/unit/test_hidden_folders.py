"""Folders hidden from sessions."""

from __future__ import annotations

from pathlib import Path

from orchestrator.engine.run_context import hidden_folders
from orchestrator.project import Project
from orchestrator.repo.source.run_repository import RunRepository
from orchestrator.repo.worktrees.hub import Hub


def test_hidden_folders_with_store_paths_include_them(tmp_path: Path) -> None:
    """A session must not read the data of the run's store, of any kind."""
    site = RunRepository("https://example.com/shop.git", None, "sha1")
    hub = Hub(tmp_path / "home" / "shop-1")
    store = [tmp_path / "state.db", tmp_path / "state.db-wal"]
    assert {*store, tmp_path / "home"} <= {*hidden_folders(site, Project(tmp_path / "shop"), store, hub)}
