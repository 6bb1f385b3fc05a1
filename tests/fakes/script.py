"""Scripts of fake programs in prompts, one step per line: `write PATH TEXT`, `fail KIND` and others.

`attempt N` before a step runs it in that attempt only. Other lines are ignored.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def steps(prompt: str) -> Iterator[tuple[str, str, str]]:
    """Yield each due step: its verb, the next word, and the rest."""
    for line in prompt.splitlines():
        words = line.split(maxsplit=2)
        if words[:1] == ["attempt"] and len(words) == 3:
            if words[1] != os.environ.get("COUNCIL_ATTEMPT"):
                continue
            words = words[2].split(maxsplit=2)
        if words:
            word, first, rest = [*words, "", ""][:3]
            yield word, first, rest


def write(path: str, text: str) -> None:
    """Write a file with one line."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text + "\n")


def install(folder: Path, name: str, module: str) -> Path:
    """Create an executable with this name that runs a module; return its path."""
    program = folder / name
    folder.mkdir(exist_ok=True)
    run = shlex.join([sys.executable, "-P", "-m", module])
    program.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {run} "$@"\n')
    program.chmod(0o755)
    return program
