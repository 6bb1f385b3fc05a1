"""The long form: a real project's repository, twelve edits by real programs, killed at every failpoint."""

from __future__ import annotations

import signal
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.system.failpoints import FAILPOINTS
from tests.conftest import Repository
from tests.crash.sdists import download, unpack
from tests.crash.test_crashes import FIRST_KILL_FOR, RECOVERY_FAILPOINTS, UNREACHED_FAILPOINTS, resume_and_check

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROJECT = "flask==3.1.2"

#: Edits by sed, perl, awk and python3, in two chains of four and four independent ones.
EDITS = {
    "license-year": "sed -i 's/2010/2010-2026/' LICENSE.txt",
    "readme-title": "sed -i '1s/.*/# Flask, edited/' README.md",
    "docs-index": "printf '\\nEdited by a council.\\n' >> docs/index.rst",
    "examples-list": "ls examples > examples/INDEX.txt",
    "count-modules": "find src -name '*.py' | sort > MODULES.txt",
    "count-lines": "xargs wc -l < MODULES.txt > LINES.txt",
    "largest": "sort -rn LINES.txt | sed -n 2p > LARGEST.txt",
    "summary": "cat MODULES.txt LARGEST.txt > SUMMARY.txt && rm LARGEST.txt",
    "typing-header": "perl -pi -e 'print \"# typed\\n\" if $. == 1' src/flask/typing.py",
    "signals-header": "perl -pi -e 'print \"# signals\\n\" if $. == 1' src/flask/signals.py",
    "trim-tests": "awk '{sub(/e/, \"E\")} 1' tests/conftest.py > t && mv t tests/conftest.py",
    "toc": 'python3 -c \'import pathlib; t=[str(p) for p in sorted(pathlib.Path("docs").glob("*.rst"))];'
    ' pathlib.Path("TOC.txt").write_text("\\n".join(t))\'',
}
CHAINS = [
    ["count-modules", "count-lines", "largest", "summary"],
    ["typing-header", "signals-header", "trim-tests", "toc"],
]
SHELL = {"use": "command", "argv": ["sh", "-e", "{prompt_file}"]}


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the source archive of the project."""
    return download(PROJECT, tmp_path_factory.mktemp("archive"))


@pytest.fixture
def project(archive: Path, repository: Repository) -> Repository:
    """Return a repository with the files of the archive."""
    unpack(archive, repository)
    assert len(repository.git("ls-files").splitlines()) > 200
    return repository


def configure(project: Repository) -> Path:
    """Write the twelve tasks."""
    needs = {task: [before] for chain in CHAINS for before, task in pairwise(chain)}
    tasks = [{"id": task, "prompt": script, "needs": needs.get(task, [])} for task, script in EDITS.items()]
    return project.configure(tasks, adapters={"shell": SHELL}, defaults={"checks": ["test -f pyproject.toml"]})


async def test_twelve_real_edits_land_once_each(project: Repository) -> None:
    """Without a crash."""
    assert project.council("run", str(configure(project)), "--json").code == 0
    await resume_and_check(project, len(EDITS))


@pytest.mark.parametrize(
    "name", sorted(FAILPOINTS - UNREACHED_FAILPOINTS - {"adapter.cooling_down", "landing.rejected", "sink.sent"})
)
async def test_real_project_killed_at_every_failpoint_lands_once(project: Repository, name: str) -> None:
    """Killed at the fifth hit of a failpoint, or its only one."""
    config = str(configure(project))
    hit = 1 if name.startswith("run.") else 5
    if name in RECOVERY_FAILPOINTS:
        assert project.council("run", config, failpoints=f"{FIRST_KILL_FOR[name]}=kill@{hit}").code == -signal.SIGKILL
        assert project.council("resume", failpoints=f"{name}=kill").code == -signal.SIGKILL
    else:
        assert project.council("run", config, failpoints=f"{name}=kill@{hit}").code == -signal.SIGKILL
    await resume_and_check(project, len(EDITS))
