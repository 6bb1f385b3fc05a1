"""`use: command`: any program, with nothing but YAML."""

from pathlib import Path
from typing import Any, ClassVar

import pluggy
import pytest
from pydantic import ValidationError

import adapters.command
from adapters.command import CommandAdapter, CommandOptions
from orchestrator import hookspecs
from orchestrator.errors import RefusedError
from orchestrator.protocols import Command, SessionEnd, SessionRequest
from orchestrator.testing.adapter_contract import AdapterContract


def request(prompt: str = "Fix it.") -> SessionRequest:
    return SessionRequest("r1", "t1", 2, prompt, Path("/p/prompt"), Path("/w/tree"), Path("/h"))


def command(text: str = "Fix it.", **options: Any) -> Command:
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


def test_prompt_is_not_filled_again() -> None:
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
def test_other_braces(written: str, given: str) -> None:
    """Doubled braces give the text of a placeholder; braces around anything else stay."""
    assert command(argv=["x", written]).argv == ("x", given)


def test_stdin() -> None:
    """The prompt goes to stdin only where that is asked for."""
    assert command(argv=["x"]).stdin is None
    assert command(argv=["x"], prompt="stdin").stdin == Path("/p/prompt")


def test_environment() -> None:
    """A list names what is passed on and sets what has a value, a mapping sets what it says."""
    passed = command(argv=["x"], env=["A", "B", "C=1=2", "D="])
    assert (passed.env, passed.pass_env) == ({"C": "1=2", "D": ""}, ("A", "B"))
    given = command(argv=["x"], env={"A": "1"})
    assert (given.env, given.pass_env) == ({"A": "1"}, ())


@pytest.mark.parametrize(
    ("argv", "programs"), [(["x", "y"], ("x",)), (["./x"], ()), (["/bin/x"], ()), (["{task}"], ())]
)
def test_programs(argv: list[str], programs: tuple[str, ...]) -> None:
    """Only a bare name is looked for on PATH."""
    assert tuple(one.name for one in CommandAdapter(CommandOptions(argv=tuple(argv))).programs()) == programs


def test_prompt_may_fill_argv_to_its_limit() -> None:
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


def test_long_prompt_elsewhere_is_fine() -> None:
    """By file or stdin a prompt may be of any length."""
    assert command("x" * 1_000_000, argv=["x", "{prompt_file}", "{{prompt}}"], prompt="stdin").argv[1] == "/p/prompt"


def test_prompt_with_nul_is_refused() -> None:
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
def test_wrong_options(options: dict[str, Any]) -> None:
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
def test_the_class_of_a_failure_is_read_from_what_was_said(
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
    with pytest.raises(ValidationError, match=r"\{promt\} is no placeholder: .*\{prompt_file\}.*\{\{promt\}\}"):
        CommandOptions(argv=("{promt}",))


def test_registers_itself() -> None:
    """The module, as a plugin, announces `command`."""
    plugins = pluggy.PluginManager("cli_council")
    plugins.add_hookspecs(hookspecs)
    plugins.register(adapters.command)
    found: dict[str, object] = {}
    plugins.check_pending()
    plugins.hook.council_register_adapters(register=found.__setitem__)
    assert found == {"command": CommandAdapter}
