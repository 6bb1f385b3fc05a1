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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Final

import pytest
from packaging.specifiers import SpecifierSet
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

#: What a request has where it asks for more than a prompt.
_ASKED: Final[Mapping[Capability, Mapping[str, Any]]] = {
    Capability.RESUME: {"resume": "0c5b2f3e-1d"},
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
class RecordingMeaning:
    """What a recording means: the class of its failure (None: the program's word is that all went well), and, where
    they are given, the id of its conversation, the result's text, the tokens that went in and came out in all, and the
    files that its tools named.
    """

    failure: FailureClass | None = None
    session: str | None = None
    text: str | None = None
    tokens: tuple[int, int] | None = None
    paths: frozenset[str] | None = None


class AdapterContract(OptionsContract):
    """The suite; `adapter_type` is what the plugin registers, `options` a valid mapping as in the YAML file.

    A validator of `Options` says what is wrong and what would be right by `ValueError("what: remedy")`.
    """

    adapter_type: ClassVar[AdapterType]
    own_keys: ClassVar[frozenset[str]] = frozenset({"use", "capacity", "writable", "readable", "keep_ignored"})
    lines: ClassVar[Sequence[tuple[str, Sequence[SessionEvent]]]] = ()
    """Lines that the program was seen to print, and what each means."""
    ends: ClassVar[Sequence[tuple[SessionEnd, FailureClass | None]]] = ()
    """Ends that were seen, and the class that the verdict on each should have; events are parsed from its output."""

    limits: ClassVar[Sequence[tuple[SessionEnd, float]]] = ()
    """Ends at the limit of an account, and when it ends as the program said (wall-clock seconds)."""
    transcripts: ClassVar[Path | None] = None
    """A folder of recordings (`orchestrator.testing.recordings`), made by running the program."""
    recorded: ClassVar[Mapping[str, RecordingMeaning]] = {}
    """What each of them means, by its name."""

    def options_type(self) -> type[BaseModel]:
        """Return the adapter's `Options`."""
        return self.adapter_type.Options

    def requests(self, folder: Path) -> list[SessionRequest]:
        """Return requests of all kinds that it can be asked for; none of the paths exists."""
        plain = self.plain_requests(folder)
        asked = [_ASKED[one] for one in sorted(self.adapter_type(self.validated()).capabilities())]
        return [*plain, *(replace(plain[0], **one) for one in asked)]

    def plain_requests(self, folder: Path) -> list[SessionRequest]:
        """Return requests that ask for nothing but a prompt."""
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

    def commands(self, folder: Path) -> list[SessionCommand]:
        """Return the command for each request, from a new adapter."""
        adapter = self.adapter_type(self.validated())
        return [adapter.command(request) for request in self.requests(folder)]

    def test_restored_options_give_the_same_commands(self, tmp_path: Path) -> None:
        """Options that were stored as JSON and read again give equal commands."""
        stored = json.loads(json.dumps(self.validated().model_dump(mode="json"), allow_nan=False))
        adapter = self.adapter_type(self.adapter_type.Options.model_validate(stored))
        assert [adapter.command(request) for request in self.requests(tmp_path)] == self.commands(tmp_path)

    def test_what_it_can_be_asked_for_is_passed_on(self, tmp_path: Path) -> None:
        """Each capability makes a difference to the command, and what is not one makes none."""
        adapter = self.adapter_type(self.validated())
        can = adapter.capabilities()
        assert can <= frozenset(Capability)
        request = self.plain_requests(tmp_path)[0]
        plain = adapter.command(request)
        passed = {one for one in Capability if adapter.command(replace(request, **_ASKED[one])) != plain}
        assert passed == can

    def test_home_holds_names_and_texts(self, tmp_path: Path) -> None:
        """What a session finds in its home has names within it; links lead to absolute places, or from the user's."""
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
            places = [*home.files, *home.links, *home.settings]
            assert len(places) == len(set(places)), "a name stands for two things"
            assert [one.of for one in home.settings.values() if not one.of.startswith(("/", "~/"))] == []

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
            assert [path for path in command.readable if not path.is_absolute()] == []

    def test_interrupt_is_yes_or_no(self, tmp_path: Path) -> None:
        """Whether the program is interrupted before it is terminated is plain, and not read out of another value."""
        assert {type(command.interrupt) for command in self.commands(tmp_path)} == {bool}

    def test_leavings_are_patterns(self, tmp_path: Path) -> None:
        """What the program leaves for itself is named by patterns that take something away, one a line."""
        for command in self.commands(tmp_path):
            assert not isinstance(command.scratch_patterns, str), "leavings is a list of patterns"
            odd = [
                one for one in command.scratch_patterns if not one.strip() or one.startswith(("!", "#")) or "\n" in one
            ]
            assert odd == []

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

    def test_programs_can_be_looked_for(self) -> None:
        """Programs are names without a slash or absolute paths, with a remedy; versions are a valid range."""
        for program in self.adapter_type(self.validated()).programs():
            assert isinstance(program, Program), "programs() returns a list of Program"
            assert program.name, "the program has no name"
            assert "/" not in program.name or Path(program.name).is_absolute(), program.name
            assert program.install, "say how to install it"
            assert not program.ready or program.log_in, "say what to do where it is not ready"
            SpecifierSet(program.known)
            assert not program.known or program.version, "a range of versions needs a way to ask for the version"
            assert [name for name in program.keys if not _ENV_NAME.fullmatch(name)] == []

    @pytest.mark.parametrize("line", [*_ODD_LINES, "x" * MAX_LINE_BYTES])
    def test_any_line_can_be_parsed(self, line: str) -> None:
        """Whatever a line holds, the same line means the same events, and nothing is raised."""
        adapter = self.adapter_type(self.validated())
        events: list[object] = list(adapter.parse(line))
        assert list(adapter.parse(line)) == events
        assert [event for event in events if not isinstance(event, SessionEvent)] == []
        costs = [event.cost for event in events if isinstance(event, UsageReport) and event.cost is not None]
        assert all(math.isfinite(cost) for cost in costs), costs

    def test_lines_that_were_recorded_mean_what_they_should(self) -> None:
        """Each line of `lines` means the events beside it."""
        adapter = self.adapter_type(self.validated())
        assert [(line, list(adapter.parse(line))) for line, _ in self.lines] == [
            (line, list(events)) for line, events in self.lines
        ]

    def test_ends_that_were_recorded_are_judged_as_they_should_be(self) -> None:
        """Each end of `ends` is the class of failure beside it, or None."""
        adapter = self.adapter_type(self.validated())
        for end, failure in self.ends:
            parsed = [event for line in end.stdout.splitlines() for event in adapter.parse(line)]
            verdict = adapter.verdict(replace(end, events=parsed))
            assert (verdict.failure if verdict else None) == failure, end
            admitted = has_reported_failure(parsed)
            assert verdict is not None or not admitted, f"its last conclusion failed, and the verdict is None: {end}"

    def test_a_limit_parks_the_adapter_until_it_ends(self) -> None:
        """At each end of `limits` the adapter is parked, and until the instant that the program named."""
        adapter = self.adapter_type(self.validated())
        for end, until in self.limits:
            parsed = [event for line in end.stdout.splitlines() for event in adapter.parse(line)]
            verdict = adapter.verdict(replace(end, events=parsed))
            assert verdict is not None, end
            assert get_failure_policy(verdict.failure, RETRIED_BY_DEFAULT) is FailurePolicy.PARK, verdict
            assert verdict.until is not None, f"it names the end of its limit, and the verdict does not: {end}"
            assert abs(compute_cooldown_end(end.time, verdict.until, 1) - until) < 1, verdict

    def test_recordings_mean_what_they_should(self) -> None:
        """Each recording of the folder is named in `recorded`, and means what stands there."""
        found = read_recordings(self.transcripts) if self.transcripts else {}
        assert sorted(found) == sorted(self.recorded)
        adapter = self.adapter_type(self.validated())
        meant = {name: interpret_end(adapter, one.end(), self.recorded[name]) for name, one in found.items()}
        assert meant == self.recorded


def interpret_end(adapter: Adapter, end: SessionEnd, asked: RecordingMeaning) -> RecordingMeaning:
    """Return what an end means, as far as it is asked."""
    parsed = [event for line in end.stdout.splitlines() for event in adapter.parse(line)]
    verdict = adapter.verdict(replace(end, events=parsed))
    told = reduce(Transcript.after, parsed, EMPTY_TRANSCRIPT)
    return RecordingMeaning(
        verdict.failure if verdict else None,
        None if asked.session is None else told.session,
        None if asked.text is None else told.last_message,
        None if asked.tokens is None else (told.input_tokens, told.output_tokens),
        None if asked.paths is None else frozenset(p for one in parsed if isinstance(one, ToolCall) for p in one.paths),
    )
