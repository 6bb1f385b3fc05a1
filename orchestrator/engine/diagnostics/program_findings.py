"""Check that the programs of checks and setup are visible in the sandbox."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import anyio.to_thread

from orchestrator.config.model import RunConfig
from orchestrator.domain.sessions.shell_commands import (
    find_programs,
    is_in_worktree,
    make_chmod_hint,
    make_lookup_command,
    may_create,
)
from orchestrator.engine.diagnostics.findings import Finding, Level
from orchestrator.engine.diagnostics.repository_findings import covers, ignored_in, is_generated
from orchestrator.engine.diagnostics.sandbox_probe import SandboxProbe
from orchestrator.errors import GitError
from orchestrator.repo.git.command import Git, printable_name

_EXECUTABLE: Final = "100755"
_TITLE: Final = "programs"


class _Command(NamedTuple):
    """The kind and text of a command in the file, and its environment variable names."""

    kind: str
    text: str
    env: tuple[str, ...]
    may_fail: bool = False
    """Whether the command may fail on the base: then a task may add its program to the worktree."""


def list_commands(run: RunConfig) -> list[_Command]:
    """Return the setup and check commands of a run, without duplicates."""
    trees = run.worktrees
    found = [_Command("setup", step.run, trees.env) for step in trees.setup]
    found += [_Command("before_run", one, trees.env) for one in trees.before_run]
    must_pass = {check for task in run.tasks if not task.allow_failing_base for check in task.check_commands}
    found += [
        _Command("check", one, task.checks_env, one not in must_pass)
        for task in run.tasks
        for one in task.check_commands
    ]
    return list(dict.fromkeys(found))


async def check_command_programs(
    run: RunConfig, top: Path | None, probe: SandboxProbe, environ: Mapping[str, str]
) -> list[Finding]:
    """Return problems with programs of checks and setup, or one positive finding."""
    commands = list_commands(run)
    if not commands:
        return []
    by_env: dict[tuple[str, ...], set[str]] = {}
    for one in commands:
        by_env.setdefault(one.env, set()).update(name for name in find_programs(one.text) if not is_in_worktree(name))
    there = {
        env: await probe.find_succeeding([make_lookup_command(name) for name in names], env)
        for env, names in by_env.items()
    }
    names = [name for one in commands for name in _in_worktree(one)]
    files = await _committed(run, top, names, environ)
    ignored = set() if top is None else await ignored_in(top, names, environ)

    def check_files() -> list[Finding | None]:
        absent = [
            (one, name)
            for one in commands
            for name in find_programs(one.text)
            if not is_in_worktree(name) and make_lookup_command(name) not in there[one.env]
        ]
        found: list[Finding | None] = [_missing_program(one, name, probe, top) for one, name in absent]
        return found + [
            _check_file(run, one, name, files, top, ignored) for one in commands for name in _in_worktree(one)
        ]

    found = [one for one in await anyio.to_thread.run_sync(check_files) if one is not None]
    return found or [Finding(_TITLE, Level.OK, "programs of checks and setup are available in the sandbox")]


def _in_worktree(command: _Command) -> list[str]:
    """Return the programs of a command that are paths in the worktree."""
    names = find_programs(command.text)
    return [] if "cd" in names or "pushd" in names else [name for name in names if is_in_worktree(name)]


async def _committed(
    run: RunConfig, top: Path | None, names: Iterable[str], environ: Mapping[str, str]
) -> Mapping[str, str]:
    """Return the modes of files in the base, by path; missing files are omitted."""
    if top is None:
        return {}
    git = Git(None, as_user=True, environ=environ)
    try:
        entries = await git.entries(run.base, set(map(os.path.normpath, names)), top)
    except GitError:  # problems with the base are reported separately
        return {}
    return {path: entry.split()[0] for path, entry in entries.items()}


def _missing_program(command: _Command, name: str, probe: SandboxProbe, top: Path | None) -> Finding:
    searched, hidden = probe.explain_missing_program(name, command.env)
    message = f"{_describe_command(command)}: program {name!r} not found in the sandbox{searched}"
    local = next((one for one in (".venv", "venv", "node_modules/.bin") if _has(top, one, name)), None)
    if local is not None:
        folder = local if local.startswith("node") else f"{local}/bin"
        remedy = f"create {local.split('/')[0]} in `worktrees.setup`, and call it as {folder}/{name}: {_ONLY_COMMITTED}"
    elif hidden:
        remedy = f"add {', '.join(hidden)} to `readable`, or install it elsewhere"
    else:
        remedy = "install it, or create it in `worktrees.setup` and call it by its path in the worktree"
    return Finding(_TITLE, Level.PROBLEM, printable_name(message), printable_name(remedy))


_ONLY_COMMITTED: Final = "worktrees contain only committed files"


def _has(top: Path | None, folder: str, name: str) -> bool:
    if "/" in name:
        return False
    inner = folder if folder.startswith("node") else f"{folder}/bin"
    return top is not None and os.path.lexists(top / inner / name)


def _check_file(
    run: RunConfig,
    command: _Command,
    name: str,
    files: Mapping[str, str],
    top: Path | None,
    ignored: Collection[str],
) -> Finding | None:
    path = os.path.normpath(name)
    if path in files:
        if files[path] == _EXECUTABLE:
            return None
        message = f"{_describe_command(command)}: {name} is not executable in {run.base}"
        return Finding(_TITLE, Level.PROBLEM, printable_name(message), make_chmod_hint(path))
    trees = run.worktrees
    is_provided = any(covers(one, path) for one in (*trees.copied, *trees.linked))
    if trees.setup or (is_provided and command.kind != "setup"):
        return None
    message = f"{_describe_command(command)}: {name} is not in {run.base}, and no `setup` creates it"
    is_of_tools = is_generated(top or Path(), path)
    is_uncommitted = is_of_tools or path in ignored
    if command.may_fail and (not is_uncommitted or may_create(command.text, name)):
        return Finding(_TITLE, Level.WARNING, printable_name(message), "commit it, unless a task adds it")
    remedy = f"create it in `worktrees.setup`: {_ONLY_COMMITTED}"
    if is_uncommitted and not is_of_tools:
        remedy = f"list it under `worktrees.copy`, or {remedy}"
    if not is_uncommitted and top is not None and os.path.lexists(top / path):
        remedy = "commit it"
    return Finding(_TITLE, Level.PROBLEM, printable_name(message), remedy)


def _describe_command(command: _Command) -> str:
    line = " ".join(command.text.split())
    return f"{command.kind} `{line if len(line) <= 60 else f'{line[:60]}…'}`"
