"""Profiles in the user's folder: used, extended, replaced, and rejected with the file, line and fix."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from adapters.command.profile import ProfileAdapter
from orchestrator.plugins import Plugins, load_plugins
from orchestrator.protocols import SessionRequest
from tests.conftest import Repository

TOOL = """
docs: https://example.com/docs
install: pip install tool
argv: [tool, "{prompt_file}"]
"""


def write(home: Path, name: str, text: str) -> Path:
    """Write a profile of the user; return its file."""
    file = home / ".config" / "council" / "profiles" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dedent(text))
    return file


def load(home: Path, *untrusted: Path) -> Plugins:
    return load_plugins({"HOME": str(home), "COUNCIL_PLUGINS": ""}, untrusted)


def adapter(plugins: Plugins, name: str, **options: object) -> ProfileAdapter:
    made = plugins.adapters[name]
    found = made(made.Options.model_validate(options))
    assert isinstance(found, ProfileAdapter)
    return found


def request(home: Path) -> SessionRequest:
    return SessionRequest("r", "t", 1, "Fix\nit.", Path("/p"), Path("/w"), home)


def test_profile_is_an_adapter_type(tmp_path: Path) -> None:
    """Its facts describe the program; an entry overrides its values and adds variables and patterns."""
    write(tmp_path, "tool", TOOL + "env: [A, B=b]\nkeys: [KEY]\nfailures: {auth: log in}\nlog_in: run tool login\n")
    made = adapter(load(tmp_path), "tool", argv=["other"], env=["C", "B=c"], failures={"refused": "no"}, args=["-v"])
    command = made.command(request(tmp_path))
    assert command.argv == ("other", "-v")
    assert (command.env, command.pass_env) == ({"B": "c"}, ("HOME", "KEY", "A", "C"))
    (program,) = made.programs()
    assert (program.name, program.verified, program.log_in) == ("other", (), "run tool login")
    assert list(made._options.failures) == ["refused", "auth"]


def test_profile_extends_an_installed_one_and_may_replace_it(tmp_path: Path) -> None:
    """Maps and variables are merged, other values replaced."""
    write(
        tmp_path,
        "qwen-code",
        """
        extends: qwen-code
        argv: [qwen, --fast]
        env: [MY_KEY]
        failures: {auth: no token}
        """,
    )
    made = adapter(load(tmp_path), "qwen-code")
    installed = adapter(load_plugins({"COUNCIL_PLUGINS": ""}), "qwen-code")
    assert made.profile.argv == ("qwen", "--fast")
    assert made.profile.env == (*installed.profile.env, "MY_KEY")
    assert made.profile.failures == {**installed.profile.failures, "auth": "no token"}
    assert made.profile.read == installed.profile.read


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (TOOL + "agrv: [tool]\n", 5, "unknown key 'agrv': did you mean 'argv'?"),
        ("docs: https://example.com\nargv: [tool]\n", 1, "the key 'install' is missing: add `install:` here"),
        (TOOL + "read:\n  - txt: a\n", 6, "unknown key 'txt': did you mean 'text'?"),
        (TOOL + "failures: {auth: '('}\n", 5, "is not a regular expression"),
        (TOOL + "supported: newest\n", 5, "is not a range of versions: write one such as >=1.2,<2"),
        (TOOL + "files: {../x: a}\n", 5, "is not a path in the home: write one such as .some-cli/config.json"),
        (TOOL + "files: {x: {y: '{wrong}'}}\n", 5, "{wrong} is not a placeholder"),
        (TOOL + "env: ['X={wrong}']\n", 5, "{wrong} is not a placeholder"),
        (TOOL + "prompt:\n", 5, "prompt is empty"),
        (TOOL.replace("[tool,", "[tools/x,"), 4, "'tools/x' is not a program: write a name to look up on PATH"),
        ("extends: qwen-cod\n", 1, "there is no profile 'qwen-cod' to extend: did you mean 'qwen-code'?"),
        ("argv: [a\n", 1, "close the bracket"),
        ("", 1, "the file is empty: add the keys docs, install and argv"),
    ],
)
def test_error_in_a_profile_has_file_line_and_fix(tmp_path: Path, text: str, line: int, message: str) -> None:
    """The other adapters are loaded."""
    file = write(tmp_path, "tool", text.lstrip("\n"))
    plugins = load(tmp_path)
    line -= text.startswith("\n")
    (skipped,) = plugins.left_out
    assert str(skipped).startswith(f"the profile {file}:{line}:")
    assert message in str(skipped)
    assert plugins.explain("tool") == f"skipped: {skipped}"
    assert {"command", "qwen-code"} <= plugins.adapters.keys()
    assert "tool" not in plugins.adapters


def test_profile_that_others_can_write_is_rejected(tmp_path: Path) -> None:
    """A file in a run's repository, a link into it, and a file with permissions for all users."""
    home, repository = tmp_path / "home", tmp_path / "repository"
    (repository / ".git").mkdir(parents=True)
    inside = repository / "inside.yaml"
    inside.write_text(TOOL)
    write(home, "linked", "").unlink()
    (home / ".config/council/profiles/linked.yaml").symlink_to(inside)
    write(home, "open", TOOL).chmod(0o666)
    write(home, "claude-code", TOOL)
    write(home, "bad name", TOOL)
    write(home, "fine", TOOL)
    plugins = load(home, repository)
    reasons = {one.plugin.name: one.reason for one in plugins.left_out}
    assert reasons.keys() == {"linked", "open", "claude-code", "bad name"}
    assert f"the file is inside the repository {repository}" in reasons["linked"]
    assert "chmod o-w" in reasons["open"]
    assert "there is already an adapter type 'claude-code': rename the file" in reasons["claude-code"]
    assert "rename the file" in reasons["bad name"]
    assert "fine" in plugins.adapters
    assert load(repository, repository).adapters.keys() == load_plugins({"COUNCIL_PLUGINS": ""}).adapters.keys()


def test_home_in_the_repository_has_no_profiles(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    write(tmp_path, "tool", TOOL)
    assert "tool" not in load(tmp_path, tmp_path / "src").adapters


def test_commands_show_profiles(repository: Repository) -> None:
    """`adapters` marks unverified ones and reports errors; `validate` explains a missing type."""
    home = Path(repository.environ["HOME"])
    write(home, "fine", TOOL)
    broken = write(home, "broken", TOOL + "agrv: x\noutptu: y\n")
    shown = repository.council("adapters").stdout
    assert f"fine ({home}/.config/council/profiles/fine.yaml, unverified)" in shown
    skipped = f"the profile {broken}:5:1: unknown key 'agrv': did you mean 'argv'?; 6:1: unknown key 'outptu'"
    assert f"skipped: {skipped}: did you mean 'output'?" in shown
    types = {one["name"]: one for one in repository.council("adapters", "--json").result["types"]}
    assert types["fine"]["programs"][0]["verified"] == []
    config = repository.configure([{"id": "t", "prompt": "x"}], adapters={"it": {"use": "broken"}})
    rejected = repository.council("validate", str(config))
    assert rejected.code == 2
    assert f"{broken}:5:1: unknown key 'agrv'" in rejected.stderr + rejected.stdout


def test_init_finds_the_program_of_a_profile(repository: Repository, tmp_path: Path) -> None:
    """The file names its type, and says that it is unverified."""
    write(Path(repository.environ["HOME"]), "tool", TOOL)
    program = tmp_path / "bin" / "tool"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho tool 1.2.3\n")
    program.chmod(0o755)
    repository.environ["PATH"] = f"{program.parent}{os.pathsep}{repository.environ['PATH']}"
    made = repository.council("init", "--json")
    assert "tool" in [one["use"] for one in made.result["adapters"]], made
    text = (repository.top / "council.yaml").read_text()
    assert "tool 1.2.3: unverified" in text, text


def test_files_stdin_and_result_reach_the_program(repository: Repository, tmp_path: Path) -> None:
    """A program that reads a config file and two lines, and reports its tokens in a file."""
    program = tmp_path / "bin" / "tool"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        + dedent(
            """
            import json, os, sys
            home = os.environ["HOME"]
            config = json.load(open(f"{home}/.tool/config.json"))
            mode, prompt = sys.stdin.read().splitlines()
            assert mode == "mode edit", mode
            open("made.txt", "w").write(f"{config['model']}: {prompt}\\n")
            messages = [{"text": "x" * 2_000_000, "n": 7}]
            json.dump({"usage": {"in": 12, "out": 3}, "messages": messages}, open(f"{home}/report.json", "w"))
            """
        )
    )
    program.chmod(0o755)
    write(
        Path(repository.environ["HOME"]),
        "tool",
        TOOL
        + """
home: own
argv: [tool]
stdin: "mode edit\\n{prompt_line}\\n"
files: {.tool/config.json: {model: "{model}"}}
result_file: {path: report.json, keys: [usage, messages.*.n]}
output: jsonl
read:
  - when: {file.usage.in: 12}
    input_tokens: file.usage.in + file.messages.*.n
    output_tokens: file.usage.out
    done: true
""".replace("argv: [tool]\n", ""),
    )
    repository.environ["PATH"] = f"{program.parent}{os.pathsep}{repository.environ['PATH']}"
    config = repository.configure(
        [{"id": "t", "prompt": "Make\nit."}],
        adapters={"it": {"use": "tool", "model": "large", "argv": ["tool"]}},
        readable=[str(program.parent), sys.prefix],
    )
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"t": "landed"}, ended
    assert (repository.top / "made.txt").read_text() == "large: Make it.\n"
    (task,) = ended.result["tasks"]
    assert (task["input_tokens"], task["output_tokens"]) == (19, 3)
