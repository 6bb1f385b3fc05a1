"""Names that agents may not commit: council's folders, and aliases of `.git`.

Other systems may interpret an alias as `.git`.
"""

from __future__ import annotations

import re
from typing import Final

#: Characters that HFS+ ignores when it compares names (git's `next_hfs_char`, CVE-2014-9390).
_IGNORED: Final = dict.fromkeys([*range(0x200C, 0x2010), *range(0x202A, 0x202F), *range(0x206A, 0x2070), 0xFEFF])
#: The NTFS short names of these folders (CVE-2019-1352).
_SHORT: Final = re.compile(r"(git|counci|worktr)~\d+")
_LONG: Final = {"git": ".git", "counci": ".council", "worktr": ".worktrees"}


def find_reserved_name(path: str) -> str | None:
    """Return a segment's reserved name, also on macOS and Windows, or None.

    NTFS also treats a backslash as a separator, and ends a name before a colon and before trailing dots and spaces.
    """
    return next((name for part in re.split(r"[/\\]", path) if (name := _reserved_name(part)) is not None), None)


def _reserved_name(part: str) -> str | None:
    folded = part.translate(_IGNORED).casefold()
    plain = folded.partition(":")[0].rstrip(". ")
    if short := _SHORT.fullmatch(plain):
        return _LONG[short[1]]
    return plain if plain in _LONG.values() else None
