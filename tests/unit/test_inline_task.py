"""Inline tasks are loaded like those of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from adapters.command.adapter import CommandAdapter
from adapters.command.options import CommandOptions
from orchestrator.config.entries import Extensions
from orchestrator.config.inline import InlineTasks, load_inline
from orchestrator.config.model import RunConfig
from orchestrator.errors import ConfigError, RefusedError
from orchestrator.protocols import AdapterType

HEAD = "version: 1\ntarget: out\ndefaults: {timeout: 2s, checks: [old]}\n"
ONE = "adapters: {fixer: {use: command, argv: [fix]}}\n"
TWO = "adapters: {fixer: {use: command, argv: [fix]}, other: {use: command, argv: [x]}}\n"
TASKS = "tasks: [{id: a, prompt: ' ', needs: [b]}]\n"


class _FreeOptions(CommandOptions):
    argv: tuple[str, ...] = ("sh",)


class _Free(CommandAdapter):
    """An adapter type with optional options only."""

    Options: ClassVar[type[BaseModel]] = _FreeOptions


TYPES: dict[str, AdapterType] = {"command": CommandAdapter, "free": _Free}


def load(folder: Path, text: str | None, *prompts: str, **choices: Any) -> RunConfig:
    file = None if text is None else folder / "council.yaml"
    if file is not None and text is not None:
        file.write_text(text)
    return load_inline(InlineTasks(prompts or ("Do it.",), **choices), file, folder, TYPES)


def test_inline_task_replaces_those_of_the_file(tmp_path: Path) -> None:
    """Mistakes in the tasks of the file do not matter."""
    config = load(tmp_path, HEAD + ONE + TASKS, "Do it.", "And that.", base="dev", checks=("new",))
    assert [(task.id, task.prompt, task.adapter) for task in config.tasks] == [
        ("task-1", "Do it.", "fixer"), ("task-2", "And that.", "fixer"),
    ]  # fmt: skip
    assert (config.base, config.target, config.path) == ("dev", "out", tmp_path / "council.yaml")
    assert {(task.timeout, task.check_commands) for task in config.tasks} == {(2.0, ("new",))}
    assert load(tmp_path, HEAD + ONE + TASKS).tasks[0].check_commands == ("old",)


@pytest.mark.parametrize(
    ("text", "adapter", "expected"),
    [
        (HEAD + TWO, "other", "other"),
        (HEAD.replace("{timeout", "{adapter: other, timeout") + TWO, None, "other"),
        (HEAD + TWO, "free", "free"),
        (None, "free", "free"),
        ("version: 1\n", "free", "free"),
    ],
    ids=["of the file", "the default", "an installed type", "without a file", "with a file of no adapter"],
)
def test_inline_adapter_is_of_the_file_or_needs_no_options(
    tmp_path: Path, text: str | None, adapter: str | None, expected: str
) -> None:
    """The named adapter, else that of the file."""
    config = load(tmp_path, text, adapter=adapter)
    assert config.tasks[0].adapter == expected
    assert expected in config.adapters


@pytest.mark.parametrize(
    ("text", "adapter", "what", "remedy"),
    [
        (HEAD + TWO, None, "several adapters and no default", "choose one with --adapter: fixer, other, free"),
        (None, None, "no file specifies an adapter", "choose one with --adapter: free"),
        (HEAD + ONE, "fixr", "there is no adapter 'fixr'", "did you mean 'fixer'?"),
        (HEAD + ONE, "zzz", "there is no adapter 'zzz'", "possible ones are fixer, free"),
        (None, "command", "'command' needs options", "possible ones are free"),
    ],
)
def test_unknown_adapter_lists_the_possible_ones(
    tmp_path: Path, text: str | None, adapter: str | None, what: str, remedy: str
) -> None:
    """The error lists the possible adapters."""
    with pytest.raises(RefusedError) as refused:
        load(tmp_path, text, adapter=adapter)
    assert what in refused.value.message
    assert remedy in refused.value.remedy


def test_unknown_adapter_explains_skipped_profiles(tmp_path: Path) -> None:
    """The error of a profile precedes the possible adapters."""
    explained = Extensions(explain=lambda name: f"skipped: the profile {name}: unknown key 'x'")
    with pytest.raises(RefusedError) as refused:
        load_inline(InlineTasks(("Do it.",), adapter="odd"), None, tmp_path, TYPES, explained)
    assert refused.value.remedy.startswith("skipped: the profile odd: unknown key 'x'; possible ones are free")


def test_missing_clis_suggest_the_command_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only adapters with a program on PATH are suggested."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RefusedError) as refused:
        load(tmp_path, None)
    assert "no supported CLI is on PATH" in refused.value.message
    assert "`use: command`" in refused.value.remedy


def test_mistakes_of_file_and_sentence_have_their_positions(tmp_path: Path) -> None:
    """Each mistake is reported at its own source."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, HEAD.replace("2s", "2") + ONE, " ", target="a..b")
    path = tmp_path / "council.yaml"
    assert str(caught.value).splitlines() == [
        "<run>: tasks[0].prompt: the prompt is empty: describe the task",
        "<run>: target: 'a..b' can't be a branch, it contains '..': write a branch name, such as main or team/work",
        f"{path}:3:21: a duration can't be the bare number 2: add its unit, such as 2s or 2m",
    ]


def test_trackers_of_the_file_are_ignored(tmp_path: Path) -> None:
    """The run contains the inline tasks only."""
    config = load(tmp_path, HEAD + ONE + "trackers: {board: {use: zzz}}\n")
    assert ([task.id for task in config.tasks], dict(config.trackers)) == (["task-1"], {})


@pytest.mark.parametrize("text", ["adapters: 3\nversion: 1\n", "version: [\n", "- x\n", "version: 1\nadapters: {}\n"])
def test_invalid_file_is_reported_as_such(tmp_path: Path, text: str) -> None:
    """Before any mistake about adapters."""
    with pytest.raises((ConfigError, RefusedError)) as caught:
        load(tmp_path, text)
    assert ("adapters" in text and "{}" in text) == isinstance(caught.value, RefusedError)
