"""Parse a model's response into files and diffs, and apply them all or none."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from adapters.bridges.worktree import ConfinedWorktree, OutsideWorktreeError

#: Instructions for the format of a model's response.
EDIT_INSTRUCTIONS: Final = """\
You change the files of a git repository. You can't run anything: your response is applied unchanged.

For each file that is new, or changed in many places, write one block with its complete new content:

```file path/to/file.py
the content
```

To change a long file in few places, or to delete or rename one, write a block with a unified diff as from `git diff`:

```diff
--- a/path/to/file.py
+++ b/path/to/file.py
@@ -1,3 +1,3 @@
 an unchanged line
-a removed line
+an added line
 another unchanged line
```

Paths are relative to the root of the repository. If the content has lines that begin with three backticks, use four for
the block. Change only what the task needs. Apart from the blocks, write no more than a few sentences.
"""

#: Instructions for a read-only task.
READ_ONLY_INSTRUCTIONS: Final = """\
You review the files of a git repository and change nothing. You can't run anything: your response is only read, not
applied. Respond in prose, with paths and line numbers.
"""

_FENCE: Final = re.compile(r"(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`]*)")
_FILE: Final = re.compile(r"file[ :=]+(?P<path>.+)")
_DIFFS: Final = ("diff", "patch")
# Git's extended header, if there is one, and the two lines of file names.
_HEADER: Final = re.compile(
    r"^((?:(?:diff --git|index|new|deleted|old|(?:dis)?similarity|rename|copy) .*\n)*)(--- .*\n\+\+\+ .*\n)(?=@@ )",
    re.MULTILINE,
)
_ODD_MODE: Final = re.compile(r"^(?:new file mode|new mode|index \S+) (?:120000|160000)$", re.MULTILINE)


class UnusableResponseError(Exception):
    """The response is truncated, contradictory, or does not match the files."""


@dataclass(frozen=True, slots=True)
class ProposedChanges:
    """Complete files, keyed by path, and one patch with all diffs."""

    files: dict[str, str]
    patch: str


def parse_response(text: str) -> ProposedChanges:
    """Return the changes in a response; ignore all other code blocks.

    Raises UnusableResponseError if the response is truncated.
    """
    files: dict[str, str] = {}
    diffs: list[str] = []
    for info, content in _blocks(text):
        if (file := _FILE.fullmatch(info)) is not None:
            files[file["path"].strip().strip("'\"")] = content
        elif info.lower() in _DIFFS:
            diffs.append(_separate_files(content))
    return ProposedChanges(files, "".join(diffs))


def _separate_files(diff: str) -> str:
    """Separate the files of a diff, since git must not trust a model's line counts."""
    return _HEADER.sub(lambda found: found[1] + ("" if found[1] else "diff -u\n") + found[2], f"{diff.rstrip()}\n")


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if opened is None:
            opened, lines = _FENCE.fullmatch(bare), []
        elif bare.startswith(opened["fence"]) and not bare.strip(opened["fence"][0]):
            yield opened["info"].strip(), "".join(lines)
            opened = None
        else:
            lines.append(line)
    if opened is not None and (_FILE.fullmatch(opened["info"].strip()) or opened["info"].strip().lower() in _DIFFS):
        raise UnusableResponseError("its last block is not closed")


def apply_response(response: ProposedChanges, worktree: ConfinedWorktree) -> Sequence[str]:
    """Apply a response to the worktree; return the changed paths.

    On an error, nothing is changed. Raises OutsideWorktreeError for a path outside the worktree, and
    UnusableResponseError if the response can't be applied.
    """
    targets = {name: worktree.relative(name) for name in response.files}
    strip = "-p1" if re.search(r"^(?:---|\+\+\+) [ab]/", response.patch, re.MULTILINE) else "-p0"
    patched = _paths_of(response.patch, strip, worktree) if response.patch else []
    for name in patched:
        if worktree.relative(name) in targets.values():
            raise UnusableResponseError(f"it has {name!r} both as a file and as a diff")
    if response.patch:
        _git_apply(response.patch, "--check", strip, worktree=worktree)
    before = _write_all({path: response.files[name] for name, path in targets.items()})
    try:
        if response.patch:
            _git_apply(response.patch, strip, worktree=worktree)
    except UnusableResponseError:
        _restore(before)
        raise
    return [*targets, *patched]


def _paths_of(patch: str, strip: str, worktree: ConfinedWorktree) -> list[str]:
    if _ODD_MODE.search(patch):
        raise OutsideWorktreeError("the diff creates a symlink or a nested repository")
    # With -z: `added TAB deleted TAB path NUL`, and for a rename an empty path, then the old and the new one.
    fields = _git_apply(patch, "--numstat", "-z", strip, worktree=worktree).split("\0")
    paths = [field.split("\t", 2)[2] if field.count("\t") >= 2 else field for field in fields]
    return list(dict.fromkeys(path for path in paths if path))


def _git_apply(patch: str, *options: str, worktree: ConfinedWorktree) -> str:
    done = subprocess.run(
        ["git", "apply", "--recount", "--whitespace=nowarn", *options, "-"],  # noqa: S607
        cwd=worktree.top,
        input=patch.encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise UnusableResponseError(" ".join(done.stderr.decode(errors="replace").split())[:300])
    return done.stdout.decode(errors="replace")


def _write_all(contents: dict[Path, str]) -> dict[Path, bytes | None]:
    """Write files; return their previous contents (None for new files).

    Before raising UnusableResponseError, restores all files.
    """
    before: dict[Path, bytes | None] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            before[path] = path.read_bytes() if path.exists() else None
            path.write_text(content, encoding="utf-8")
    except OSError as error:
        _restore(before)
        raise UnusableResponseError(str(error)) from error
    return before


def _restore(before: dict[Path, bytes | None]) -> None:
    for path, content in before.items():
        if content is not None:
            path.write_bytes(content)
        elif path.is_file():
            path.unlink()
