"""Command groups that suggest a similar name for an unknown command."""

from __future__ import annotations

import click


class SuggestingGroup(click.Group):
    """A group that suggests a command for a mistyped name."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the named command; for an unknown name, fail with a suggestion."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            import difflib  # noqa: PLC0415  `--help` must be quick

            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            remedy = (
                f"did you mean `{ctx.command_path} {near[0]}`?" if near else f"`{ctx.command_path} --help` lists them."
            )
            ctx.fail(f"unknown command {name!r}: {remedy}")
        return super().resolve_command(ctx, args)
