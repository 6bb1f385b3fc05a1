"""The text of a first file, made from what was found of a repository and of the programs. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import yaml

from orchestrator.config.source.scalars import resolve_plain

_PLAIN: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._/-")

_STARTS: Final = frozenset("0123456789_-")
#: What readers of YAML 1.1, which editors may have, take for booleans.
_OLD_WORDS: Final = frozenset({"y", "n", "yes", "no", "on", "off"})


@dataclass(frozen=True, slots=True)
class StarterAdapter:
    """An adapter that can be used as it is: the name of its type, and what was found of its programs, in words."""

    use: str
    found: str


@dataclass(frozen=True, slots=True)
class Starter:
    """What a first file says; `repo` is relative to it. Without adapters it has a program that is to be filled in."""

    repo: str
    base: str
    adapters: Sequence[StarterAdapter]
    check: str | None
    """The shell command that runs the repository's tests."""
    before: str | None
    """What it may need on the machine."""
    setup: str | None
    """The shell command that creates what a fresh checkout needs for that."""
    inputs: Sequence[str]
    """The files that this depends on."""
    missing: str | None
    """What this machine lacks for both."""
    schema: str | None
    """Where the JSON Schema of the file is, relative to it."""


def starter_text(starter: Starter) -> str:
    """Return the file's text."""
    return "\n".join(_lines(starter)) + "\n"


def _lines(starter: Starter) -> Iterator[str]:
    if starter.schema is not None:
        yield f"# yaml-language-server: $schema={starter.schema}"
    yield "# What `council run` does: tasks for AI coding CLIs, each in a worktree of its own."
    yield "# `council doctor` looks whether it could work here."
    yield "version: 1"
    yield _commented(f"repo: {scalar(starter.repo)}", "the repository, relative to this file")
    yield _commented(f"base: {scalar(starter.base)}", "where work starts")
    yield "# target: main                # where it lands; without it, on a new branch council/<run>"
    yield _commented("capacity: 4", "sessions at once")
    yield from _worktrees(starter)
    yield ""
    yield "adapters:"
    yield from _adapters(starter.adapters)
    yield ""
    yield "defaults:"
    if len(starter.adapters) > 1:
        yield _commented(f"  adapter: {scalar(starter.adapters[0].use)}", "a task may name another one")
    yield _commented("  timeout: 30m", "wall clock, for each session")
    yield _commented("  attempts: 3", "how often a task is tried")
    yield from _checks(starter)
    yield ""
    yield from _TASKS


def _worktrees(starter: Starter) -> Iterator[str]:
    if starter.setup is None:
        yield _commented("# worktrees: {copy: [.env]}", "what sessions need and git ignores; `setup:` creates it")
        return
    comment = "# " if starter.missing is not None else ""
    yield _commented(f"{comment}worktrees:", "they have the committed files; `copy: [.env]` adds ignored ones")
    yield _commented(f"{comment}  setup:", "in each new worktree, and when one of the inputs has changed")
    yield f"{comment}    - run: {scalar(starter.setup)}"
    if starter.inputs:
        yield f"{comment}      inputs: [{', '.join(map(scalar, starter.inputs))}]"


def _adapters(adapters: Sequence[StarterAdapter]) -> Iterator[str]:
    if not adapters:
        yield from _NO_ADAPTER
    for adapter in adapters:
        yield f"  {scalar(adapter.use)}:"
        yield _commented(f"    use: {scalar(adapter.use)}", _one_line(adapter.found))
    if adapters:
        yield "    # writable: [~/.some-cli]   # what its sessions must write beside their worktree"


def _checks(starter: Starter) -> Iterator[str]:
    if starter.check is None:
        yield '  # checks: ["make test"]       # commands that must succeed on the merged files before they land'
        return
    comment = "# " if starter.missing is not None else ""
    if starter.missing is not None:
        yield f"  # The tests can't be run here: {_one_line(starter.missing)}"
    yield _commented(f"  {comment}checks:", "must succeed on the merged files before they land")
    yield f"  {comment}  - {scalar(starter.check)}"
    if starter.before is not None:
        yield f"    # in a fresh checkout: if something must be installed first, {scalar(_both(starter))}"


def _both(starter: Starter) -> str:
    return f"{starter.before} && {starter.check}"


_NO_ADAPTER: Final = (
    "  my-cli:                       # no CLI that an adapter knows was found: name your own",
    "    use: command                # any program that changes files in the current folder",
    '    argv: [my-cli, "{prompt_file}"]  # the program and its arguments; {prompt} is the text itself',
    "    env: [HOME]                 # variables to pass on, such as the name of one with a key",
)
_TASKS: Final = (
    "tasks:",
    "  - id: readme                  # letters, digits, '.', '_' and '-'",
    "    prompt: |                   # what you would tell the CLI; `prompt_file: FILE` takes it from a file",
    "      Read the README as somebody who is new here. Correct one thing in it that is wrong or unclear,",
    "      and change nothing else.",
    "  # - id: next                  # a second task: it starts when `readme` has landed",
    "  #   needs: [readme]",
    "  #   owns: [docs/**]           # tasks that own a common path follow each other",
    "  #   prompt: …",
)


def _commented(line: str, comment: str) -> str:
    return f"{line:<29} # {comment}"


def _one_line(text: str) -> str:
    """Return text that can stand in a comment."""
    return "".join(char if char.isprintable() else " " for char in text)


def scalar(text: str) -> str:
    """Return text as one YAML scalar on one line: plain where it reads back as the same text, else in double quotes."""
    looks_plain = text and set(text) <= _PLAIN and text[0] not in _STARTS and text.lower() not in _OLD_WORDS
    if looks_plain and resolve_plain(text) == text:
        return text
    quoted: str = yaml.dump(text, default_style='"', allow_unicode=True, width=float("inf"))
    return quoted.removesuffix("\n")
