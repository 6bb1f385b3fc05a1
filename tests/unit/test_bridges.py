"""Bridge parts, and the readiness checks of bridges before a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from adapters.acp import AcpAdapter, AcpOptions
from adapters.bridges.context import code_block
from adapters.bridges.lines import LINE_FIELDS, MAX_FIELD_CHARS, BridgeExit, MessageBuffer, write_line
from adapters.bridges.response import (
    EDIT_INSTRUCTIONS,
    ProposedChanges,
    UnusableResponseError,
    apply_response,
    parse_response,
)
from adapters.bridges.worktree import ConfinedWorktree, OutsideWorktreeError
from adapters.claude_code import ClaudeCodeAdapter, ClaudeCodeOptions
from adapters.json_output import parse_bridge_line
from adapters.ollama import OllamaAdapter, OllamaOptions
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.protocols import (
    Adapter,
    AgentMessage,
    AgentPlan,
    CliWarning,
    ConversationStarted,
    McpServer,
    SessionEvent,
    SessionRequest,
    ToolCall,
    ToolDenied,
    ToolResult,
    UsageReport,
)
from orchestrator.protocols import FinalResult as ConcludedEvent
from orchestrator.sessions.output.transcript import MAX_LINE_BYTES
from orchestrator.sessions.setup.adapter_homes import set_up
from tests.conftest import Repository
from tests.fakes.ollama_server import run_server
from tests.fakes.script import install
from tests.model_server import ModelServer
from tests.waiting import wait_for


def ready(adapter: Adapter, environ: dict[str, str]) -> tuple[int, str]:
    """Return whether the first program of the adapter is ready, as checked before a run."""
    program = adapter.programs()[0]
    done = subprocess.run(
        [program.name, *program.ready], env=environ, capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, (done.stdout.splitlines() or [""])[-1]


def path_without_package(package: str, folder: Path) -> str:
    """Return a PYTHONPATH that hides an installed package."""
    (folder / f"{package}.py").write_text(f"raise ModuleNotFoundError({package!r})\n")
    return str(folder)


@pytest.mark.extended
def test_missing_sdk_is_reported_before_and_in_a_session(environ: dict[str, str], tmp_path: Path) -> None:
    for package, adapter, extra in (
        ("acp", AcpAdapter(AcpOptions(argv=("x",))), "cli-council[acp]"),
        ("ollama", OllamaAdapter(OllamaOptions(model="x")), "cli-council[ollama]"),
    ):
        bare = {**environ, "PYTHONPATH": path_without_package(package, tmp_path)}
        code, reported = ready(adapter, bare)
        assert code == 1
        assert reported.endswith(f"pip install '{extra}'")
        assert extra in adapter.programs()[0].log_in
        program = adapter.programs()[0]
        session = [program.name, *(one for one in program.ready if one != "--ready")]
        done = subprocess.run(session, env=bare, capture_output=True, text=True, check=False)
        (event,) = parse_bridge_line(done.stdout.strip())
        assert isinstance(event, ConcludedEvent)
        assert event.failed is not None
        assert event.failed.failure is FailureClass.INVALID


@pytest.mark.extended
def test_installed_sdk_is_ready(environ: dict[str, str], tmp_path: Path) -> None:
    """Covers an installed SDK, a server with the model and a logged-in CLI, and the message if one is missing."""
    assert ready(AcpAdapter(AcpOptions(argv=("x",))), environ) == (0, "ready")
    with run_server() as server:
        assert ready(OllamaAdapter(OllamaOptions(model="stub", host=server.url)), environ) == (0, "ready")
        code, reported = ready(OllamaAdapter(OllamaOptions(model="none", host=server.url)), environ)
        assert (code, "ollama pull none" in reported) == (1, True)
    code, reported = ready(OllamaAdapter(OllamaOptions(model="stub", host="http://127.0.0.1:9")), environ)
    assert (code, "ollama serve" in reported) == (1, True)
    claude = ClaudeCodeAdapter(ClaudeCodeOptions(bin=str(install(tmp_path, "claude", "tests.fakes.claude"))))
    assert ready(claude, environ)[0] == 1
    assert ready(claude, {**environ, "ANTHROPIC_API_KEY": "x"})[0] == 0


@pytest.mark.parametrize("name", ["a", "sub/deep/new.txt", "./a", "sub/../a"])
def test_path_inside_the_worktree_is_resolved(tmp_path: Path, name: str) -> None:
    bridge = ConfinedWorktree(tmp_path).locate(name)
    assert bridge == ConfinedWorktree(tmp_path).locate(str(tmp_path / name))
    assert bridge.is_relative_to(tmp_path)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc/passwd", "link/x", "link", ".git", ".git/x", "s/.Git/x", "a\0b"]
)
def test_path_outside_of_the_worktree_is_rejected(tmp_path: Path, name: str) -> None:
    """Including paths through symlinks, and git's own files."""
    (tmp_path / "link").symlink_to("/")
    with pytest.raises(OutsideWorktreeError):
        ConfinedWorktree(tmp_path).locate(name)
    with pytest.raises(OutsideWorktreeError):
        ConfinedWorktree(tmp_path).relative(name)


def test_path_in_a_response_is_taken_literally(tmp_path: Path) -> None:
    """Rejects absolute paths, `..`, and symlinks that stay inside the worktree."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "alias").symlink_to("sub")
    assert ConfinedWorktree(tmp_path).relative("sub/./x") == tmp_path / "sub/x"
    for name in ("sub/../x", str(tmp_path / "x"), "alias/x"):
        with pytest.raises(OutsideWorktreeError):
            ConfinedWorktree(tmp_path).relative(name)


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("words only", {}),
        ("```python\nx = 1\n```", {}),
        ("```file a.py\nx\n```", {"a.py": "x\n"}),
        ("``` file: 'a b.py'\nx\n```\nand\n~~~file=c\ny\n~~~", {"a b.py": "x\n", "c": "y\n"}),
        ("````file a.md\n```py\nx\n```\n````", {"a.md": "```py\nx\n```\n"}),
        ("```file a\n```", {"a": ""}),
        ("```file a\n1\n```\n```file a\n2\n```", {"a": "2\n"}),
    ],
)
def test_files_are_parsed_from_a_response(text: str, files: dict[str, str]) -> None:
    assert parse_response(text) == ProposedChanges(files, "")


def test_shown_files_can_be_answered() -> None:
    """Files that contain fences of any length survive a round trip."""
    for content in ("", "x\n", "```\n````\n", "`````file x\n"):
        assert parse_response(code_block("file a", content)).files == {"a": content}


@pytest.mark.parametrize("text", ["```file a\nx", "```diff\nx", "````file a\nx\n```"])
def test_truncated_answer_is_rejected(text: str) -> None:
    with pytest.raises(UnusableResponseError):
        parse_response(text)


DIFF = "--- a/src/app.py\n+++ b/src/app.py\n@@ -1,2 +1,2 @@\n def main():\n-    return 0\n+    return 1\n"


@pytest.mark.parametrize(
    "answer",
    [
        ProposedChanges({"new.txt": "x", "README.md/sub": "y"}, DIFF),
        ProposedChanges({"new.txt": "x", "src": "y"}, DIFF),
        ProposedChanges({"new.txt": "x"}, DIFF.replace("return 0", "return 7")),
        ProposedChanges({"new.txt": "x", "src/app.py": "y"}, DIFF),
        ProposedChanges({"new.txt": "x"}, "no diff at all\n"),
    ],
)
def test_unsuitable_answer_changes_nothing(repository: Repository, answer: ProposedChanges) -> None:
    """Neither the writable file nor the applicable diff is applied."""
    with pytest.raises(UnusableResponseError):
        apply_response(answer, ConfinedWorktree(repository.top))
    assert repository.git("status", "--porcelain") == ""


@pytest.mark.parametrize("diff", [DIFF, DIFF.replace("a/", "").replace("b/", ""), DIFF.replace("-1,2 +1,2", "-1,9 +1")])
def test_diffs_of_models_are_applied(repository: Repository, diff: str) -> None:
    """With and without prefixes, and with wrong line counts."""
    answer = parse_response(f"```diff\n{diff}```")
    assert apply_response(answer, ConfinedWorktree(repository.top)) == ["src/app.py"]
    assert (repository.top / "src/app.py").read_text() == "def main():\n    return 1\n"


def test_message_is_printed_in_complete_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A trailing partial line is printed with the next output of another kind."""
    words = MessageBuffer()
    for piece in ("a", "b\nc", "d\n\ne", "f"):
        words.add(piece)
    assert words.flush() == "ab\ncd\n\nef"
    assert words.flush() == ""
    said = [parse_bridge_line(line) for line in capsys.readouterr().out.splitlines()]
    assert said == [(AgentMessage("ab"),), (AgentMessage("cd\n"),), (AgentMessage("ef"),)]


def test_long_line_is_truncated(capsys: pytest.CaptureFixture[str]) -> None:
    """Tested with characters that need the most bytes."""
    words = MessageBuffer()
    words.add("🙂" * (MAX_FIELD_CHARS * 2 + 1))
    words.flush()
    write_line(
        "tool",
        name="n" * MAX_FIELD_CHARS,
        detail="d" * MAX_FIELD_CHARS * 2,
        paths=["🙂" * MAX_FIELD_CHARS] * 10_000,
        call=None,
        diff=None,
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert max(len(line.encode()) for line in lines) < MAX_LINE_BYTES


def test_line_outside_of_the_table_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    samples: dict[Any, Any] = {str: "x", int: 1, list: ["x"]}
    for type_, fields in LINE_FIELDS.items():
        write_line(type_, **{name: samples.get(kind) for name, kind in fields.items()})
    lines = capsys.readouterr().out.splitlines()
    assert [bool(parse_bridge_line(line)) for line in lines] == [json.loads(line)["type"] != "alive" for line in lines]
    with pytest.raises(TypeError):
        write_line("message", text="x", more=1)


def test_conclusion_matches_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    """1 after a failure, otherwise 0."""
    assert (BridgeExit("x", "auth").report(), BridgeExit("x").report()) == (1, 0)
    failed, well = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (failed["failure"], failed["reason"], well["failure"], well["reason"]) == ("auth", "x", None, "")


def test_missing_agent_is_named(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("x")
    adapter = AcpAdapter(AcpOptions(argv=("no-such-agent",)))
    command = adapter.command(SessionRequest("r", "t", 1, "x", tmp_path / "prompt", tmp_path, tmp_path / "home"))
    done = subprocess.run(command.argv, env=environ, capture_output=True, text=True, check=False)
    (event,) = adapter.parse(done.stdout.strip())
    assert isinstance(event, ConcludedEvent)
    assert event.failed == Failed(FailureClass.MISSING, event.text)
    assert "'no-such-agent' can't be started" in event.text


@dataclass(frozen=True)
class BridgeFixture:
    """A worktree, its home, and the programs on PATH."""

    folder: Path
    environ: dict[str, str]

    @property
    def worktree(self) -> Path:
        return self.folder / "worktree"

    def perform(self, adapter: Adapter, prompt: str, **asked: Any) -> list[SessionEvent]:
        """Run one session of an adapter and return its events."""
        prompt_file, home = self.folder / "prompt", self.folder / "home"
        prompt_file.write_text(prompt)
        command = adapter.command(SessionRequest("r", "t", 1, prompt, prompt_file, self.worktree, home, **asked))
        if command.home is not None:
            anyio.run(set_up, home, command.home, self.environ)
        environ = {**self.environ, **command.env}
        done = subprocess.run(command.argv, env=environ, cwd=self.worktree, capture_output=True, text=True, check=False)
        return [event for line in done.stdout.splitlines() for event in adapter.parse(line)]

    def converse(self, prompt: str, options: dict[str, Any] | None = None, **asked: Any) -> list[SessionEvent]:
        """Hold a conversation with the fake agent."""
        return self.perform(AcpAdapter(AcpOptions(argv=("acp-agent",), **(options or {}))), prompt, **asked)


@pytest.fixture
def bridge(environ: dict[str, str], tmp_path: Path) -> BridgeFixture:
    """Return an empty worktree with an agent on PATH."""
    install(tmp_path / "bin", "acp-agent", "tests.fakes.acp_agent")
    subprocess.run(["git", "init", "--quiet", str(tmp_path / "worktree")], check=True, env=environ)
    return BridgeFixture(tmp_path, {**environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{environ['PATH']}"})


def printed_lines(events: list[SessionEvent]) -> list[str]:
    """Return the printed lines."""
    return [line for event in events if isinstance(event, AgentMessage) for line in event.text.splitlines()]


def warnings(events: list[SessionEvent]) -> list[str]:
    """Return the warnings."""
    return [event.text for event in events if isinstance(event, CliWarning)]


@pytest.mark.extended
@pytest.mark.parametrize(
    ("permissions", "read_only", "denied"),
    [
        ("edits", False, {"execute", "fetch", "other"}),
        ("all", False, set()),
        ("all", True, {"delete", "edit", "move"}),
    ],
)
def test_requests_are_answered_by_the_mode(
    bridge: BridgeFixture, permissions: str, read_only: bool, denied: set[str]
) -> None:
    """A denial by the mode has a remedy; in a read-only session no mode would help."""
    kinds = ("fetch", "read", "search", "think", "delete", "edit", "execute", "move", "other", "switch_mode")
    prompt = "\n".join(f"ask {kind}" for kind in kinds)
    events = bridge.converse(prompt, {"permissions": permissions}, read_only=read_only)
    assert printed_lines(events) == [f"chosen: {'no' if kind in denied else 'once'}" for kind in kinds]
    remedies = {event.call: event.remedy for event in events if isinstance(event, ToolDenied)}
    assert {call for call, remedy in remedies.items() if "permissions: all" in remedy} == {
        f"{kind}-1" for kind in denied - {"delete", "edit", "move"}
    }


@pytest.mark.extended
def test_edit_may_be_denied_by_a_command(bridge: BridgeFixture) -> None:
    """By its reason; it gets the path of the file, for requests and for writes by the protocol."""
    answer = {"hookSpecificOutput": {"permissionDecision": "deny", "permissionDecisionReason": "it is of task b"}}
    hook = bridge.folder / "hook.py"
    hook.write_text(
        f"import json, sys\ncall = json.load(sys.stdin)\n"
        f"if call['tool_input']['file_path'].endswith('b.txt'): print({json.dumps(json.dumps(answer))})\n"
    )
    prompt = "edit a.txt x\nedit b.txt x\nwrite b.txt x\nwrite c.txt x"
    events = bridge.converse(prompt, pre_edit=(sys.executable, str(hook)))
    assert [event.detail.rpartition("/")[2] for event in events if isinstance(event, ToolDenied)] == [
        "it is of task b",
        "b.txt: it is of task b",
    ]
    assert sorted(file.name for file in bridge.worktree.glob("*.txt")) == ["a.txt", "c.txt"]


@pytest.mark.extended
@pytest.mark.parametrize(
    ("methods", "auth", "outcome"),
    [
        ("login openai", None, "in by openai"),
        pytest.param("login openai", "login", "in by login", marks=pytest.mark.extended),
        pytest.param("login", None, FailureClass.AUTH, marks=pytest.mark.extended),
        pytest.param("login", "openai", FailureClass.INVALID, marks=pytest.mark.extended),
    ],
)
def test_agent_is_logged_in(bridge: BridgeFixture, methods: str, auth: str | None, outcome: str | FailureClass) -> None:
    """By the configured method, or else by one that needs only a key; never by one that needs a user."""
    bridge.environ.update(ACP_LOGGED_OUT="1", ACP_METHODS=methods)
    events = bridge.converse("say in by LOGIN", {} if auth is None else {"auth": auth})
    (concluded,) = [event for event in events if isinstance(event, ConcludedEvent)]
    found: str | FailureClass = printed_lines(events)[0] if concluded.failed is None else concluded.failed.failure
    assert found == outcome


@pytest.mark.extended
def test_tool_update_is_merged_with_its_call(bridge: BridgeFixture) -> None:
    events = bridge.converse("run make test")
    assert [event for event in events if isinstance(event, ToolCall | ToolResult)] == [
        ToolCall("execute", "bash", call="r-1"),
        ToolCall("execute", "make test", call="r-1"),
        ToolResult("r-1", output="done"),
    ]


@pytest.mark.extended
def test_plan_and_changed_lines_are_events(bridge: BridgeFixture) -> None:
    """The change is reported once, although its call has several updates."""
    (bridge.worktree / "a.txt").write_text("one\n")
    events = bridge.converse("plan look fix\nchange a.txt two\nsay Done.")
    file = str(bridge.worktree / "a.txt")
    assert [event for event in events if isinstance(event, AgentPlan | ToolCall | ToolResult)] == [
        AgentPlan("[x] look\n[ ] fix"),
        ToolCall("edit", "Writing to a.txt", call="c-1"),
        ToolCall("edit", file, (file,), "c-1", "-one\n+two"),
        ToolResult("c-1"),
    ]
    assert (bridge.worktree / "a.txt").read_text() == "two\n"


@pytest.mark.extended
@pytest.mark.parametrize("takes_urls", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_agent_gets_the_servers_it_supports(bridge: BridgeFixture, takes_urls: bool) -> None:
    """Commands as absolute paths with resolved variables; URLs only if the agent announces support."""
    servers = (
        McpServer("files", ("sh", "-c", "x y"), env=("MY_TOKEN", "NOT_SET")),
        McpServer("odd", ("no-such-program",)),
        McpServer("docs", url="http://127.0.0.1:9/mcp"),
    )
    program = {"name": "files", "command": shutil.which("sh"), "args": ["-c", "x y"]}
    commands = [
        {**program, "env": [{"name": "MY_TOKEN", "value": "a token"}]},
        {"name": "odd", "command": "no-such-program", "args": [], "env": []},
    ]
    bridge.environ["MY_TOKEN"] = "a token"
    url = {"type": "http", "name": "docs", "url": "http://127.0.0.1:9/mcp", "headers": []}
    events = bridge.converse("servers", {"env": {"ACP_LOADS": "1"} if takes_urls else {}}, mcp_servers=servers)
    reported = [json.loads(line.removeprefix("server: ")) for line in printed_lines(events)]
    assert reported == ([*commands, url] if takes_urls else commands)
    assert ["'docs'" in one for one in warnings(events)] == ([] if takes_urls else [True])


RESUMES = {"home": "own", "resumes": True, "env": {"ACP_LOADS": "1"}}


@pytest.mark.slow
def test_replayed_conversation_is_not_printed(bridge: BridgeFixture) -> None:
    """Replayed messages are not counted either, including those after the load response."""
    first = bridge.converse("say it once", RESUMES)
    assert printed_lines(first) == ["it once"]
    second = bridge.converse("servers\nsay it twice", RESUMES, resume="s-1", mcp_servers=(McpServer("odd", ("x",)),))
    assert [line for line in printed_lines(second) if "server" not in line] == ["it twice"]
    assert sum("server" in line for line in printed_lines(second)) == 1
    for events in (first, second):
        assert ConversationStarted("s-1") in events
        assert [event.cost for event in events if isinstance(event, UsageReport)] == [0.5]
        assert events[-1] == ConcludedEvent("\n".join((*printed_lines(events), "")))


@pytest.mark.extended
@pytest.mark.parametrize("loads", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_agent_without_resume_gets_no_prompt(bridge: BridgeFixture, loads: bool) -> None:
    """The failure class asks for a retry from scratch, both without the capability and with a lost conversation."""
    options = RESUMES if loads else {"home": "own", "resumes": True}
    (event,) = bridge.converse("write a.txt x", options, resume="s-1")
    assert isinstance(event, ConcludedEvent)
    assert event.failed is not None
    assert event.failed.failure is FailureClass.TRANSIENT
    assert ("remove `resumes`" in event.text, "no session s-1" in event.text) == (not loads, loads)
    assert [one.name for one in bridge.worktree.iterdir()] == [".git"]


@pytest.mark.extended
def test_read_only_model_is_asked_for_prose(bridge: BridgeFixture) -> None:
    """The answer is printed and never applied; instructions precede the first prompt."""
    answer = "```file a.txt\nx\n```"
    with run_server() as server:
        adapter = OllamaAdapter(OllamaOptions(model="stub", host=server.url))
        looked = bridge.perform(adapter, answer, read_only=True, instructions="Speak plainly.")
        assert not (bridge.worktree / "a.txt").exists()
        changed = bridge.perform(adapter, answer)
        assert (bridge.worktree / "a.txt").read_text() == "x\n"
        system, plain = (one["messages"][0] for one in server.asked)
    assert "\n".join(printed_lines(looked)) == "\n".join(printed_lines(changed)) == answer
    assert [looked[-1], changed[-1]] == [ConcludedEvent(), ConcludedEvent()]
    assert [isinstance(event, ToolCall) for event in (looked[-2], changed[-2])] == [False, True]
    assert (system["role"], plain["content"]) == ("system", EDIT_INSTRUCTIONS)
    assert system["content"].endswith("\nSpeak plainly.")
    assert "change nothing" in system["content"]
    assert "```" not in system["content"]


def test_bridges_import_nothing_of_the_package(environ: dict[str, str]) -> None:
    """A bridge can run where `orchestrator` is not importable."""
    code = "import sys; sys.modules['orchestrator'] = None; import adapters.bridges.acp, adapters.bridges.ollama"
    subprocess.run([sys.executable, "-P", "-c", code], env={**environ, "HOME": os.devnull}, check=True)


@pytest.mark.extended
def test_turn_of_an_interrupted_agent_is_cancelled(bridge: BridgeFixture) -> None:
    """So it reports its usage; then the bridge ends by the signal."""
    prompt = bridge.folder / "prompt"
    prompt.write_text("say Here.\nwait")
    adapter = AcpAdapter(AcpOptions(argv=("acp-agent",)))
    home = bridge.folder / "home"
    command = adapter.command(SessionRequest("r", "t", 1, "x", prompt, bridge.worktree, home))
    assert command.interrupt
    environ = {**bridge.environ, **command.env}
    with subprocess.Popen(command.argv, env=environ, cwd=bridge.worktree, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = iter(child.stdout)
        while "Here." not in next(lines):
            pass
        child.send_signal(signal.SIGINT)
        (spent,) = [event for line in lines for event in adapter.parse(line)]
    assert spent == UsageReport(7, 2, is_cumulative=True)
    assert child.returncode == -signal.SIGINT


@pytest.mark.extended_variants
@pytest.mark.parametrize("use", ["acp", "ollama"])
def test_interrupted_bridge_ends_by_the_signal(use: str, environ: dict[str, str], tmp_path: Path) -> None:
    """No traceback is printed, and the agent process is terminated."""
    (tmp_path / "prompt").write_text("delay 60\nsay x\n")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True, env=environ)
    with ModelServer() as server:
        adapter: Adapter = (
            AcpAdapter(AcpOptions(argv=("sleep", "60")))
            if use == "acp"
            else OllamaAdapter(OllamaOptions(model="scripted", host=server.url))
        )
        command = adapter.command(SessionRequest("r", "t", 1, "x", tmp_path / "prompt", tmp_path, tmp_path / "home"))
        child = subprocess.Popen(command.argv, env=environ, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        process = psutil.Process(child.pid)
        wait_for(process.children if use == "acp" else lambda: server.requests)
        agents = process.children()
        process.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=20)
    assert child.returncode == -signal.SIGINT
    assert errors == ""
    assert [one for one in agents if one.is_running()] == []
