"""The contract of every adapter, as tests: subclass `AdapterContract`.

class TestMyAdapter(AdapterContract):
    adapter_type = MyAdapter
    options = {"model": "small"}
"""

# ruff: noqa: S101  this module is a test suite

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Final

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import BaseModel

from orchestrator.domain.runs.retry import compute_cooldown_end
from orchestrator.domain.settings.failures import RETRIED_BY_DEFAULT, FailureClass, FailurePolicy, get_failure_policy
from orchestrator.protocols import (
    Adapter,
    AdapterType,
    Capability,
    McpServer,
    Program,
    SessionCommand,
    SessionEnd,
    SessionEvent,
    SessionHome,
    SessionRequest,
    ToolCall,
    UsageReport,
)
from orchestrator.sessions.output.transcript import EMPTY_TRANSCRIPT, MAX_LINE_BYTES, Transcript, has_reported_failure
from orchestrator.testing.options_contract import OptionsContract
from orchestrator.testing.recordings import read_recordings

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PROMPTS = ("Fix it.", 'Say "{task}" and {prompt}; $HOME `id`\n\nÄ 漢 🙂', "-rf --help\n", "x" * 20_000)

#: The fields of a request that use each capability.
_ASKED: Final[Mapping[Capability, Mapping[str, Any]]] = {
    Capability.RESUME: {"resume": "0c5b2f3e-1d"},
    Capability.ATTACH: {"interactive": True},
    Capability.READ_ONLY: {"read_only": True},
    Capability.INSTRUCTIONS: {"instructions": 'Speak "plainly".\nÄ 漢 🙂'},
    Capability.MCP: {
        "mcp_servers": (
            McpServer("files", ("mcp-files", "--root", "a b"), env=("MY_TOKEN",)),
            McpServer("docs", url="http://127.0.0.1:9/mcp"),
        )
    },
    Capability.COST_LIMIT: {"max_cost": 1.5},
    Capability.PRE_EDIT: {"pre_edit": ("/opt/a b/council", "hook", "pre-edit")},
    Capability.POST_TOOL: {"post_tool": ("/opt/a b/council/post-tool",)},
    Capability.STOP_GATE: {"stop_gate": ("/opt/a b/council", "hook", "stop")},
}

_ODD_LINES = (
    "",
    " ",
    "done",
    "{",
    "{}",
    "[]",
    "null",
    "1",
    '"text"',
    '{"type": null}',
    '{"type": []}',
    "\0\ufffd\x1b[31m",
)


@dataclass(frozen=True, slots=True)
class ExpectedResult:
    """The expected result of a recording.

    `failure` is its failure class (None: the program reported success). Optional: the id of its conversation, the
    text of its result, the total input and output tokens, and the paths that its tools named.
    """

    failure: FailureClass | None = None
    session: str | None = None
    text: str | None = None
    tokens: tuple[int, int] | None = None
    paths: frozenset[str] | None = None


def plain_requests(folder: Path) -> list[SessionRequest]:
    """Return requests that have only a prompt."""
    return [
        SessionRequest(
            run="20260101-abc",
            task="a-task",
            attempt=attempt,
            prompt=prompt,
            prompt_file=folder / "prompt",
            worktree=folder / "work tree",
            home=folder / "home",
        )
        for attempt, prompt in enumerate(_PROMPTS, start=1)
    ]


class AdapterContract(OptionsContract):
    """The suite for `adapter_type`, an adapter class, with valid `options` as in YAML.

    A validator of `Options` reports a problem and its fix with `ValueError("problem: remedy")`.
    """

    adapter_type: ClassVar[AdapterType]
    own_keys: ClassVar[frozenset[str]] = frozenset({"use", "capacity", "writable", "readable", "keep_ignored"})
    lines: ClassVar[Sequence[tuple[str, Sequence[SessionEvent]]]] = ()
    """Recorded lines of the program, and the events expected from each."""
    ends: ClassVar[Sequence[tuple[SessionEnd, FailureClass | None]]] = ()
    """Recorded ends, and the expected failure class of each. Events are parsed from the output."""

    limits: ClassVar[Sequence[tuple[SessionEnd, float]]] = ()
    """Ends at an account limit, and the time when the program reported that it resets (wall-clock seconds)."""
    transcripts: ClassVar[Path | None] = None
    """A folder of recordings of the program (`orchestrator.testing.recordings`)."""
    recorded: ClassVar[Mapping[str, ExpectedResult]] = {}
    """The expected result of each recording, keyed by name."""

    def options_type(self) -> type[BaseModel]:
        """Return the adapter's `Options`."""
        return self.adapter_type.Options

    def requests(self, folder: Path) -> list[SessionRequest]:
        """Return requests for a prompt and for each capability. Their paths don't exist."""
        plain = plain_requests(folder)
        asked = [_ASKED[capability] for capability in sorted(self.adapter_type(self.validated()).capabilities())]
        return [*plain, *(replace(plain[0], **changes) for changes in asked)]

    def commands(self, folder: Path) -> list[SessionCommand]:
        """Return the command for each request, from a new adapter."""
        adapter = self.adapter_type(self.validated())
        return [adapter.command(request) for request in self.requests(folder)]

    def test_restored_options_give_the_same_commands(self, tmp_path: Path) -> None:
        """Options stored as JSON and restored result in equal commands."""
        stored = json.loads(json.dumps(self.validated().model_dump(mode="json"), allow_nan=False))
        adapter = self.adapter_type(self.adapter_type.Options.model_validate(stored))
        assert [adapter.command(request) for request in self.requests(tmp_path)] == self.commands(tmp_path)

    def test_each_capability_changes_the_command(self, tmp_path: Path) -> None:
        """Each supported capability changes the command; unsupported ones do not."""
        adapter = self.adapter_type(self.validated())
        can = adapter.capabilities()
        assert can <= frozenset(Capability)
        request = plain_requests(tmp_path)[0]
        plain = adapter.command(request)
        passed = {
            capability for capability in Capability if adapter.command(replace(request, **_ASKED[capability])) != plain
        }
        assert passed == can

    def test_home_entries_have_valid_names_and_targets(self, tmp_path: Path) -> None:
        """Names are relative paths in the home; links have targets in the user's home.

        Links may also have absolute targets.
        """
        for command in self.commands(tmp_path):
            home = command.home or SessionHome()
            for name in (*home.files, *home.links, *home.settings):
                path = PurePosixPath(name)
                assert name == str(path), f"{name!r} should be {str(path)!r}"
                assert path.parts, "a name is empty"
                assert not path.is_absolute(), name
                assert ".." not in path.parts, name
            assert [target for target in home.links.values() if not target.startswith(("/", "~/"))] == []
            assert set(home.renewed) <= set(home.links)
            names = [*home.files, *home.links, *home.settings]
            assert len(names) == len(set(names)), "a name is used twice"
            assert [
                settings.file for settings in home.settings.values() if not settings.file.startswith(("/", "~/"))
            ] == []

    def test_repeated_request_gives_the_same_command(self, tmp_path: Path) -> None:
        """The same request results in the same command, regardless of earlier requests."""
        adapter = self.adapter_type(self.validated())
        requests = self.requests(tmp_path)
        first = [adapter.command(request) for request in requests]
        again = [adapter.command(request) for request in reversed(requests)]
        assert again[::-1] == first

    def test_command_creates_no_files(self, tmp_path: Path) -> None:
        """`command` needs no files and writes none."""
        self.commands(tmp_path)
        assert list(tmp_path.iterdir()) == [], "command() must not write files"

    def test_argv_is_a_list_of_valid_arguments(self, tmp_path: Path) -> None:
        """`argv` is a non-empty list of strings without NUL, and its program is not empty."""
        for command in self.commands(tmp_path):
            assert not isinstance(command.argv, str), "argv must be a list, not a string for a shell"
            assert command.argv, "argv is empty"
            assert command.argv[0], "the program is empty"
            assert [a for a in command.argv if type(a) is not str or "\0" in a] == []

    def test_stdin_is_the_prompt_file_or_none(self, tmp_path: Path) -> None:
        """A session may read only its prompt file as standard input."""
        for command in self.commands(tmp_path):
            assert command.stdin in {None, tmp_path / "prompt"}, command.stdin
            assert [path for path in command.readable if not path.is_absolute()] == []

    def test_interrupt_is_a_boolean(self, tmp_path: Path) -> None:
        """`interrupt` is a bool."""
        assert {type(command.interrupt) for command in self.commands(tmp_path)} == {bool}

    def test_scratch_patterns_are_valid_patterns(self, tmp_path: Path) -> None:
        """Each pattern is a single line that is not empty, a negation or a comment."""
        for command in self.commands(tmp_path):
            assert not isinstance(command.scratch_patterns, str), "scratch_patterns must be a list of patterns"
            odd = [
                pattern
                for pattern in command.scratch_patterns
                if not pattern.strip() or pattern.startswith(("!", "#")) or "\n" in pattern
            ]
            assert odd == []

    def test_environment_names_and_values_are_valid(self, tmp_path: Path) -> None:
        """Variables have portable names without COUNCIL_, and values without NUL."""
        for command in self.commands(tmp_path):
            assert not isinstance(command.pass_env, str), "pass_env must be a list of names"
            for name in (*command.env, *command.pass_env, *command.renamed_env):
                assert _ENV_NAME.fullmatch(name), name
                assert not name.startswith("COUNCIL_"), name
            assert [v for v in command.env.values() if type(v) is not str or "\0" in v] == []

    @pytest.mark.parametrize("said", ["", "done\n", "\x00\ufffd\x1b[31m\n", "word " * 13_000, "\n" * 65_000])
    @pytest.mark.parametrize(("code", "number"), [(0, None), (1, None), (None, 9)])
    def test_verdict_on_any_output_is_a_failure_class_or_none(
        self, said: str, code: int | None, number: int | None
    ) -> None:
        """The same end always has the same verdict: None, or a failure with a reason."""
        adapter = self.adapter_type(self.validated())
        end = SessionEnd(exit=code, signal=number, time=1_000_000.0, stdout=said, stderr=said)
        verdict = adapter.verdict(end)
        assert adapter.verdict(end) == verdict
        if verdict is not None:
            assert isinstance(verdict.failure, FailureClass)
            assert verdict.reason, "the verdict has no reason"
            assert verdict.until is None or math.isfinite(verdict.until)

    def test_programs_are_described_completely(self) -> None:
        """Programs have a name or absolute path, an install command, and valid versions."""
        for program in self.adapter_type(self.validated()).programs():
            assert isinstance(program, Program), "programs() must return a list of Program"
            assert program.name, "the program has no name"
            assert "/" not in program.name or Path(program.name).is_absolute(), program.name
            assert program.install, "install is empty: describe how to install the program"
            assert not program.ready or program.log_in, "log_in is empty: describe how to log in"
            SpecifierSet(program.supported)
            assert not program.supported or program.version, "supported versions need arguments that print the version"
            assert all(map(Version, program.verified or ()))
            assert [name for name in program.keys if not _ENV_NAME.fullmatch(name)] == []

    @pytest.mark.parametrize("line", [*_ODD_LINES, "x" * MAX_LINE_BYTES])
    def test_any_line_is_parsed_without_errors(self, line: str) -> None:
        """The same line always results in the same events, and no line raises an error."""
        adapter = self.adapter_type(self.validated())
        events: list[object] = list(adapter.parse(line))
        assert list(adapter.parse(line)) == events
        assert [event for event in events if not isinstance(event, SessionEvent)] == []
        costs = [event.cost for event in events if isinstance(event, UsageReport) and event.cost is not None]
        assert all(math.isfinite(cost) for cost in costs), costs

    def test_recorded_lines_give_the_expected_events(self) -> None:
        """Each line in `lines` results in its events."""
        adapter = self.adapter_type(self.validated())
        assert [(line, list(adapter.parse(line))) for line, _ in self.lines] == [
            (line, list(events)) for line, events in self.lines
        ]

    def test_recorded_ends_give_the_expected_failure_class(self) -> None:
        """Each end in `ends` results in its failure class, or None."""
        adapter = self.adapter_type(self.validated())
        for end, failure in self.ends:
            parsed = [event for line in end.stdout.splitlines() for event in adapter.parse(line)]
            verdict = adapter.verdict(replace(end, events=parsed))
            assert (verdict.failure if verdict else None) == failure, end
            reported_failure = has_reported_failure(parsed)
            assert verdict is not None or not reported_failure, (
                f"the program reported a failure, but the verdict is None: {end}"
            )

    def test_account_limit_starts_a_cooldown_until_its_reset(self) -> None:
        """Each end in `limits` starts a cooldown until the reported time."""
        adapter = self.adapter_type(self.validated())
        for end, until in self.limits:
            parsed = [event for line in end.stdout.splitlines() for event in adapter.parse(line)]
            verdict = adapter.verdict(replace(end, events=parsed))
            assert verdict is not None, end
            assert get_failure_policy(verdict.failure, RETRIED_BY_DEFAULT) is FailurePolicy.COOLDOWN, verdict
            assert verdict.until is not None, f"the verdict lacks the reported reset time of the limit: {end}"
            assert abs(compute_cooldown_end(end.time, verdict.until, 1) - until) < 1, verdict

    def test_recordings_give_the_expected_result(self) -> None:
        """Each recording in the folder has an entry in `recorded` with the same result."""
        found = read_recordings(self.transcripts) if self.transcripts else {}
        assert sorted(found) == sorted(self.recorded)
        adapter = self.adapter_type(self.validated())
        meant = {
            name: interpret_end(adapter, recording.end(), self.recorded[name]) for name, recording in found.items()
        }
        assert meant == self.recorded


def interpret_end(adapter: Adapter, end: SessionEnd, asked: ExpectedResult) -> ExpectedResult:
    """Return the result of a session, limited to the fields that are set in `asked`."""
    parsed = [event for line in end.stdout.splitlines() for event in adapter.parse(line)]
    verdict = adapter.verdict(replace(end, events=parsed))
    transcript = reduce(Transcript.after, parsed, EMPTY_TRANSCRIPT)
    return ExpectedResult(
        verdict.failure if verdict else None,
        None if asked.session is None else transcript.session,
        None if asked.text is None else transcript.last_message,
        None if asked.tokens is None else (transcript.input_tokens, transcript.output_tokens),
        None
        if asked.paths is None
        else frozenset(p for event in parsed if isinstance(event, ToolCall) for p in event.paths),
    )
