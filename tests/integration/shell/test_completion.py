"""Shell completion of commands, runs, tasks and preserved work, by the real command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Repository

COUNCIL = str(Path(sys.executable).parent / "council")


def complete(repository: Repository, words: str, *, cwd: Path | None = None) -> list[str]:
    """Return bash's completions for the last word of a line, which may be empty."""
    done = subprocess.run(
        [COUNCIL],
        cwd=cwd or repository.top,
        env={
            **repository.environ,
            "_COUNCIL_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [line.partition(",")[2] for line in done.stdout.split()]


@pytest.mark.extended
async def test_names_of_a_project_are_completed(repository: Repository) -> None:
    """Tasks that the command applies to, runs, and preserved work."""
    tasks: list[dict[str, Any]] = [
        {"id": "good", "prompt": "write good.txt 1"},
        {"id": "glum", "prompt": "write bad.txt 1\nexit 3", "attempts": 1},
    ]
    run = repository.council("run", str(repository.configure(tasks)), "--json").result["run"]
    assert complete(repository, "council logs g") == ["good", "glum"]
    assert complete(repository, "council diff go") == ["good"]
    assert complete(repository, "council retry ") == ["glum"]
    assert complete(repository, "council retry glum ") == []
    assert complete(repository, "council cancel ") == []
    assert complete(repository, "council status ") == [run]
    assert complete(repository, f"council logs --run {run} gl") == ["glum"]
    assert complete(repository, "council logs --run none g") == []
    assert complete(repository, "council salvage show ") == ["glum/1"]
    assert complete(repository, "council salvage drop glum/1 ") == []
    await repository.assert_invariants()


@pytest.mark.extended
async def test_commands_and_options_are_completed(repository: Repository) -> None:
    """Also without a project."""
    assert complete(repository, "council sal") == ["salvage"]
    assert complete(repository, "council run --dry") == ["--dry-run"]
    assert complete(repository, "council completion ") == ["bash", "zsh", "fish"]


@pytest.mark.extended
async def test_missing_names_complete_to_nothing(repository: Repository, tmp_path: Path) -> None:
    """Without a project, or with a damaged state: no names, no message, no failure."""
    assert complete(repository, "council logs ") == []
    assert complete(repository, "council status ", cwd=tmp_path) == []
    assert not (repository.top / ".council").exists()
    state = repository.top / ".council/state"
    state.mkdir(parents=True)
    for path in ("log", "00000001.log"):
        (state / path).write_bytes(os.urandom(4096))
    assert complete(repository, "council logs ") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_scripts_are_accepted_by_their_shells(repository: Repository, shell: str) -> None:
    """Each script defines a completion for `council`; an installed shell reads it without output."""
    script = repository.council("completion", shell)
    assert (script.code, script.stderr) == (0, "")
    assert f"_COUNCIL_COMPLETE={shell}_complete" in script.stdout
    program = shutil.which(shell)
    if program is not None:
        done = subprocess.run([program, "-n"], input=script.stdout, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


async def test_bash_offers_the_completions_of_the_script(repository: Repository) -> None:
    """The script in a real bash, asked for a word of the command line."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    script = repository.council("completion", "bash").stdout
    asked = "COMP_WORDS=(council sal); COMP_CWORD=1; _council_completion council; echo ${COMPREPLY[@]}"
    done = subprocess.run(
        [bash, "-c", f"{script}\n{asked}"], env=repository.environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "salvage\n"


async def test_unknown_shell_is_rejected(repository: Repository) -> None:
    """The error lists the known shells."""
    ended = repository.council("completion", "tcsh")
    assert ended.code == 2
    assert "'bash', 'zsh', 'fish'" in ended.stderr
