"""Names that no commit of an agent may contain: our own folders, and what git on another system takes for `.git`."""

from __future__ import annotations

import re
from typing import Final

#: What HFS+ passes over when it compares names (git's `next_hfs_char`, CVE-2014-9390).
_PASSED_OVER: Final = dict.fromkeys([*range(0x200C, 0x2010), *range(0x202A, 0x202F), *range(0x206A, 0x2070), 0xFEFF])
#: The short names that NTFS gives such folders (CVE-2019-1352).
_SHORT: Final = re.compile(r"(git|counci|worktr)~\d+")
_LONG: Final = {"git": ".git", "counci": ".council", "worktr": ".worktrees"}


def find_reserved_name(path: str) -> str | None:
    """Return the reserved name that a part of a path is, or becomes on a Mac or on Windows; None if there is none.

    NTFS also takes a backslash for a separator, and ends a name before a colon, dots and spaces.
    """
    return next((name for part in re.split(r"[/\\]", path) if (name := _meant(part)) is not None), None)


def _meant(part: str) -> str | None:
    folded = part.translate(_PASSED_OVER).casefold()
    plain = folded.partition(":")[0].rstrip(". ")
    if short := _SHORT.fullmatch(plain):
        return _LONG[short[1]]
    return plain if plain in _LONG.values() else None
