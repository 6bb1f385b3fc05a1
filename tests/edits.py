"""Changes to files that property tests make, of two paths within a folder."""

from __future__ import annotations

from pathlib import Path


def rename(top: Path, path: str, other: str) -> None:
    """Rename one path to the other, over what stands there."""
    (top / path).rename(top / other)


def swap(top: Path, path: str, other: str) -> None:
    """Let two paths change places."""
    (top / path).rename(top / "between")
    (top / other).rename(top / path)
    (top / "between").rename(top / other)
