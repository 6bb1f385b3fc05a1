"""A Markdown file whose open items are tasks: they are ticked once they have landed.

    - [ ] Add a User model. {#models}
    - [ ] Fix the typo in the README
          More words for the same task, indented.
    - [x] Whatever is ticked is no task.

trackers:
  todo:
    use: checklist
    file: ../todo.md
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkstemp
from textwrap import dedent
from typing import ClassVar, Final, Self

import anyio.to_thread
import pluggy
from pydantic import BaseModel, ConfigDict

from orchestrator.config.source.files import open_regular_file
from orchestrator.errors import RefusedError
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterTracker
from orchestrator.protocols import PathOption, RecordedEvent, TrackedTask
from orchestrator.repo.git.command import Git

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)

_ITEM: Final = re.compile(rb"(?P<before>(?P<indent>[ \t]*)[-*+] \[)(?P<mark>[ xX])\][ \t]+(?P<text>[^\r\n]*)\r?\n?")
_ID: Final = re.compile(r"\{#([^{}\s]+)\}\s*$")
_FENCE: Final = re.compile(rb"[ ]{0,3}(`{3,}|~{3,})")
_NOT_IN_SLUG: Final = re.compile(r"[^a-z0-9]+")
_LONGEST_SLUG: Final = 48
#: Events of tasks that came to what was asked.
_SUCCESSFUL: Final = frozenset({"task.landed", "task.done"})


@dataclass(frozen=True, slots=True)
class ChecklistItem:
    """One item: its line (from 1), the offset of its mark, whether it is ticked, its id, and all that it says."""

    line: int
    offset: int
    done: bool
    id: str
    text: str


def read_items(data: bytes) -> list[ChecklistItem]:
    """Return the items of a checklist, those in code blocks left out."""
    lines = data.splitlines(keepends=True)
    found, offset, fence = [], 0, b""
    for index, line in enumerate(lines):
        begin, offset = offset, offset + len(line)
        if (ticks := _FENCE.match(line)) is not None and (not fence or line.strip().startswith(fence)):
            fence = b"" if fence else ticks[1]
        item = None if fence else _ITEM.fullmatch(line)
        if item is None:
            continue
        rest = b"".join(_continuation_lines(lines, index + 1, len(item["indent"])))
        text, told = item["text"].decode(errors="replace"), _ID.search(item["text"].decode(errors="replace"))
        text = _ID.sub("", text).strip()
        said = "\n".join(filter(None, (text, dedent(rest.decode(errors="replace")).strip())))
        name = told[1] if told else _NOT_IN_SLUG.sub("-", text.lower())[:_LONGEST_SLUG].strip("-")
        found.append(ChecklistItem(index + 1, begin + item.end("before"), item["mark"] != b" ", name, said))
    return found


def _continuation_lines(lines: Sequence[bytes], begin: int, indent: int) -> Iterator[bytes]:
    """Yield the lines from `begin` on that belong to an item: indented below it, and no item of their own."""
    for index in range(begin, len(lines)):
        line = lines[index]
        deeper = len(line) - len(line.lstrip(b" \t")) > indent
        if not deeper or not line.strip() or _ITEM.fullmatch(line):
            return
        yield line


class ChecklistOptions(BaseModel):
    """What stands under a tracker that says `use: checklist`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)

    file: PathOption
    """The Markdown file, relative to this one; git may not track it."""


class ChecklistTracker:
    """The open items of a file."""

    Options: ClassVar[type[BaseModel]] = ChecklistOptions

    def __init__(self, options: ChecklistOptions, /) -> None:
        self._path = options.file

    async def __aenter__(self) -> Self:
        """Open nothing: the file is read anew each time."""
        return self

    async def __aexit__(self, *raised: object) -> None:
        """Close nothing."""

    async def tasks(self) -> Sequence[TrackedTask]:
        """Return the items that are not ticked.

        Raises RefusedError where the file can't be read, where git tracks it, or where an item has no id.
        """
        await self._check_untracked()
        items = read_items(await anyio.to_thread.run_sync(self._read))
        for item in items:
            if not item.done and not item.id:
                what = f"{self._path}, line {item.line}: no id can be made of {item.text[:60]!r}"
                raise RefusedError(what, "write one at its end, as in {#fix-login}")
        return [TrackedTask(item.id, item.text) for item in items if not item.done]

    async def send(self, events: Sequence[RecordedEvent]) -> None:
        """Tick what has landed, or is done without that."""
        over = {str(one.event.data.get("task")) for one in events if one.event.type in _SUCCESSFUL}
        if over:
            await anyio.to_thread.run_sync(self._tick, over, abandon_on_cancel=True)

    async def _check_untracked(self) -> None:
        """Refuse a file whose ticks would be changes in somebody's checkout: they would keep work from landing."""
        path = await anyio.to_thread.run_sync(self._path.resolve)
        if not await anyio.to_thread.run_sync(path.parent.is_dir):
            return
        found = await Git(None, as_user=True)("ls-files", "-z", "--", path.name, cwd=path.parent, ok=(0, 128))
        if found.stdout:
            remedy = "keep it elsewhere, or `git rm --cached` it and name it in .gitignore"
            raise RefusedError(f"git tracks {self._path}, and ticks in it would keep work from landing", remedy)

    def _read(self) -> bytes:
        try:
            with open_regular_file(self._path) as file:
                return file.read()
        except OSError as error:
            what = f"{self._path} can't be read, {(error.strerror or str(error)).lower()}"
            raise RefusedError(what, "name a checklist that is there") from error

    def _tick(self, over: set[str]) -> None:
        path = self._path.resolve()
        data = before = path.read_bytes()
        for item in read_items(data):
            if item.id in over and not item.done:
                data = data[: item.offset] + b"x" + data[item.offset + 1 :]
        if data != before:
            _replace(path, data)


def _replace(path: Path, data: bytes) -> None:
    descriptor, name = mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), path.stat().st_mode & 0o7777)
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


@hookimpl
def council_register_trackers(register: RegisterTracker) -> None:
    """Register `use: checklist`."""
    register("checklist", ChecklistTracker)
