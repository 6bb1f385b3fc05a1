"""Groups of commands: imported on demand, with suggestions for mistyped names."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

from orchestrator import lazy


class SuggestingGroup(click.Group):
    """A group that suggests the closest command for an unknown name."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; fail with the closest name if it is unknown."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = lazy.difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            remedy = (
                f"did you mean `{ctx.command_path} {near[0]}`?" if near else f"`{ctx.command_path} --help` lists them."
            )
            ctx.fail(f"unknown command {name!r}: {remedy}")
        return super().resolve_command(ctx, args)


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
