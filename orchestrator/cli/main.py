"""The `council` command: which commands there are. Each is imported when it is asked for: `--help` must be quick."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import click

from orchestrator.cli.core.group import SuggestingGroup
from orchestrator.cli.streams import usable_streams
from orchestrator.client.commands import SESSION_COMMANDS


class CommandEntry(NamedTuple):
    """Where a command is, as `module:name`, and the sentence that lists it; a test holds it to the command's own."""

    place: str
    help: str


#: All commands, under the headings that `--help` shows them by.
COMMANDS_BY_SECTION: Mapping[str, Mapping[str, CommandEntry]] = {
    "Run": {
        "run": CommandEntry(
            "orchestrator.cli.commands.runs.run:run_file", "Run the tasks of FILE and land what they build."
        ),
        "resume": CommandEntry(
            "orchestrator.cli.commands.runs.run:resume", "Go on with a run from wherever it was cut off."
        ),
        "merge": CommandEntry(
            "orchestrator.cli.commands.runs.run:merge",
            "Land finished work of a run that waits, and merge the run's own branch into its base.",
        ),
        "work": CommandEntry(
            "orchestrator.cli.commands.runs.run:work", "Join the runs that are at work as one more process."
        ),
    },
    "Set up": {
        "init": CommandEntry("orchestrator.cli.commands.setup.init:init", "Write a council.yaml for this repository."),
        "validate": CommandEntry(
            "orchestrator.cli.commands.setup.validate:validate",
            "Check FILE without running it, and tell every mistake.",
        ),
        "doctor": CommandEntry(
            "orchestrator.cli.commands.setup.doctor:doctor", "Look whether a run could work here, and say what to mend."
        ),
        "adapters": CommandEntry(
            "orchestrator.cli.commands.setup.adapters:adapters",
            "List the adapters that are installed, with what there is of their programs.",
        ),
        "workflow": CommandEntry(
            "orchestrator.cli.commands.setup.workflow:workflow",
            "Show the workflows that there are, or copy one to change it.",
        ),
        "schema": CommandEntry(
            "orchestrator.cli.commands.setup.schema:schema", "Print the JSON Schema of the file, for your editor."
        ),
        "completion": CommandEntry(
            "orchestrator.cli.commands.setup.completion:completion", "Print a script that completes commands in SHELL."
        ),
    },
    "Look": {
        "status": CommandEntry(
            "orchestrator.cli.commands.runs.status:status", "Show how a run stands; the exit code says so too."
        ),
        "show": CommandEntry(
            "orchestrator.cli.commands.runs.show:show", "Tell the whole story of a task: phases, sessions, handoffs."
        ),
        "watch": CommandEntry(
            "orchestrator.cli.commands.runs.watch:watch",
            "Show a run that is at work until it ends; Ctrl-C ends only the showing.",
        ),
        "runs": CommandEntry(
            "orchestrator.cli.commands.runs.status:runs", "List the runs of this project, the oldest first."
        ),
        "usage": CommandEntry(
            "orchestrator.cli.commands.runs.usage:usage", "Tell what a run used up, by adapter and by task."
        ),
        "logs": CommandEntry("orchestrator.cli.commands.runs.logs:logs", "Show what a task's session did and said."),
        "diff": CommandEntry(
            "orchestrator.cli.commands.runs.tasks:diff", "Show what a task has changed, so far if it is at work."
        ),
        "check": CommandEntry(
            "orchestrator.cli.commands.runs.check:check",
            "Hold what is recorded of a run's workflows against the rules.",
        ),
        "state": CommandEntry(
            "orchestrator.cli.commands.state.state:state", "See what is recorded, now and at any earlier moment."
        ),
        "locks": CommandEntry(
            "orchestrator.cli.commands.state.locks:locks", "List what is locked, by whom and since when, and who waits."
        ),
        "where": CommandEntry("orchestrator.cli.commands.runs.status:where", "Say where everything is kept."),
    },
    "In a session": {
        **{
            one.typed[0]: CommandEntry(f"orchestrator.cli.commands.sessions.session:{name}", one.help)
            for name, one in SESSION_COMMANDS.items()
            if not one.is_for_all
        },
        "share": CommandEntry(
            "orchestrator.cli.commands.sessions.share:share",
            "Share values between the sessions of a run, or look at them.",
        ),
        "mcp": CommandEntry(
            "orchestrator.cli.commands.sessions.mcp:mcp",
            "Serve the commands of a session by the Model Context Protocol.",
        ),
    },
    "Steer": {
        "cancel": CommandEntry(
            "orchestrator.cli.commands.runs.tasks:cancel", "Cancel tasks; without TASK, all that have not ended."
        ),
        "retry": CommandEntry(
            "orchestrator.cli.commands.runs.tasks:retry", "Try tasks again that are over without having landed."
        ),
        "approve": CommandEntry(
            "orchestrator.cli.commands.runs.tasks:approve", "Approve what tasks came to, so that they go on."
        ),
        "reject": CommandEntry(
            "orchestrator.cli.commands.runs.tasks:reject", "Have done again what waits for approval."
        ),
        "task": CommandEntry("orchestrator.cli.commands.runs.tasks:task", "Say what is to become of single tasks."),
        "salvage": CommandEntry(
            "orchestrator.cli.commands.runs.salvage:salvage", "See, take over or drop work that is on no target."
        ),
        "checkpoint": CommandEntry(
            "orchestrator.cli.commands.state.checkpoint:checkpoint",
            "Name how a run stands now, or go back to how it stood.",
        ),
        "clean": CommandEntry(
            "orchestrator.cli.commands.state.clean:clean", "Remove what runs left over and nothing needs."
        ),
    },
}


class LazyCommandGroup(SuggestingGroup):
    """The group of all commands; knows their names without importing them."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command with whatever streams there are, and without programs of the current folder."""
        path = os.environ.get("PATH")
        if path is not None:  # a relative entry of it would be a folder of the repository, where agents' work lands
            os.environ["PATH"] = os.pathsep.join(one for one in path.split(os.pathsep) if one.startswith("/"))
        with usable_streams():
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; where it is interrupted before it begins, say so and exit as it would."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would exit with 1
            from orchestrator.cli.core.error_boundary import EXIT_INTERRUPTED  # noqa: PLC0415  `--help` must be quick

            click.echo("council: interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """Return all names in the order that they are shown."""
        return [name for entries in COMMANDS_BY_SECTION.values() for name in entries]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  click's signature
        """Import a command; None if there is none of this name."""
        entry = next((entries[cmd_name] for entries in COMMANDS_BY_SECTION.values() if cmd_name in entries), None)
        if entry is None:
            return None
        module, _, name = entry.place.partition(":")
        gc.disable()  # looking for cycles among what stays for good takes a tenth of the time of importing it
        try:
            command: click.Command = getattr(import_module(module), name)
        finally:
            gc.enable()
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  the same
        """Write the commands under their headings."""
        for heading, entries in COMMANDS_BY_SECTION.items():
            with formatter.section(heading):
                formatter.write_dl([(name, entry.help) for name, entry in entries.items()])


@click.group(cls=LazyCommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cli-council", prog_name="council")
def main() -> None:
    """Run many AI coding CLIs at once on one git repository.

    Each session works in a worktree of its own; finished work lands on the target branch one merge at a time.

    \b
    council run council.yaml    run the tasks of a file
    council status              how the newest run stands
    council resume              go on with what a crash or Ctrl-C cut off
    council logs TASK -f        what a task's session does
    council retry TASK          try again what failed

    Exit codes: 0 all landed or done, 1 some did not, 2 bad input, 3 our fault (the log is named), 130 interrupted.
    """


if __name__ == "__main__":
    main(prog_name="council")
