"""Edits of two paths within a folder, for property tests."""

from __future__ import annotations

from pathlib import Path


def rename(top: Path, path: str, other: str) -> None:
    """Rename one path to the other, overwriting it."""
    (top / path).rename(top / other)


def swap(top: Path, path: str, other: str) -> None:
    """Swap two paths."""
    (top / path).rename(top / "between")
    (top / other).rename(top / path)
    (top / "between").rename(top / other)
