"""What every adapter promises, as tests: subclass `AdapterContract` in a test module and name the adapter.

class TestMyAdapter(AdapterContract):
    adapter_type = MyAdapter
    options = {"model": "small"}
"""
# ruff: noqa: S101  assert is what a test suite is made of, also one that is shipped

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ValidationError

from orchestrator.domain.failures import FailureClass
from orchestrator.protocols import AdapterType, Command, SessionEnd, SessionRequest

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PROMPTS = ("Fix it.", 'Say "{task}" and {prompt}; $HOME `id`\n\nÄ 漢 🙂', "-rf --help\n", "x" * 20_000)


class AdapterContract:
    """The suite; `adapter_type` is what the plugin registers, `options` a valid mapping as in the YAML file.

    A validator of `Options` says what is wrong and what would be right by `ValueError("what: remedy")`.
    """

    adapter_type: ClassVar[AdapterType]
    options: ClassVar[Mapping[str, Any]]

    def validated(self) -> BaseModel:
        """Return the options as the adapter gets them."""
        return self.adapter_type.Options.model_validate(dict(self.options))

    def requests(self, folder: Path) -> list[SessionRequest]:
        """Return requests of all kinds; neither the prompt file nor the worktree exists."""
        return [
            SessionRequest(
                run="20260101-abc",
                task="a-task",
                attempt=attempt,
                prompt=prompt,
                prompt_file=folder / "prompt",
                worktree=folder / "work tree",
            )
            for attempt, prompt in enumerate(_PROMPTS, start=1)
        ]

    def commands(self, folder: Path) -> list[Command]:
        """Return the command for each request, from a new adapter."""
        adapter = self.adapter_type(self.validated())
        return [adapter.command(request) for request in self.requests(folder)]

    def test_options_survive_json(self, tmp_path: Path) -> None:
        """Options that were stored as JSON and read again are equal and give equal commands."""
        options = self.validated()
        stored = json.loads(json.dumps(options.model_dump(mode="json"), allow_nan=False))
        restored = self.adapter_type.Options.model_validate(stored)
        assert restored == options
        adapter = self.adapter_type(restored)
        assert [adapter.command(request) for request in self.requests(tmp_path)] == self.commands(tmp_path)

    def test_unknown_options_are_refused(self) -> None:
        """An option that the adapter does not know is an error, not ignored."""
        with pytest.raises(ValidationError):
            self.adapter_type.Options.model_validate({**self.options, "no_such_option": 1})

    def test_the_files_own_keys_are_no_options(self) -> None:
        """The keys that every adapter's entry has belong to the file's own shape, options can't have them."""
        taken = {"use", "capacity", "writable", "readable"} & self.adapter_type.Options.model_fields.keys()
        assert not taken, f"rename the options {taken}"

    def test_options_do_not_change(self) -> None:
        """Options are frozen: one adapter may serve many sessions at once."""
        assert self.adapter_type.Options.model_config.get("frozen"), "set frozen=True in model_config"

    def test_command_is_repeatable(self, tmp_path: Path) -> None:
        """The same request gives the same command, whatever was asked before."""
        adapter = self.adapter_type(self.validated())
        requests = self.requests(tmp_path)
        first = [adapter.command(request) for request in requests]
        again = [adapter.command(request) for request in reversed(requests)]
        assert again[::-1] == first

    def test_command_touches_nothing(self, tmp_path: Path) -> None:
        """Asking for a command needs no file and leaves none."""
        self.commands(tmp_path)
        assert list(tmp_path.iterdir()) == [], "command() must not write files"

    def test_argv_is_a_command_line(self, tmp_path: Path) -> None:
        """argv is a non-empty list of text without NUL, its program not empty."""
        for command in self.commands(tmp_path):
            assert not isinstance(command.argv, str), "argv is a list, never one string for a shell"
            assert command.argv, "argv is empty"
            assert command.argv[0], "the program is empty"
            assert [a for a in command.argv if type(a) is not str or "\0" in a] == []

    def test_stdin_is_the_prompt_file_or_nothing(self, tmp_path: Path) -> None:
        """The only file that a session may read as its input is the one that holds its prompt."""
        for command in self.commands(tmp_path):
            assert command.stdin in {None, tmp_path / "prompt"}, command.stdin

    def test_environment_names_are_valid(self, tmp_path: Path) -> None:
        """Variables have portable names, values without NUL, and leave COUNCIL_* to the run."""
        for command in self.commands(tmp_path):
            assert not isinstance(command.pass_env, str), "pass_env is a list of names"
            for name in (*command.env, *command.pass_env):
                assert _ENV_NAME.fullmatch(name), name
                assert not name.startswith("COUNCIL_"), name
            assert [v for v in command.env.values() if type(v) is not str or "\0" in v] == []

    @pytest.mark.parametrize("said", ["", "done\n", "\x00\ufffd\x1b[31m\n", "word " * 13_000, "\n" * 65_000])
    @pytest.mark.parametrize(("code", "number"), [(0, None), (1, None), (None, 9)])
    def test_verdict_is_a_class_of_failure_or_nothing(self, said: str, code: int | None, number: int | None) -> None:
        """Whatever was printed, the same end gives the same verdict: None, or a class with a reason."""
        adapter = self.adapter_type(self.validated())
        end = SessionEnd(exit=code, signal=number, time=1_000_000.0, stdout=said, stderr=said)
        verdict = adapter.verdict(end)
        assert adapter.verdict(end) == verdict
        if verdict is not None:
            assert isinstance(verdict.failure, FailureClass)
            assert verdict.reason, "a verdict says why"
            assert verdict.until is None or math.isfinite(verdict.until)

    def test_programs_are_bare_names(self) -> None:
        """Programs to look for on PATH are names without a slash."""
        programs = self.adapter_type(self.validated()).programs()
        assert not isinstance(programs, str), "programs() returns a list of names"
        assert all(program and "/" not in program for program in programs), programs
