"""Help: examples are valid, and unknown words get suggestions."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from orchestrator.cli.main import main


def _leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if path:
        yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from _leaves(found, (*path, name))


ALL = dict(_leaves(main))


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_ends_with_valid_examples(path: tuple[str, ...]) -> None:
    """The example belongs to this command, and click accepts it."""
    _, mark, examples = inspect.cleandoc(ALL[path].help or "").partition("\b\nExamples:\n")
    assert mark
    for line in examples.splitlines():
        first, *words = shlex.split(line.partition(" > ")[0])
        assert first == "council"
        assert tuple(words[: len(path)]) == path
        _parse(words)


@pytest.mark.parametrize("path", [(), *(path for path, one in ALL.items() if isinstance(one, click.Group))], ids=str)
def test_list_of_commands_truncates_no_sentence(path: tuple[str, ...]) -> None:
    """The first sentence of each help fits, so that click does not cut it."""
    ended = CliRunner().invoke(main, [*path, "--help"], prog_name="council")
    _, _, commands = ended.output.partition("\nOptions:\n")
    assert "..." not in commands.replace(" TASK...", "")


def _parse(words: list[str]) -> None:
    """Parse the words of a command with click, without running it."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(click.Context(command), words.pop(0))
        assert found is not None
        command = found
    command.make_context(command.name, words)


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        ("statis", "did you mean `council status`?"),
        ("salvage lst", "did you mean `council salvage list`?"),
        ("salvage zzz", "`council salvage --help` lists them"),
        ("run --dryrun", "--dry-run"),
        ("salvage apply x --brnch y", "--branch"),
    ],
)
def test_unknown_command_suggests_the_nearest(words: str, reported: str) -> None:
    """For commands, subcommands and options."""
    ended = CliRunner().invoke(main, words.split(), prog_name="council")
    assert ended.exit_code == 2
    assert reported in re.sub(r"\s+", " ", ended.output)
