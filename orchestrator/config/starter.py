"""Generate a starter config file from facts about the repository and programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

import yaml

from orchestrator.config.source.scalars import resolve_plain
from orchestrator.protocols import AdapterType, StarterValue

_PLAIN: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._/-")

_STARTS: Final = frozenset("0123456789_-")
#: Booleans of YAML 1.1, which editors may use.
_OLD_WORDS: Final = frozenset({"y", "n", "yes", "no", "on", "off"})


@dataclass(frozen=True, slots=True)
class StarterAdapter:
    """A usable adapter: the name of its type, and a description of its programs."""

    use: str
    found: str
    options: Mapping[str, StarterValue] = field(default_factory=dict)
    """Its options in the file."""

    @classmethod
    def of(cls, use: str, found: str, adapter_type: AdapterType) -> Self:
        """Return the entry of an adapter type, with the options that it annotates for a new file."""
        fields = adapter_type.Options.model_fields.items()
        marked = {key: one for key, option in fields for one in option.metadata if isinstance(one, StarterValue)}
        return cls(use, found, marked)


@dataclass(frozen=True, slots=True)
class Starter:
    """The contents of a starter file; `repo` is relative to it.

    Without adapters, it has a placeholder.
    """

    repo: str
    base: str
    adapters: Sequence[StarterAdapter]
    check: str | None
    """The shell command that runs the repository's tests."""
    before: str | None
    """A command that may have to run before `check`."""
    setup: str | None
    """The shell command that sets up a fresh checkout."""
    inputs: Sequence[str]
    """The files that `setup` depends on."""
    missing: str | None
    """The missing requirements of `check` and `setup` on this machine."""
    schema: str | None
    """The path of the JSON Schema, relative to the file."""


def starter_text(starter: Starter) -> str:
    """Return the text of the file."""
    return "\n".join(_lines(starter)) + "\n"


def _lines(starter: Starter) -> Iterator[str]:
    if starter.schema is not None:
        yield f"# yaml-language-server: $schema={starter.schema}"
    yield "# Tasks for AI coding CLIs, run by `council run`, each in its own worktree."
    yield "# Check the setup with `council doctor`."
    yield "version: 1"
    yield _commented(f"repo: {scalar(starter.repo)}", "the repository, relative to this file")
    yield _commented(f"base: {scalar(starter.base)}", "the branch that tasks start from")
    yield _commented(f"# target: {scalar(starter.base)}", "the branch to land on; default: council/<run>")
    yield _commented("capacity: 4", "concurrent sessions")
    yield from _worktrees(starter)
    yield ""
    yield "adapters:"
    yield from _adapters(starter.adapters)
    yield ""
    yield "defaults:"
    if len(starter.adapters) > 1:
        yield _commented(f"  adapter: {scalar(starter.adapters[0].use)}", "tasks can use another one")
    yield _commented("  timeout: 30m", "wall clock, per session")
    yield _commented("  attempts: 3", "attempts per task")
    yield from _checks(starter)
    yield ""
    yield from _TASKS


def _worktrees(starter: Starter) -> Iterator[str]:
    if starter.setup is None:
        yield _commented("# worktrees: {copy: [.env]}", "git-ignored files that sessions need; `setup:` creates them")
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
        for key, option in adapter.options.items():
            yield _commented(f"    {key}: {scalar(option.value)}", option.comment)
    if adapters:
        yield "    # writable: [~/.some-cli]   # paths to write outside the worktree"


def _checks(starter: Starter) -> Iterator[str]:
    if starter.check is None:
        yield '  # checks: ["make test"]       # commands that must succeed on the merged tree'
        return
    comment = "# " if starter.missing is not None else ""
    if starter.missing is not None:
        yield f"  # The tests can't run here: {_one_line(starter.missing)}"
    yield _commented(f"  {comment}checks:", "must succeed on the merged tree")
    yield f"  {comment}  - {scalar(starter.check)}"
    if starter.before is not None:
        yield f"    # in a fresh checkout: if something must be installed first, {scalar(_both(starter))}"


def _both(starter: Starter) -> str:
    return f"{starter.before} && {starter.check}"


_NO_ADAPTER: Final = (
    "  my-cli:                       # no known CLI was found: add your own",
    "    use: command                # any program that changes files in the current folder",
    '    argv: [my-cli, "{prompt_file}"]  # the program and its arguments; {prompt} is the text itself',
    "    env: [HOME]                 # variables to pass on, such as the name of one with a key",
)
_TASKS: Final = (
    "tasks:",
    "  - id: first                   # letters, digits, '.', '_' and '-'",
    "    prompt: |                   # or use `prompt_file: FILE`",
    "      Find one small error in this repository, such as a typo or an outdated comment.",
    "      Fix it, and change nothing else.",
    "  # - id: next                  # starts after `first` has landed",
    "  #   needs: [first]",
    "  #   owns: [docs/**]           # tasks with overlapping paths run one at a time",
    "  #   prompt: …",
)


def _commented(line: str, comment: str) -> str:
    return f"{line:<29} # {comment}"


def _one_line(text: str) -> str:
    """Return text without line breaks, for a comment."""
    return "".join(char if char.isprintable() else " " for char in text)


def scalar(text: str) -> str:
    """Return text as a YAML scalar on one line, plain if unambiguous, else quoted."""
    looks_plain = text and set(text) <= _PLAIN and text[0] not in _STARTS and text.lower() not in _OLD_WORDS
    if looks_plain and resolve_plain(text) == text:
        return text
    quoted: str = yaml.dump(text, default_style='"', allow_unicode=True, width=float("inf"))
    return quoted.removesuffix("\n")
