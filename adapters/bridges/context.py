"""Describe a worktree to a model without tools: file names and some contents."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Final

from adapters.bridges.worktree import ConfinedWorktree, OutsideWorktreeError

_LARGEST: Final = 64 << 10  # maximum bytes of a file to show
_LISTED: Final = 4  # a quarter of the budget is for file names
_WORD: Final = re.compile(r"[\w.+-]+")


def describe_worktree(worktree: ConfinedWorktree, prompt: str, budget: int) -> str:
    """Return a worktree's file names, and the contents most relevant to the prompt.

    The result has at most `budget` bytes. Only contents of text files are included; symlinks are not followed.
    """
    names = _names(worktree)
    listing = "\n".join(_within(names, budget // _LISTED))
    more = "" if listing.count("\n") + 1 >= len(names) else "\n(and more)"
    shown = [f"The files of the repository:\n\n{listing}{more}\n"]
    left = budget - len(shown[0].encode())
    words = set(_WORD.findall(prompt)) | {word.rstrip(".") for word in _WORD.findall(prompt)}
    for name in sorted(names, key=lambda name: _rank(name, prompt, words)):
        block = _block(worktree, name, left)
        if block is not None:
            shown.append(block)
            left -= len(block.encode())
    return "\n".join(shown)


def code_block(info: str, content: str) -> str:
    """Return a Markdown code block with a fence longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    end = "" if not content or content.endswith("\n") else "\n"
    return f"{fence}{info}\n{content}{end}{fence}\n"


def _names(worktree: ConfinedWorktree) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"],  # noqa: S607
        cwd=worktree.top,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    names = listed.stdout.decode(errors="replace").split("\0")
    return sorted(name for name in names if name and name.isprintable())


def _within(names: list[str], budget: int) -> Iterator[str]:
    for name in names:
        budget -= len(name.encode()) + 1
        if budget < 0:
            return
        yield name


def _rank(name: str, prompt: str, words: set[str]) -> tuple[int, int, str]:
    path = PurePosixPath(name)
    if name in prompt:
        rank = 0
    elif path.name in words:
        rank = 1
    elif len(path.stem) > 2 and path.stem in words:
        rank = 2
    else:
        rank = 3 if path.stem.upper() == "README" else 4
    return rank, len(path.parts), name


def _block(worktree: ConfinedWorktree, name: str, left: int) -> str | None:
    """Return a file as a block, or None if it does not fit or is not text."""
    try:
        path = worktree.relative(name)
        if not path.is_file() or path.stat().st_size > min(left, _LARGEST):
            return None
        content = path.read_bytes().decode()
    except (OSError, OutsideWorktreeError, UnicodeDecodeError):
        return None
    block = code_block(f"file {name}", content)
    return None if "\0" in content or len(block.encode()) > left else block
