"""Shell command parsing: named programs, and the one that a shell did not find."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain.sessions.shell_commands import find_missing_program, find_programs
from orchestrator.sessions.setup.shell import CommandFailed

COMMANDS: list[tuple[str, list[str]]] = [
    ("pytest -q", ["pytest"]),
    ("cd api && CI=1 npm test; make lint | tee log", ["cd", "npm", "make", "tee"]),
    ("! grep -rn FIXME src", ["grep"]),
    ("if test -e a; then b; else c; fi", ["test", "b", "c"]),
    ("for one in a b; do check $one; done", ["check"]),
    ("true\npython3 -c 'import a\nassert a'\nlast", ["true", "python3", "last"]),
    ("first \\\n  word; second", ["first", "second"]),
    ("$TOOL run && ~/bin/x && other", ["other"]),
    ("f() { a; }; f", ["f"]),
    ("cat <<EOF\nword\nEOF", ["cat"]),
    ("tests > log 2>&1 && echo done # of all", ["tests", "echo"]),
    ("echo 'never closed", ["echo"]),
    ("", []),
]


@pytest.mark.parametrize(("command", "programs"), COMMANDS)
def test_programs_of_a_command_are_found(command: str, programs: list[str]) -> None:
    """At each position where the shell looks up a program."""
    assert find_programs(command) == programs


@given(st.text())
def test_any_text_is_parsed(text: str) -> None:
    assert all(find_programs(text))
    assert (find_missing_program(text) or "") in text


@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "zsh", "busybox"])
@pytest.mark.parametrize(
    ("command", "program"),
    [("true && no-such-tool -x", "no-such-tool"), ("./tool", "./tool"), ("env no-such-tool", "no-such-tool")],
)
def test_missing_program_is_named_by_the_shell_message(
    shell: str, command: str, program: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By the messages of all supported shells."""
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    folder = tmp_path_factory.mktemp("tree")
    (folder / "tool").write_text("")
    words = [shell, "sh"] if shell == "busybox" else [shell]
    done = subprocess.run(
        [*words, "-c", f"exec 2>&1\n{command}"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode in {126, 127}
    assert find_missing_program(done.stdout) == program


NODE_TEST = "not ok 1 - greets\n1..1\n# tests 1\n# pass 0\n# fail 1\n# cancelled 0\n# todo 0\n# duration_ms 479.65\n"
SPEC = NODE_TEST.replace("#", "\N{INFORMATION SOURCE}")


@pytest.mark.parametrize(
    ("output", "last"),
    [
        (NODE_TEST, "# fail 1"),
        (f"{SPEC}npm notice\nnpm notice New version!\n", "\N{INFORMATION SOURCE} fail 1"),
        (
            "npm error Missing script: x\nnpm error\nnpm error A complete log of this run can be found in: /a/b.log\n",
            "npm error Missing script: x",
        ),
        (
            "npm ERR! Test failed.\n\nnpm ERR! A complete log of this run can be found in:\nnpm ERR!     /a/b.log\n",
            "npm ERR! Test failed.",
        ),
        ("# duration_ms 3\n", "# duration_ms 3"),
    ],
)
def test_lines_below_the_cause_are_no_reason(output: str, last: str) -> None:
    """Reports show the last line of the reason: it must not be a duration, a zero count or the path of a log."""
    failed = CommandFailed("npm test", "ended with exit code 1", output, Path("log"))
    assert failed.describe("on the merged tree").splitlines()[-1] == last
