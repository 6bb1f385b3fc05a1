"""Build the environment of sessions and checks from an allow list of variables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from orchestrator.protocols import SessionCommand
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.setup.handoff_file import HANDOFF_VARIABLE

#: The variables passed to every program; all others are named in the config.
BASE_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR")


def build_base_environment(
    names: Iterable[str], environ: Mapping[str, str], tree: Path, variables: Mapping[str, str]
) -> dict[str, str]:
    """Return the base variables, those in `names` that are set, and `variables`.

    `tree` is the program's checkout; `variables` identify the program and its worktree slot.
    """
    return {
        "PATH": os.defpath,
        **{name: environ[name] for name in (*BASE_VARIABLES, *names) if name in environ},
        # A program whose `.git` was removed must not find a repository in a parent folder.
        "GIT_CEILING_DIRECTORIES": str(tree.parent),
        **variables,
    }


def attempt_variables(worktree: Worktree) -> dict[str, str]:
    """Return the variables that identify an attempt to its programs."""
    return {
        "COUNCIL_RUN": worktree.run,
        "COUNCIL_TASK": worktree.task,
        "COUNCIL_ATTEMPT": str(worktree.attempt),
        **identifying_variables(worktree),
    }


def identifying_variables(worktree: Worktree) -> dict[str, str]:
    """Return the variable by which leftover processes are found, see `Worktree.marker`.

    Checks get no others of their attempt: their result must not depend on the task, because other tasks use it.
    """
    return {"COUNCIL_PROMPT_FILE": str(worktree.prompt_file)}


def build_session_environment(
    command: SessionCommand, environ: Mapping[str, str], worktree: Worktree, variables: Mapping[str, str]
) -> dict[str, str]:
    """Return the complete environment of a session.

    The adapter can't override the variables that we set. `variables` are those of the worktree slot.
    """
    own = {**variables, **attempt_variables(worktree), HANDOFF_VARIABLE: str(worktree.handoff_file)}
    base = build_base_environment((), environ, worktree.tree, own)
    ours = {name: value for name, value in base.items() if name.startswith("COUNCIL_")}
    return {**passed_variables(command, environ), **base, **command.env, **ours}


def passed_variables(command: SessionCommand, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the user's variables that a program gets, by their names there."""
    passed = {**dict(zip(command.pass_env, command.pass_env, strict=True)), **command.renamed_env}
    return {name: environ[source] for name, source in passed.items() if source in environ}
