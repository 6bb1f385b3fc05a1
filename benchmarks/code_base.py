"""Generated files with the shape of a medium-sized code base, deterministic.

As in ansible, which has about 5,000 files of 5 KB on average, most are small and a few large (a log-normal
distribution), about a dozen are in a folder, and folders are nested. The text is lines of code from a large pool,
which compresses like code; no two files are the same.
"""

from __future__ import annotations

import math
import random
from itertools import accumulate
from pathlib import Path
from typing import Final

_SEED: Final = 20
_MEAN_BYTES: Final = 5_000.0
_SPREAD: Final = 1.4  # of the logarithm of sizes
_LARGEST_BYTES: Final = 200_000
_FILES_A_FOLDER: Final = 12
_DEEPEST: Final = 6
_WORDS: Final = 4_000
_STOCK: Final = 40_000
_FORMS: Final = (
    "def {}_{}(self, {}, {}=None):",
    "    {} = self.{}.{}({}, {})",
    "    if {}.{} is not None and {} != {}:",
    "        raise {}Error('{} {} {}')",
    "        return [{}.{} for {} in {}]",
    "    # {} {} {} {} {}",
    "        {}['{}'] = {}",
    "",
)


def write_files(top: Path, files: int) -> None:
    """Write that many files below `top`. Blocks."""
    chance = random.Random(_SEED)  # noqa: S311  nothing secret
    lines = _stock(chance)
    folders = _folders(chance, top, max(1, files // _FILES_A_FOLDER))
    middle = math.log(_MEAN_BYTES) - _SPREAD**2 / 2
    for number in range(files):
        size = min(int(chance.lognormvariate(middle, _SPREAD)), _LARGEST_BYTES)
        text = [f"# module {number}\n"]
        while size > 0:
            text.append(chance.choice(lines))
            size -= len(text[-1])
        (chance.choice(folders) / f"module{number}.py").write_text("".join(text), encoding="utf-8")


def _stock(chance: random.Random) -> list[str]:
    letters = "eeeetttaaooiinnsshhrrddllcumwfgypbvkxjqz"
    words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(_WORDS)]
    # Some words are much more frequent than others.
    often = list(accumulate(1 / rank for rank in range(1, _WORDS + 1)))
    made = []
    for _ in range(_STOCK):
        form = chance.choice(_FORMS)
        made.append(form.format(*chance.choices(words, cum_weights=often, k=form.count("{}"))) + "\n")
    return made


def _folders(chance: random.Random, top: Path, count: int) -> list[Path]:
    folders, depths = [top], {top: 0}
    while len(folders) <= count:
        parent = chance.choice(folders)
        if depths[parent] < _DEEPEST:
            folder = parent / f"part{len(folders)}"
            folder.mkdir()
            depths[folder] = depths[parent] + 1
            folders.append(folder)
    return folders
