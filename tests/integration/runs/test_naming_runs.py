"""Every command accepts a run by its id, by a prefix of it, or as `latest`."""

from __future__ import annotations

import click
import pytest

from orchestrator.cli.main import main
from orchestrator.testing.clock import ManualClock
from tests.conftest import Repository
from tests.recorded_run import RUN, RUN_STARTED, record_run, recorded_project, run_document
from tests.unit.test_help import ALL

NEWER = "20260203-101112-cd34"
#: Commands that print a run, or something of its task `models`.
OF_A_RUN = ["status", "usage", "check", "state show", "watch"]
#: Commands that change a run as a whole.
CHANGES_A_RUN = ["resume", "merge", "checkpoint create"]
OF_A_TASK = ["show models", "logs models", "salvage list", "checkpoint list", "share list", "state at now"]


@pytest.fixture
async def runs(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """Return a project with two made-up runs."""
    async with recorded_project(repository.top, monkeypatch) as store:
        clock = ManualClock(RUN_STARTED + 86400)
        await record_run(store, clock, run_document(repository.top, NEWER, clock.now()))
    (repository.top / "hub/trusted.git").mkdir(parents=True)
    return repository


def test_every_command_about_a_run_accepts_the_option() -> None:
    """`--run RUN`, with completion; if RUN is an argument, as an alternative to it."""
    named = {path: command for path, command in ALL.items() if any(one.name == "run" for one in command.params)}
    assert len(named) > 20
    for path, command in named.items():
        [option] = [one for one in command.params if "--run" in one.opts]
        context = click.Context(command, parent=click.Context(main))
        assert option.shell_complete(context, "") == [], path
        assert option._custom_shell_complete is not None, path


@pytest.mark.parametrize("words", [*OF_A_RUN, *CHANGES_A_RUN])
def test_command_about_a_run_has_the_run_as_argument(words: str) -> None:
    [argument] = [one for one in ALL[*words.split()].params if one.name == "run"]
    assert isinstance(argument, click.Argument)


@pytest.mark.extended_variants
@pytest.mark.parametrize("words", OF_A_RUN)
async def test_command_about_a_run_accepts_argument_and_option(runs: Repository, words: str) -> None:
    """By a prefix of its id and by `latest`."""
    command = words.split()
    by_id = runs.council(*command, RUN)
    assert "there is no run" not in by_id.stderr
    for name in (("20260102",), ("--run", RUN), ("--run", "20260102"), (RUN, "--run", RUN)):
        assert runs.council(*command, *name) == by_id, name
    newest = runs.council(*command)
    for name in (("latest",), ("--run", "latest"), ("--run", "202602")):
        assert runs.council(*command, *name) == newest, name
    twice = runs.council(*command, RUN, "--run", NEWER)
    assert (twice.code, "omit one" in twice.stderr) == (2, True)


@pytest.mark.extended_variants
@pytest.mark.parametrize("words", OF_A_TASK)
async def test_command_about_a_part_of_a_run_accepts_the_option(runs: Repository, words: str) -> None:
    command = words.split()
    assert runs.council(*command, "--run", "20260102") == runs.council(*command, "--run", RUN)
    assert runs.council(*command, "--run", "latest") == runs.council(*command, "--run", NEWER)


@pytest.mark.extended_variants
@pytest.mark.parametrize("words", [*OF_A_RUN, *OF_A_TASK, "cancel", "resume", "work", "diff models", "usage"])
async def test_unknown_run_suggests_the_nearest(runs: Repository, words: str) -> None:
    """An ambiguous prefix lists its matches."""
    wrong = runs.council(*words.split(), "--run", "20260102-030405-ab21")
    assert wrong.code == 2
    assert f"did you mean '{RUN}'?" in wrong.stderr
    several = runs.council(*words.split(), "--run", "2026")
    assert several.code == 2
    assert f"2 runs begin with '2026': use one of: {NEWER}, {RUN}" in several.stderr
