"""Help: examples are valid, and unknown words get suggestions."""

from __future__ import annotations

import inspect
import pkgutil
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields

import click
import pytest
from click.testing import CliRunner

from orchestrator.cli import commands
from orchestrator.cli.main import COMMANDS_BY_SECTION, main
from orchestrator.config.coordination import CoordinationOverrides


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
    name = " ".join(path)
    assert mark, f"`council {name}`: end its docstring with a paragraph `\\b`, `Examples:` and at least one example"
    for line in examples.splitlines():
        first, *words = shlex.split(line.partition(" > ")[0])
        assert first == "council"
        assert tuple(words[: len(path)]) == path
        _parse(words)


@pytest.mark.parametrize("path", [path for path, one in ALL.items() if one.callback is not None], ids=" ".join)
def test_callback_takes_exactly_the_declared_parameters(path: tuple[str, ...]) -> None:
    """A forgotten option, or one that the function does not take, would fail only when the command runs."""
    command = ALL[path]
    assert command.callback is not None
    taken = inspect.signature(command.callback).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return  # a session command, which passes all of them on
    shared = {one.name for one in fields(CoordinationOverrides)} if "coordination" in taken else set()
    declared = {parameter.name for parameter in command.params if parameter.expose_value}
    assert declared - shared == taken.keys() - {"context", "coordination"}, (
        f"`council {' '.join(path)}`: its options and arguments must be the parameters of its function"
    )


def test_every_module_of_commands_is_in_the_table() -> None:
    """Modules of options, and of subcommands that another module adds to its group, have no commands of their own."""
    prefix = f"{commands.__name__}."
    walked = pkgutil.walk_packages(commands.__path__, prefix)
    found = {one.name.removeprefix(prefix) for one in walked if not one.ispkg}
    defining = {one.callback.__module__.removeprefix(prefix) for one in ALL.values() if one.callback is not None}
    listed = {place.partition(":")[0] for entries in COMMANDS_BY_SECTION.values() for place, _ in entries.values()}
    missing = found - listed - defining - {"runs.run_options"}
    assert not missing, f"add the commands of {sorted(missing)} to COMMANDS_BY_SECTION in orchestrator/cli/main.py"


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
        ("hold x", "did you mean `council queue hold`?"),
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
