"""Groups of commands: imported on demand, with suggestions for mistyped names."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

from orchestrator import lazy

#: The maximum number of suggested commands.
_MOST_NAMED = 3
#: The similarity (0 to 1) of a mistyped name.
_SURE = 0.8


class SuggestingGroup(click.Group):
    """A group that suggests commands for an unknown name: of a subgroup, or with a similar name."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; fail with a suggestion if it is unknown."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            names, matches = self.list_commands(ctx), lazy.difflib.get_close_matches
            # Subgroups are slow to import: not for a typing error.
            near = matches(name, names, 1, _SURE) or self._nested(ctx, name)[:_MOST_NAMED] or matches(name, names, 1)
            commands = " or ".join(f"`{ctx.command_path} {command}`" for command in near)
            remedy = f"did you mean {commands}?" if near else f"`{ctx.command_path} --help` lists them."
            ctx.fail(f"unknown command {name!r}: {remedy}")
        return super().resolve_command(ctx, args)

    def _nested(self, ctx: click.Context, name: str) -> list[str]:
        """Return the commands of subgroups that have this name."""
        groups = {group: self.get_command(ctx, group) for group in self.list_commands(ctx)}
        return [
            f"{group} {name}"
            for group, found in groups.items()
            if isinstance(found, click.Group) and name in found.list_commands(ctx)
        ]


class LazyGroup(SuggestingGroup):
    """A group that imports its commands on first use.

    `locations` maps names to `module:name` in `commands`.
    """

    def __init__(self, *args: Any, locations: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._locations = locations

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """Return all names in the order of the help."""
        return list(self._locations)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  the same
        """Import and return a command; None if the name is unknown."""
        if cmd_name not in self._locations:
            return None
        module, _, name = self._locations[cmd_name].partition(":")
        gc.disable()  # garbage collection would take a tenth of the import's time and find nothing
        try:
            command: click.Command = getattr(import_module(f"orchestrator.cli.commands.{module}"), name)
        finally:
            gc.freeze()  # otherwise the first collection examines all imported objects
            gc.enable()
        return command
