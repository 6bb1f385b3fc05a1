"""The disk usage of a folder with any content."""

from __future__ import annotations

from pathlib import Path

from orchestrator.repo.worktrees.files.file_trees import disk_usage


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Neither in cycles nor to paths outside."""
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.write_bytes(bytes(1 << 20))
    (folder / "file").write_bytes(bytes(1 << 14))
    before = disk_usage(folder)
    assert before >= 1 << 14
    for name in ("a", "b"):
        (folder / name).symlink_to(".")
    (folder / "c").symlink_to(outside)
    assert disk_usage(folder) - before < 1 << 14
