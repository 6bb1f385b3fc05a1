"""Merge conflicting files with a structural merge driver, if the user has installed one.

A driver compares the syntax of files instead of their lines. It reads what agents wrote, so it runs in a sandbox, and
its result is verified like that of a session.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import anyio
import anyio.to_thread

from orchestrator.domain.runs.conflict_resolution import find_resolution_problem
from orchestrator.errors import RefusedError
from orchestrator.repo.git.command import Git
from orchestrator.repo.landing.conflicting_files import MAX_RESOLVED_BYTES, read_conflict
from orchestrator.repo.landing.merge_commits import replace_entries, temporary_folder
from orchestrator.sandbox.confinement import Confinement
from orchestrator.system.process import run
from orchestrator.system.untrusted_files import read_file

#: The options of each driver before and after the three files: base, ours, theirs. The second file gets the result, and
#: exit code 0 means that it has no conflict.
_OPTIONS: Final = {"mergiraf": (("merge", "--git"), ("--path-name",)), "weave-driver": ((), ("7",))}
_TIMEOUT: Final = 20.0
_MEMORY: Final = 2 << 30
#: Drivers detect the language of a file by its name.
_PLAIN_NAME: Final = re.compile(r"\w[\w.+-]{0,100}", re.ASCII)


@dataclass(frozen=True, slots=True)
class MergeDriver:
    """An installed structural merge driver."""

    name: str
    program: Path

    async def merge(self, git: Git, name: str, texts: Sequence[bytes]) -> bytes | None:
        """Return the merge of the base and two sides of a file; None if the driver can't merge it."""
        before, after = _OPTIONS[self.name]
        safe = PurePosixPath(name).name
        safe = safe if _PLAIN_NAME.fullmatch(safe) else "file"
        with temporary_folder(git) as folder:
            paths = [Path(folder, side) for side in ("base", "ours", "theirs")]
            for path, text in zip(paths, texts, strict=True):
                await anyio.Path(path).write_bytes(text)
            try:
                done = await run(
                    [str(self.program), *before, *map(str, paths), *after, safe],
                    env={"HOME": folder, "TMPDIR": folder},
                    cwd=Path(folder),
                    timeout=_TIMEOUT,
                    memory=_MEMORY,
                    confinement=Confinement(self.program, writable=(Path(folder),)),
                )
                if done.returncode:
                    return None
                return await anyio.to_thread.run_sync(read_file, Path(folder), paths[1].name, MAX_RESOLVED_BYTES)
            except (OSError, TimeoutError):  # the driver is optional: a session resolves the conflict instead
                return None


@dataclass(frozen=True, slots=True)
class StructuralMerge:
    """The tree of a merge without conflicts, and the drivers that merged the files that git could not merge."""

    tree: str
    drivers: tuple[str, ...]


def find_merge_drivers(environ: Mapping[str, str]) -> tuple[MergeDriver, ...]:
    """Return the structural merge drivers on PATH, in the order in which they are tried. Blocks."""
    found = ((name, shutil.which(name, path=environ.get("PATH"))) for name in _OPTIONS)
    programs = ((name, Path(program)) for name, program in found if program is not None)
    # A relative folder on PATH would depend on the current folder, which may have files of agents.
    return tuple(MergeDriver(name, program.resolve()) for name, program in programs if program.is_absolute())


async def merge_structurally(
    git: Git, drivers: Sequence[MergeDriver], ours: str, theirs: str
) -> StructuralMerge | None:
    """Merge two conflicting commits; return None unless drivers merge all conflicts, with the changes of both sides."""
    if not drivers:
        return None
    try:
        conflict = await read_conflict(git, ours, theirs)
    except RefusedError:
        return None
    merged, used = dict[str, bytes](), dict[str, None]()
    for name, file in conflict.files.items():
        for driver in drivers:
            text = await driver.merge(git, name, conflict.texts[name])
            # In a thread: comparing long hunks takes time.
            if text is not None and not await anyio.to_thread.run_sync(find_resolution_problem, file, text):
                merged[name], used[driver.name] = text, None
                break
        else:
            return None
    blobs = {name: await git.line("hash-object", "-w", "--stdin", input_=text) for name, text in merged.items()}
    entries = ((conflict.modes[name], blob, name) for name, blob in blobs.items())
    return StructuralMerge(await replace_entries(git, conflict.tree, entries), tuple(used))
