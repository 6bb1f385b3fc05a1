"""The tracker for a Markdown checklist: open items are tasks.

Items are ticked once their tasks have landed; a task whose item a person ticks is cancelled:

    - [ ] Add a User model. {#models}
    - [ ] Fix the typo in the README
          More words for the same task, indented.
    - [x] A ticked item is not a task.

Configuration:

    trackers:
      todo:
        use: checklist
        file: ../todo.md
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import dedent
from typing import ClassVar, Final, Self

import anyio.to_thread
import pluggy
from pydantic import BaseModel, ConfigDict

from orchestrator.config.source.files import open_regular_file
from orchestrator.errors import RefusedError
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterTracker
from orchestrator.protocols import PathOption, SyncResult, TrackedState, TrackedTask, TrackerRequest
from orchestrator.repo.git.command import Git
from orchestrator.system.files import atomic_write

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)

_ITEM: Final = re.compile(rb"(?P<before>(?P<indent>[ \t]*)[-*+] \[)(?P<mark>[ xX])\][ \t]+(?P<text>[^\r\n]*)\r?\n?")
_ID: Final = re.compile(r"\{#([^{}\s]+)\}\s*$")
_FENCE: Final = re.compile(rb"[ ]{0,3}(`{3,}|~{3,})")
_NOT_IN_SLUG: Final = re.compile(r"[^a-z0-9]+")
_LONGEST_SLUG: Final = 48


@dataclass(frozen=True, slots=True)
class ChecklistItem:
    """An item of a checklist.

    `line` counts from 1, `offset` is the byte offset of the checkbox, `done` is whether the item is ticked.
    """

    line: int
    offset: int
    done: bool
    id: str
    text: str


def read_items(data: bytes) -> list[ChecklistItem]:
    """Return the items of a checklist, except those in code blocks."""
    lines = data.splitlines(keepends=True)
    items, offset, code_fence = [], 0, b""
    for index, line in enumerate(lines):
        begin, offset = offset, offset + len(line)
        if (ticks := _FENCE.match(line)) is not None and (not code_fence or line.strip().startswith(code_fence)):
            code_fence = b"" if code_fence else ticks[1]
        item = None if code_fence else _ITEM.fullmatch(line)
        if item is None:
            continue
        rest = b"".join(_continuation_lines(lines, index + 1, len(item["indent"])))
        text = item["text"].decode(errors="replace")
        explicit_id, text = _ID.search(text), _ID.sub("", text).strip()
        full_text = "\n".join(filter(None, (text, dedent(rest.decode(errors="replace")).strip())))
        name = explicit_id[1] if explicit_id else _NOT_IN_SLUG.sub("-", text.lower())[:_LONGEST_SLUG].strip("-")
        items.append(ChecklistItem(index + 1, begin + item.end("before"), item["mark"] != b" ", name, full_text))
    return items


def _continuation_lines(lines: Sequence[bytes], begin: int, indent: int) -> Iterator[bytes]:
    """Yield the continuation lines of an item, starting at `begin`: indented lines that are not items."""
    for index in range(begin, len(lines)):
        line = lines[index]
        deeper = len(line) - len(line.lstrip(b" \t")) > indent
        if not deeper or not line.strip() or _ITEM.fullmatch(line):
            return
        yield line


class ChecklistOptions(BaseModel):
    """The options of a tracker with `use: checklist`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)

    file: PathOption
    """The Markdown file, relative to this one; git may not track it."""


class ChecklistTracker:
    """A tracker whose tasks are the open items of a file."""

    Options: ClassVar[type[BaseModel]] = ChecklistOptions

    def __init__(self, options: ChecklistOptions, /) -> None:
        self._path = options.file

    async def __aenter__(self) -> Self:
        """Open nothing: each call reads the file again."""
        return self

    async def __aexit__(self, *raised: object) -> None:
        """Close nothing."""

    async def tasks(self) -> Sequence[TrackedTask]:
        """Return the items that are not ticked.

        Raises RefusedError if the file can't be read, if git tracks it, or if an item has no id.
        """
        await self._check_untracked()
        items = read_items(await anyio.to_thread.run_sync(self._read))
        for item in items:
            if not item.done and not item.id:
                message = f"{self._path}, line {item.line}: no id can be derived from {item.text[:60]!r}"
                raise RefusedError(message, "add an id at its end, such as {#fix-login}")
        return [TrackedTask(item.id, item.text) for item in items if not item.done]

    async def sync(self, states: Sequence[TrackedState]) -> SyncResult:
        """Tick the items of successful tasks; an item that a person ticks meanwhile cancels its task."""
        done = {state.id for state in states if state.is_done}
        if done:
            await anyio.to_thread.run_sync(self._tick, done, abandon_on_cancel=True)
        items = read_items(await anyio.to_thread.run_sync(self._read, abandon_on_cancel=True))
        ticked = {item.id for item in items if item.done}
        open_tasks = [state.id for state in states if not state.has_ended and state.id in ticked]
        return SyncResult([TrackerRequest(f"ticked-{task}", task, "cancel") for task in open_tasks])

    async def _check_untracked(self) -> None:
        """Refuse a file that git tracks: uncommitted ticks would keep tasks from landing."""
        path = await anyio.to_thread.run_sync(self._path.resolve)
        if not await anyio.to_thread.run_sync(path.parent.is_dir):
            return
        listed = await Git(None, as_user=True)("ls-files", "-z", "--", path.name, cwd=path.parent, ok=(0, 128))
        if listed.stdout:
            remedy = "move it elsewhere, or `git rm --cached` it and add it to .gitignore"
            raise RefusedError(f"git tracks {self._path}, and changes to its checkboxes would block landings", remedy)

    def _read(self) -> bytes:
        try:
            with open_regular_file(self._path) as file:
                return file.read()
        except OSError as error:
            message = f"{self._path} can't be read, {(error.strerror or str(error)).lower()}"
            raise RefusedError(message, "use an existing checklist") from error

    def _tick(self, done: set[str]) -> None:
        path = self._path.resolve()
        data = before = path.read_bytes()
        for item in read_items(data):
            if item.id in done and not item.done:
                data = data[: item.offset] + b"x" + data[item.offset + 1 :]
        if data != before:
            atomic_write(path, data, mode=stat.S_IMODE(path.stat().st_mode), durable=True)


@hookimpl
def council_register_trackers(register: RegisterTracker) -> None:
    """Register `use: checklist`."""
    register("checklist", ChecklistTracker)
