"""Generate council.yaml, and write it atomically without replacing a user's file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import randbelow

import anyio.to_thread

from orchestrator.config.load import load_config
from orchestrator.domain.sessions.shell_commands import find_programs, make_lookup_command
from orchestrator.domain.settings.names import check_name
from orchestrator.domain.wording import find_similar
from orchestrator.engine.diagnostics.programs import AdapterStatus, make_default_adapters, probe_adapters
from orchestrator.engine.diagnostics.sandbox_probe import DEFAULT_SANDBOX, SandboxProbe
from orchestrator.engine.diagnostics.test_detection import RepositoryTests, detect_tests, read_top_level
from orchestrator.errors import ConfigError, RefusedError, to_unusable_error
from orchestrator.project import Project, exclude_from_git, not_in_repository_error
from orchestrator.protocols import AdapterType
from orchestrator.repo.git.command import Git, check_version, split_nul
from orchestrator.repo.source.run_repository import RunRepository, find_base_branch, find_run_repository
from orchestrator.repo.source.user_checkouts import refuse_tracked_project_folder
from orchestrator.system.files import atomic_write

#: The adapter type that runs any program; the user fills in its options.
COMMAND_ADAPTER = "command"


@dataclass(frozen=True, slots=True)
class InitRepository:
    """The root of the checkout, the git directory, and the base branch."""

    site: RunRepository
    top: Path
    git_dir: Path
    base: str


async def find_init_repository(folder: Path, environ: Mapping[str, str]) -> InitRepository:
    """Return the repository of a folder; raise RefusedError if no run can work there."""
    try:
        site = await find_run_repository(str(folder), is_url=False, environ=environ)
        repository = site.repository
    except RefusedError:
        await check_version(environ)
        if (no_repository := await anyio.to_thread.run_sync(not_in_repository_error, folder)) is None:
            raise
        raise no_repository from None
    if repository is None or repository.top is None:
        raise RefusedError(f"{folder} is in a bare repository, which has no files", "cd to a checkout of it")
    base = await find_base_branch(repository, Git(None, as_user=True, environ=environ))
    if base is None:
        message = f"{repository.top} has no commits yet"
        raise RefusedError(message, "create a first commit: sessions start from it")
    return InitRepository(site, repository.top, repository.git_dir, base)


async def find_usable_tests(ground: InitRepository, environ: Mapping[str, str]) -> RepositoryTests | None:
    """Return the base's best test command, preferably one that works in the sandbox."""
    git = Git(None, as_user=True, environ=environ)
    committed = set(split_nul((await git("ls-tree", "-z", "--name-only", ground.base, cwd=ground.top)).stdout))
    top = await anyio.to_thread.run_sync(read_top_level, ground.top)
    best = detect_tests({name: text for name, text in top.items() if name.partition("/")[0] in committed})
    if best is None:
        return None
    project = Project(ground.top)
    probe = await SandboxProbe.open(DEFAULT_SANDBOX, ground.site, project, [project.state_folder], environ)
    if probe is None:  # without a sandbox no run can start; `council doctor` reports that
        return best
    needs = {number: required_programs(way) for number, way in enumerate(best.alternatives)}
    questions = list(dict.fromkeys(question for asked in needs.values() for question in asked.values()))
    there = await probe.find_succeeding(questions)
    missing = [[name for name, one in needs[number].items() if one not in there] for number in needs]
    found = next((number for number, names in enumerate(missing) if not names), 0)
    return replace(best.alternatives[found], missing=tuple(missing[found]))


def required_programs(tests: RepositoryTests) -> dict[str, str]:
    """Return the requirements of a test command, each with a shell command as a test."""
    environment = tests.environment
    commands = [tests.command, *([] if environment is None else [environment.setup])]
    names = [name for command in commands for name in find_programs(command) if "/" not in name]
    asked = {name: make_lookup_command(name) for name in names}
    return asked | {one: one for one in (*tests.needs, *(() if environment is None else environment.needs))}


async def find_adapters(
    types: Mapping[str, AdapterType], wanted: str | None, environ: Mapping[str, str]
) -> dict[str, AdapterStatus]:
    """Return the adapter types that work without options, best first.

    If `wanted` is given, only this type, else types with installed programs. Raises RefusedError if `wanted` is unknown
    or needs options.
    """
    made, needs = await anyio.to_thread.run_sync(make_default_adapters, types)
    if wanted is not None:
        if wanted == COMMAND_ADAPTER:
            return {}
        _check_wanted(wanted, made, needs)
        return await probe_adapters({wanted: made[wanted]}, environ)
    statuses = await probe_adapters({name: one for name, one in made.items() if _is_name(name)}, environ)
    found = {name: status for name, status in statuses.items() if status.is_installed}
    return dict(sorted(found.items(), key=lambda one: _rank(one[1])))


def _check_wanted(wanted: str, made: Mapping[str, object], needs: Mapping[str, str]) -> None:
    if wanted in needs:
        remedy = f"omit --adapter, and add the entry with `use: {wanted}` yourself"
        raise RefusedError(f"the adapter type {wanted!r} {needs[wanted]}", remedy)
    if wanted not in made:
        known = sorted({*made, COMMAND_ADAPTER})
        names = ", ".join(find_similar(wanted, known) or known)
        raise RefusedError(f"there is no adapter type {wanted!r}", f"use one of: {names}")


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except ValueError:
        return False
    return True


def _rank(status: AdapterStatus) -> tuple[bool, int]:
    """Return a sort key: verified programs that edit files first; then by readiness.

    The order is ready, unknown, not logged in.
    """
    # A program with an unsupported version may be another one of the same name.
    is_unsure = any(not one.edits or one.verified == () or one.is_supported is False for one in status.programs)
    readiness = {program.ready for program in status.programs}
    return is_unsure, 2 if False in readiness else 1 if None in readiness else 0


async def write_schema(ground: InitRepository, text: str, environ: Mapping[str, str]) -> Path | None:
    """Write a git-ignored JSON Schema for editors; return None if that fails."""
    project = Project(ground.top)
    try:
        await refuse_tracked_project_folder(project, environ)
        return await anyio.to_thread.run_sync(_write_schema, project, ground.git_dir, text)
    except (RefusedError, OSError):
        return None


def _write_schema(project: Project, git_dir: Path, text: str) -> Path:
    project.check()
    exclude_from_git(git_dir)
    project.create()
    path = project.folder / "schema.json"
    atomic_write(path, text)
    return path


def check_can_write(path: Path, *, force: bool) -> None:
    """Raise RefusedError if the file exists (unless `force`) or its folder is missing.

    Blocks.
    """
    if not path.parent.is_dir():
        raise RefusedError(f"there is no folder {path.parent}", "create it first")
    if path.is_dir():
        raise RefusedError(f"{path} is a folder", "use the path of a file")
    if os.path.lexists(path) and not force:
        raise RefusedError(f"{path} already exists", "replace it with --force, or use another file")


def write_file(path: Path, text: str, types: Mapping[str, AdapterType], *, force: bool) -> None:
    """Write a file atomically; raise RefusedError if `load_config` rejects it.

    Blocks.
    """
    try:
        staged = _stage(path, text)
    except OSError as error:
        remedy = "make its folder writable, or use another file"
        raise to_unusable_error(error, f"{path} is not writable", remedy) from None
    try:
        load_config(staged, types)
        _publish(staged, path, force=force)
    except ConfigError as error:
        problem = error.problems[0]
        raise RefusedError(f"the file would be invalid there: {problem.message}", problem.remedy) from None
    finally:
        with suppress(FileNotFoundError):
            staged.unlink()


def _publish(staged: Path, path: Path, *, force: bool) -> None:
    if not force:
        try:
            # A rename would replace a file that another process has created in the meantime.
            path.hardlink_to(staged)
        except OSError:  # the file exists, or the file system has no hard links
            check_can_write(path, force=False)
        else:
            return
    staged.replace(path)


def _stage(path: Path, text: str) -> Path:
    """Write a temporary file in the folder of `path`, to be renamed later."""
    staged = path.with_name(f".council-{randbelow(10**12)}.new")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return staged
