"""`use: command`: any program as an adapter, by YAML alone."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pluggy
import pytest
from pydantic import ValidationError

import adapters.command.adapter
from adapters.command.adapter import CommandAdapter
from adapters.command.options import STDIN_FILE, CommandOptions
from orchestrator import hookspecs
from orchestrator.domain.runs.outcome import Failed
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.errors import RefusedError
from orchestrator.protocols import Capability, McpServer, SessionCommand, SessionEnd, SessionHome, SessionRequest
from orchestrator.testing.adapter_contract import AdapterContract


def request(prompt: str = "Fix it.") -> SessionRequest:
    return SessionRequest("r1", "t1", 2, prompt, Path("/p/prompt"), Path("/w/tree"), Path("/h"))


def command(text: str = "Fix it.", **options: Any) -> SessionCommand:
    return CommandAdapter(CommandOptions.model_validate(options)).command(request(text))


class TestPlaceholders(AdapterContract):
    """Run the adapter contract with every placeholder and a list of variable names."""

    adapter_type = CommandAdapter
    options: ClassVar = {
        "argv": ["tool", "{prompt}", "{prompt_file}", "{worktree}", "{task}", "{run}", "{attempt}"],
        "env": ["HOME", "GIT_AUTHOR_NAME"],
    }


class TestStdin(AdapterContract):
    """Run the adapter contract with the prompt on stdin and variables with values."""

    adapter_type = CommandAdapter
    options: ClassVar = {"argv": ["/opt/tool", "-"], "env": {"MODE": "{task}", "EMPTY": ""}, "prompt": "stdin"}


def test_placeholders_are_filled() -> None:
    argv = ["x", "{run}/{task}.{attempt}", "--dir={worktree}", "{prompt_file}", "{prompt}"]
    assert command(argv=argv).argv == ("x", "r1/t1.2", "--dir=/w/tree", "/p/prompt", "Fix it.")


def test_placeholders_in_a_prompt_are_not_filled() -> None:
    """Text inserted by one placeholder is not scanned for others."""
    assert command("{task} {{run}} {nope}", argv=["x", "{prompt}{task}"]).argv == ("x", "{task} {{run}} {nope}t1")


@pytest.mark.parametrize(
    ("written", "given"),
    [
        ("{{task}}", "{task}"),
        ("{{nope}}", "{nope}"),
        ("{{{task}}}", "{{task}}"),
        ('{"a": {"b": "{task}"}}', '{"a": {"b": "t1"}}'),
        ("{}", "{}"),
        ("{Task}", "{Task}"),
        ("{a-b} {1} ${X} {{.Names}} {", "{a-b} {1} ${X} {{.Names}} {"),
    ],
)
def test_other_braces_are_literal(written: str, given: str) -> None:
    """Doubled braces give a literal placeholder; other braces are kept."""
    assert command(argv=["x", written]).argv == ("x", given)


def test_prompt_on_stdin_is_passed() -> None:
    assert command(argv=["x"]).stdin is None
    assert command(argv=["x"], prompt="stdin").stdin == Path("/p/prompt")


def test_environment_is_passed() -> None:
    """A list passes variables on and sets those with values; a mapping only sets."""
    passed = command(argv=["x"], env=["A", "B", "C=1=2", "D="])
    assert (passed.env, passed.pass_env) == ({"C": "1=2", "D": ""}, ("A", "B"))
    given = command(argv=["x"], env={"A": "1"})
    assert (given.env, given.pass_env) == ({"A": "1"}, ())


@pytest.mark.parametrize(
    ("argv", "programs"), [(["x", "y"], ("x",)), (["./x"], ()), (["/bin/x"], ()), (["{task}"], ())]
)
def test_program_is_looked_up_on_path(argv: list[str], programs: tuple[str, ...]) -> None:
    """Names with a slash are not looked up."""
    assert tuple(one.name for one in CommandAdapter(CommandOptions(argv=tuple(argv))).programs()) == programs


def test_prompt_up_to_the_argv_limit_is_accepted() -> None:
    """100 KiB fit, one byte more does not, for any number of placeholders and any encoding."""
    limit = 100 * 1024
    assert len(command("x" * limit, argv=["x", "{prompt}"]).argv[1]) == limit
    for prompt, argv in [
        ("x" * (limit + 1), ["x", "{prompt}"]),
        ("x" * (limit // 2 + 1), ["x", "{prompt}", "{prompt}"]),
    ]:
        with pytest.raises(RefusedError, match=r"use \{prompt_file\} in argv, or `prompt: stdin`"):
            command(prompt, argv=argv)
    with pytest.raises(RefusedError):
        command("ä" * (limit // 2 + 1), argv=["x", "{prompt}"])


def test_long_prompt_in_a_file_is_accepted() -> None:
    """A prompt in a file or on stdin has no limit."""
    assert command("x" * 1_000_000, argv=["x", "{prompt_file}", "{{prompt}}"], prompt="stdin").argv[1] == "/p/prompt"


def test_prompt_with_nul_is_rejected() -> None:
    with pytest.raises(RefusedError, match="NUL"):
        command("a\0b", argv=["x", "{prompt}"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"argv": []},
        {"argv": "x"},
        {"argv": [""]},
        {"argv": ["x", 1]},
        {"argv": ["x\0"]},
        {"argv": ["{nope}"]},
        {"argv": ["x"], "prompt": "file"},
        {"argv": ["x"], "prompt": True},
        {"argv": ["x"], "env": "A"},
        {"argv": ["x"], "env": 3},
        {"argv": ["x"], "env": [1]},
        {"argv": ["x"], "env": ["A-B=b"]},
        {"argv": ["x"], "env": ["API_KEY=0f9a8b7c6d5e4f3a2b1c"]},
        {"argv": ["x"], "env": {"API_KEY": "0f9a8b7c6d5e4f3a2b1c"}},
        {"argv": ["x"], "env": {"WHATEVER": "ghp_" + "a1B2" * 9}},
        {"argv": ["x"], "failures": {"auth": "("}},
        {"argv": ["x"], "failures": {"no_change": "x"}},
        {"argv": ["x"], "failures": {"auth": 1}},
        {"argv": ["x"], "env": ["A\n"]},
        {"argv": ["x"], "env": [""]},
        {"argv": ["x"], "env": {"A": 1}},
        {"argv": ["x"], "env": {"A": None}},
        {"argv": ["x"], "env": {"A": "\0"}},
        {"argv": ["x"], "env": {"COUNCIL_RUN": "x"}},
        {"argv": ["x"], "env": ["COUNCIL_RUN"]},
        {"argv": ["x"], "env": ["GIT_INDEX_FILE"]},
        {"argv": ["x"], "env": {"GIT_WORK_TREE": "/"}},
    ],
)
def test_invalid_options_are_rejected(options: dict[str, Any]) -> None:
    """Options that cannot start the program fail before anything runs."""
    with pytest.raises(ValidationError):
        CommandOptions.model_validate(options)


def end(stdout: str = "", stderr: str = "") -> SessionEnd:
    return SessionEnd(exit=1, signal=None, time=1_000_000.0, stdout=stdout, stderr=stderr)


@pytest.mark.parametrize(
    ("said", "failure", "until"),
    [
        ("nothing of note", None, None),
        ("Error: NOT LOGGED IN", "auth", None),
        ("usage limit, try again in 90 s", "rate_limited", 1_000_090.0),
        ("usage limit until 2001-09-09T01:46:40+00:00", "rate_limited", 1_000_000_000.0),
        ("usage limit until 2001-09-09T01:46:40", "rate_limited", 1_000_000_000.0),
        ("usage limit until 1000000000", "rate_limited", 1_000_000_000.0),
        ("usage limit until never", "rate_limited", None),
        ("usage limit until 999999999999999999", "rate_limited", None),
        ("first: not logged in\nusage limit", "auth", None),
    ],
)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_failure_class_follows_from_the_output(
    said: str, failure: str | None, until: float | None, stream: str
) -> None:
    """The patterns search both streams in order; a limit pattern may capture its end."""
    patterns = {
        "auth": "not logged in",
        "rate_limited": r"usage limit(, try again in (?P<seconds>\d+) s| until (?P<until>\S+))?",
    }
    adapter = CommandAdapter(CommandOptions.model_validate({"argv": ["x"], "failures": patterns}))
    verdict = adapter.verdict(end(**{stream: said}))
    assert (verdict and str(verdict.failure), verdict and verdict.until) == (failure, until)


def test_unknown_placeholder_is_explained() -> None:
    """The message lists the placeholders and how to write literal braces."""
    with pytest.raises(ValidationError, match=r"\{promt\} is not a placeholder: .*\{prompt_file\}.*\{\{promt\}\}"):
        CommandOptions(argv=("{promt}",))


def test_adapter_is_registered() -> None:
    plugins = pluggy.PluginManager("cli_council")
    plugins.add_hookspecs(hookspecs)
    plugins.register(adapters.command.adapter)
    found: dict[str, object] = {}
    plugins.check_pending()
    plugins.hook.council_register_adapters(register=found.__setitem__)
    assert found == {"command": CommandAdapter}


ALL: dict[str, Any] = {
    "argv": ["x", "{options}", "--", "{prompt_file}"],
    "home": "own",
    "read": [{"match": r"(?P<session>\d+)"}],
    "resume": ["resume", "{session}"],
    "read_only": ["--look"],
    "read_write": ["--edit"],
    "instructions": ["--system", "{instructions}"],
    "mcp": ["--mcp", "{mcp_file}"],
}


SERVERS = (McpServer("files", ("mcp-files", "a b"), env=("MY_TOKEN",)), McpServer("docs", url="http://127.0.0.1:9/mcp"))


def asked(options: dict[str, Any], **more: Any) -> SessionCommand:
    return CommandAdapter(CommandOptions.model_validate(options)).command(replace(request(), **more))


def test_optional_arguments_are_inserted() -> None:
    """They are inserted at their place in argv or at its end; those of a writing session replace the others."""
    everything: dict[str, Any] = {"resume": "s1", "instructions": "Speak {task}.", "mcp_servers": SERVERS}
    given = ("resume", "s1", "--edit", "--system", "Speak {task}.", "--mcp", "/h/council-mcp.json")
    assert asked(ALL, **everything).argv == ("x", *given, "--", "/p/prompt")
    assert asked({**ALL, "argv": ["x"]}, **everything).argv == ("x", *given)
    assert asked(ALL).argv == ("x", "--edit", "--", "/p/prompt")
    assert asked(ALL, read_only=True).argv == ("x", "--look", "--", "/p/prompt")


def test_each_option_is_a_capability() -> None:
    """Without the option the adapter lacks the capability."""
    assert CommandAdapter(CommandOptions.model_validate(ALL)).capabilities() == {
        Capability.RESUME,
        Capability.READ_ONLY,
        Capability.INSTRUCTIONS,
        Capability.MCP,
    }
    for name, one in {"read_only": Capability.READ_ONLY, "instructions": Capability.INSTRUCTIONS}.items():
        options = CommandOptions.model_validate({"argv": ["x"], name: ALL[name]})
        assert CommandAdapter(options).capabilities() == {one}


def test_files_are_written_to_the_home() -> None:
    """Servers and instructions are written to files where arguments name them; variables do not reach the files."""
    home = asked(ALL, mcp_servers=SERVERS, instructions="Speak.").home
    assert home is not None
    assert {name: json.loads(text) for name, text in home.files.items()} == {
        "council-mcp.json": {
            "mcpServers": {
                "files": {"command": "mcp-files", "args": ["a b"]},
                "docs": {"type": "http", "url": "http://127.0.0.1:9/mcp", "httpUrl": "http://127.0.0.1:9/mcp"},
            }
        }
    }
    by_file = {"argv": ["x"], "instructions": ["--system={instructions_file}"]}
    reported = asked(by_file, instructions="Speak.")
    assert reported.argv == ("x", "--system=/h/council-instructions.md")
    assert reported.home == SessionHome({"council-instructions.md": "Speak."})
    assert asked(by_file).home is None
    assert asked({"argv": ["x", "{home}"]}).home == SessionHome()


def test_long_instructions_need_a_file() -> None:
    """As an argument they are limited by argv, in a file they are not."""
    long = "x" * (100 * 1024 + 1)
    with pytest.raises(RefusedError, match=r"use \{instructions_file\} instead of"):
        asked(ALL, instructions=long)
    asked({"argv": ["x"], "instructions": ["{instructions_file}"]}, instructions=long)


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        ({"argv": ["x", "{model}"]}, "{model} has no value: add `model`"),
        ({"argv": ["x", "{session}"]}, "{session} is not a placeholder"),
        ({"argv": ["{options}"]}, "write it once, as a separate argument"),
        ({"argv": ["x", "{options}", "{options}"]}, "write it once, as a separate argument"),
        ({"argv": ["x", "--with={options}"]}, "write it once, as a separate argument"),
        ({"read_write": ["--edit"]}, "move them to `argv`, or add `read_only`"),
        ({"read_only": []}, "at least 1 item"),
        ({"read_only": ["{options}"]}, "{options} is not a placeholder"),
        ({"resume": ["--continue"]}, "{session} is missing in these arguments: add it"),
        ({"resume": ["{session}"], "home": "own"}, "add a rule with `session` to `read`"),
        ({"resume": ["{session}"], "read": ALL["read"]}, "set `home: own`, or set `home: shared` and add"),
        ({"instructions": ["--system"]}, "{instructions} or {instructions_file} is missing in"),
        ({"mcp": ["--mcp", "x.json"]}, "{mcp_file} is missing in these arguments"),
        ({"mcp": "--mcp {mcp_file}"}, "tuple"),
    ],
)
def test_invalid_capability_options_are_explained(options: dict[str, Any], reported: str) -> None:
    with pytest.raises(ValidationError) as raised:
        CommandOptions.model_validate({"argv": ["x"], **options})
    assert reported in str(raised.value)


def test_conversations_are_kept_in_the_configured_home() -> None:
    """In the home of the task, or in the user's own if the options say so."""
    for home in ("own", "shared"):
        options = CommandOptions.model_validate({**ALL, "home": home})
        assert Capability.RESUME in CommandAdapter(options).capabilities()


def test_missing_program_behind_a_bridge_is_reported(tmp_path: Path) -> None:
    """As that of any adapter; a program that exists may exit with the same code."""

    def verdict(program: str) -> Failed | None:
        adapter = CommandAdapter(CommandOptions.model_validate({"argv": [program], "stdin": "{prompt}"}))
        (tmp_path / STDIN_FILE).write_text("x")
        argv = adapter.command(replace(request(), home=tmp_path)).argv
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return adapter.verdict(SessionEnd(done.returncode, None, 1.0, done.stdout, done.stderr))

    missing, other = tmp_path / "no-such", tmp_path / "other"
    other.write_text("#!/bin/sh\nexit 127\n")
    other.chmod(0o755)
    assert verdict(str(missing)) == Failed(FailureClass.MISSING, f"the program was not found: {missing}")
    assert verdict(str(other)) is None
