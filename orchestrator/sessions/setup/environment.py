"""The environment that sessions and checks see: made from nothing, by names that are allowed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from orchestrator.protocols import SessionCommand
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.setup.handoff_file import HANDOFF_VARIABLE as HANDOFF

#: What every program needs to work at all; whatever else it sees is named in the config.
BASE_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR")


def build_base_environment(
    names: Iterable[str], environ: Mapping[str, str], tree: Path, variables: Mapping[str, str]
) -> dict[str, str]:
    """Return the base set and the variables of these names, as far as they are set, and what we set for each program.

    `tree` is the checkout that it works in, `variables` are those that tell it who and where it is.
    """
    return {
        "PATH": os.defpath,
        **{name: environ[name] for name in (*BASE_VARIABLES, *names) if name in environ},
        # A program whose `.git` is gone must not find a repository further up.
        "GIT_CEILING_DIRECTORIES": str(tree.parent),
        **variables,
    }


def attempt_variables(worktree: Worktree) -> dict[str, str]:
    """Return the variables that tell a program which attempt it is part of."""
    return {
        "COUNCIL_RUN": worktree.run,
        "COUNCIL_TASK": worktree.task,
        "COUNCIL_ATTEMPT": str(worktree.attempt),
        "COUNCIL_PROMPT_FILE": str(worktree.prompt_file),
    }


def build_session_environment(
    command: SessionCommand, environ: Mapping[str, str], worktree: Worktree, variables: Mapping[str, str]
) -> dict[str, str]:
    """Return all that a session sees of the environment; what the adapter sets can't replace what we set.

    `variables` are those of the place that it is in.
    """
    told = {**variables, **attempt_variables(worktree), HANDOFF: str(worktree.handoff_file)}
    base = build_base_environment(command.pass_env, environ, worktree.tree, told)
    ours = {name: value for name, value in base.items() if name.startswith("COUNCIL_")}
    return {**base, **command.env, **ours}
