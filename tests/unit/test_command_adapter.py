"""`use: command`: any program, with nothing but YAML."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pluggy
import pytest
from pydantic import ValidationError

import adapters.command
from adapters.command import CommandAdapter, CommandOptions
from orchestrator import hookspecs
from orchestrator.errors import RefusedError
from orchestrator.protocols import Capability, McpServer, SessionCommand, SessionEnd, SessionHome, SessionRequest
from orchestrator.testing.adapter_contract import AdapterContract


def request(prompt: str = "Fix it.") -> SessionRequest:
    return SessionRequest("r1", "t1", 2, prompt, Path("/p/prompt"), Path("/w/tree"), Path("/h"))


def command(text: str = "Fix it.", **options: Any) -> SessionCommand:
    return CommandAdapter(CommandOptions.model_validate(options)).command(request(text))


class TestPlaceholders(AdapterContract):
    """The contract, with every placeholder and a list of names."""

    adapter_type = CommandAdapter
    options: ClassVar = {
        "argv": ["tool", "{prompt}", "{prompt_file}", "{worktree}", "{task}", "{run}", "{attempt}"],
        "env": ["HOME", "GIT_AUTHOR_NAME"],
    }


class TestStdin(AdapterContract):
    """The contract, with the prompt on stdin and variables that are set."""

    adapter_type = CommandAdapter
    options: ClassVar = {"argv": ["/opt/tool", "-"], "env": {"MODE": "{task}", "EMPTY": ""}, "prompt": "stdin"}


def test_placeholders_are_filled() -> None:
    """Each placeholder stands for its part of the request, also within other text."""
    argv = ["x", "{run}/{task}.{attempt}", "--dir={worktree}", "{prompt_file}", "{prompt}"]
    assert command(argv=argv).argv == ("x", "r1/t1.2", "--dir=/w/tree", "/p/prompt", "Fix it.")


def test_placeholders_in_a_prompt_are_not_filled() -> None:
    """Text that came in by a placeholder is left as it is."""
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
    """Doubled braces give the text of a placeholder; braces around anything else stay."""
    assert command(argv=["x", written]).argv == ("x", given)


def test_prompt_on_stdin_is_passed() -> None:
    """The prompt goes to stdin only where that is asked for."""
    assert command(argv=["x"]).stdin is None
    assert command(argv=["x"], prompt="stdin").stdin == Path("/p/prompt")


def test_environment_is_passed() -> None:
    """A list names what is passed on and sets what has a value, a mapping sets what it says."""
    passed = command(argv=["x"], env=["A", "B", "C=1=2", "D="])
    assert (passed.env, passed.pass_env) == ({"C": "1=2", "D": ""}, ("A", "B"))
    given = command(argv=["x"], env={"A": "1"})
    assert (given.env, given.pass_env) == ({"A": "1"}, ())


@pytest.mark.parametrize(
    ("argv", "programs"), [(["x", "y"], ("x",)), (["./x"], ()), (["/bin/x"], ()), (["{task}"], ())]
)
def test_program_is_looked_up_on_path(argv: list[str], programs: tuple[str, ...]) -> None:
    """Only a bare name is looked for on PATH."""
    assert tuple(one.name for one in CommandAdapter(CommandOptions(argv=tuple(argv))).programs()) == programs


def test_prompt_up_to_the_argv_limit_is_accepted() -> None:
    """100 KiB go into argv, one byte more does not, however often and however encoded."""
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
    """By file or stdin a prompt may be of any length."""
    assert command("x" * 1_000_000, argv=["x", "{prompt_file}", "{{prompt}}"], prompt="stdin").argv[1] == "/p/prompt"


def test_prompt_with_nul_is_rejected() -> None:
    """A NUL character can't be passed in argv."""
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
    """What the program could not be started with is refused before anything runs."""
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
    """The options' patterns, in their order, look through both streams; a limit may name its end."""
    patterns = {
        "auth": "not logged in",
        "rate_limited": r"usage limit(, try again in (?P<seconds>\d+) s| until (?P<until>\S+))?",
    }
    adapter = CommandAdapter(CommandOptions.model_validate({"argv": ["x"], "failures": patterns}))
    verdict = adapter.verdict(end(**{stream: said}))
    assert (verdict and str(verdict.failure), verdict and verdict.until) == (failure, until)


def test_unknown_placeholder_is_explained() -> None:
    """The message names what there is and how to write the braces themselves."""
    with pytest.raises(ValidationError, match=r"\{promt\} is not a placeholder: .*\{prompt_file\}.*\{\{promt\}\}"):
        CommandOptions(argv=("{promt}",))


def test_adapter_is_registered() -> None:
    """The module, as a plugin, announces `command`."""
    plugins = pluggy.PluginManager("cli_council")
    plugins.add_hookspecs(hookspecs)
    plugins.register(adapters.command)
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
    """They go where argv says, else behind it; those of a session that may change files in the place of the others."""
    everything: dict[str, Any] = {"resume": "s1", "instructions": "Speak {task}.", "mcp_servers": SERVERS}
    given = ("resume", "s1", "--edit", "--system", "Speak {task}.", "--mcp", "/h/council-mcp.json")
    assert asked(ALL, **everything).argv == ("x", *given, "--", "/p/prompt")
    assert asked({**ALL, "argv": ["x"]}, **everything).argv == ("x", *given)
    assert asked(ALL).argv == ("x", "--edit", "--", "/p/prompt")
    assert asked(ALL, read_only=True).argv == ("x", "--look", "--", "/p/prompt")


def test_each_option_is_a_capability() -> None:
    """What no option is given for, it is not asked for."""
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
    """Servers and instructions stand in files where arguments name those; no variable's value does."""
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
    told = asked(by_file, instructions="Speak.")
    assert told.argv == ("x", "--system=/h/council-instructions.md")
    assert told.home == SessionHome({"council-instructions.md": "Speak."})
    assert asked(by_file).home is None
    assert asked({"argv": ["x", "{home}"]}).home == SessionHome()


def test_long_instructions_need_a_file() -> None:
    """As an argument they have the limit of one, by a file none."""
    long = "x" * (100 * 1024 + 1)
    with pytest.raises(RefusedError, match=r"use \{instructions_file\} instead of"):
        asked(ALL, instructions=long)
    asked({"argv": ["x"], "instructions": ["{instructions_file}"]}, instructions=long)


@pytest.mark.parametrize(
    ("options", "told"),
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
        ({"resume": ["{session}"], "read": ALL["read"]}, "write `home: own`, or `home: shared` and add"),
        ({"instructions": ["--system"]}, "{instructions} or {instructions_file} is missing in"),
        ({"mcp": ["--mcp", "x.json"]}, "{mcp_file} is missing in these arguments"),
        ({"mcp": "--mcp {mcp_file}"}, "tuple"),
    ],
)
def test_invalid_capability_options_are_explained(options: dict[str, Any], told: str) -> None:
    """Each is explained when the file is loaded."""
    with pytest.raises(ValidationError) as raised:
        CommandOptions.model_validate({"argv": ["x"], **options})
    assert told in str(raised.value)


def test_conversations_are_kept_in_the_configured_home() -> None:
    """By a home of the task's, or in the user's own, which has to be said."""
    for home in ("own", "shared"):
        options = CommandOptions.model_validate({**ALL, "home": home})
        assert Capability.RESUME in CommandAdapter(options).capabilities()
