"""The command that prints a completion script for a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from orchestrator.cli.core.command import CommandContext, async_command

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@async_command(prints_json=False)
async def completion(context: CommandContext, shell: str) -> None:
    """Print a completion script for SHELL.

    The script completes commands, options, and the names of runs, tasks and unmerged work.

    \b
    Examples:
      council completion bash > ~/.local/share/bash-completion/completions/council
      council completion zsh > ~/.zfunc/_council
      council completion fish > ~/.config/fish/completions/council.fish
    """
    root = click.get_current_context().find_root().command
    found = get_completion_class(shell)
    assert found is not None  # noqa: S101  click supports all three
    context.output.text(found(root, {}, "council", "_COUNCIL_COMPLETE").source())
