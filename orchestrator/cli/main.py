"""The `council` command line. Imports each command on first use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click

from orchestrator.cli.core.group import LazyGroup
from orchestrator.cli.streams import usable_streams
from orchestrator.client.commands import SESSION_COMMANDS

#: The exit code after an interruption, as in `core.error_boundary`, which is slow to import.
_EXIT_INTERRUPTED = 130


#: All commands by section, in the order of `--help`: the location of each in `orchestrator.cli.commands`, as
#: `module:name`, and its summary; a test compares it with the command's own.
COMMANDS_BY_SECTION: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "Run": {
        "run": ("runs.run:run_file", "Run the tasks of a file, or a prompt, and land their work."),
        "resume": ("runs.run:resume", "Resume an interrupted run."),
        "merge": ("runs.run:merge", "Land queued work, and merge the run's own branch into its base."),
        "work": ("runs.run:work", "Join active runs as an additional worker."),
    },
    "Set up": {
        "init": ("setup.init:init", "Write a council.yaml for this repository."),
        "validate": ("setup.validate:validate", "Report every error in a file, without running it."),
        "doctor": ("setup.doctor:doctor", "Check that this repository is ready to run, and suggest fixes."),
        "adapters": ("setup.adapters:adapters", "List installed adapters with their programs, versions and logins."),
        "workflow": ("setup.workflow:workflow", "Show workflows, or copy one to edit it."),
        "schema": ("setup.schema:schema", "Print the JSON Schema of the file, for editors."),
        "completion": ("setup.completion:completion", "Print a completion script for SHELL."),
    },
    "Inspect": {
        "status": ("runs.status:status", "Show the state of a run, also as the exit code."),
        "show": ("runs.show:show", "Show a task in full: phases, sessions, handoffs, cost, landing."),
        "watch": ("runs.watch:watch", "Show an active run until it ends; Ctrl-C ends only the display."),
        "runs": ("runs.status:runs", "List the runs of this project, oldest first."),
        "usage": ("runs.usage:usage", "Show time, tokens and cost of a run, by adapter and by task."),
        "logs": ("runs.logs:logs", "Show the log of a task's session."),
        "diff": ("runs.tasks:diff", "Show a task's changes, including those of a running session."),
        "check": ("runs.check:check", "Verify a run's workflow records."),
        "checks": ("state.checks:checks", "List or delete recorded results of checks."),
        "state": ("state.state:state", "Inspect and maintain the recorded state, now and in the past."),
        "conflicts": (
            "runs.status:conflicts",
            "List predicted merge conflicts between the running sessions of a run.",
        ),
        "queue": ("runs.queue:queue", "Show the merge queue of a run, and why each task waits."),
        "sync": ("runs.sync:sync", "Show the states of a run's tasks in its trackers, and read the requests there."),
        "serve-webhooks": (
            "runs.webhooks:serve_webhooks",
            "Let active runs read boards and pull requests as soon as a forge reports a change.",
        ),
        "locks": ("state.locks:locks", "List locks with their holders, times and waiters."),
        "where": ("runs.status:where", "Print the locations of the state, the logs and the repositories."),
    },
    "In a session": {
        **{
            one.typed[0]: (f"sessions.session:{name}", one.help)
            for name, one in SESSION_COMMANDS.items()
            if not one.is_for_all
        },
        "slot": ("sessions.session:slot", "Run a heavy command of this session in a slot for checks."),
        "share": ("sessions.share:share", "Share values between the sessions of a run."),
        "mcp": ("sessions.mcp:mcp", "Serve the session commands as Model Context Protocol tools."),
    },
    "Control": {
        "cancel": ("runs.tasks:cancel", "Cancel tasks; without TASK, all unfinished ones."),
        "retry": ("runs.tasks:retry", "Retry terminal tasks that have not landed."),
        "tell": ("runs.tasks:tell", "Send a message to the agents of a task."),
        "attach": ("runs.tasks:attach", "Open the conversation of a task in this terminal."),
        "approve": ("runs.tasks:approve", "Approve the result of a phase, so that its task continues."),
        "reject": ("runs.tasks:reject", "Reject the result of a phase, and repeat the phase."),
        "task": ("runs.tasks:task", "Exclude tasks from further attempts."),
        "salvage": ("runs.salvage:salvage", "List, apply or drop unmerged work."),
        "checkpoint": ("state.checkpoint:checkpoint", "Save and restore checkpoints of a run."),
        "clean": ("state.clean:clean", "Remove leftovers of runs that nothing needs."),
    },
}


class CouncilGroup(LazyGroup):
    """The group of all commands; shows their help without importing them."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command with usable standard streams and an absolute PATH."""
        path = os.environ.get("PATH")
        if path is not None:  # a relative entry would be a folder of the repository, where agents can write
            os.environ["PATH"] = os.pathsep.join(one for one in path.split(os.pathsep) if one.startswith("/"))
        with usable_streams():
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; if it is interrupted before it starts, exit as the command would."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would exit with 1
            click.echo("council: interrupted", err=True)
            ctx.exit(_EXIT_INTERRUPTED)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  click's signature
        """Write the commands under their headings."""
        for heading, entries in COMMANDS_BY_SECTION.items():
            with formatter.section(heading):
                formatter.write_dl([(name, summary) for name, (_, summary) in entries.items()])


@click.group(
    cls=CouncilGroup,
    locations={name: place for entries in COMMANDS_BY_SECTION.values() for name, (place, _) in entries.items()},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="cli-council", prog_name="council")
def main() -> None:
    """Run AI coding CLIs in parallel on one git repository.

    Each session works in its own worktree. Finished work is merged, checked and landed on the target branch.

    \b
    council init                write a council.yaml for this repository
    council run                 run its tasks
    council run "fix the bug"   run one task without a file
    council status              show the state of the newest run
    council resume              resume it after a crash or Ctrl-C
    council logs TASK -f        follow the log of a task's session
    council retry TASK          retry a failed task

    Exit codes: 0 all landed or done, 1 some did not, 2 bad input, 3 internal error (prints the path of the log), 130
    interrupted.
    """


if __name__ == "__main__":
    main(prog_name="council")
