"""The files of worktrees. Entry points: `change_detection`, `scan_process` and `file_trees` (copies, disk usage)."""
