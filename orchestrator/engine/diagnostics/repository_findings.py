"""Check that a run can work in a repository, as at the start of a run."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Awaitable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.config.model import RunConfig
from orchestrator.domain.sessions.shell_commands import is_of_environment, make_chmod_hint
from orchestrator.domain.settings.run_settings import WorktreeSettings
from orchestrator.domain.wording import join_names
from orchestrator.engine.diagnostics.facts import RepositorySize, measure_repository
from orchestrator.engine.diagnostics.findings import Finding, Level, check_project_folder, refusal_finding
from orchestrator.engine.diagnostics.preflight import check_branches, check_checkout
from orchestrator.engine.worktree_sources import BaseCommit, check_worktree_sources
from orchestrator.errors import GitError, RefusedError
from orchestrator.project import Project, council_home, not_in_repository_error
from orchestrator.repo.git.command import Git, printable_name
from orchestrator.repo.source.compatibility import check_complete_clone, check_supported
from orchestrator.repo.source.run_repository import RunRepository, find_base_branch, find_run_repository, list_branches
from orchestrator.repo.source.user_checkouts import LocalRepository, refuse_tracked_project_folder
from orchestrator.repo.source.user_programs import SKIPPED_HOOKS_REASON, find_hooks_in_checkouts

_REMOTE_TIMEOUT = 20.0  # seconds for a server to answer
#: Placeholder for the branch that a run creates if the file has no target.
_OWN_TARGET = "council/run"
_MOST_NAMED = 3  # files
_NOT_EXECUTABLE = "100644 "  # the mode of an entry


@dataclass(frozen=True, slots=True)
class RepositoryInspection:
    """Findings, the root of the checkout (None: no checkout), and the repository size.

    `site` is its location; None if unknown. The size is None if irrelevant.
    """

    findings: list[Finding]
    top: Path | None = None
    size: RepositorySize | None = None
    site: RunRepository | None = None


async def inspect_repository(run: RunConfig | None, folder: Path, environ: Mapping[str, str]) -> RepositoryInspection:
    """Inspect the repository of a run, or the repository that contains `folder`."""
    if run is not None and run.is_url:
        site = await find_run_repository(run.repo, is_url=True, environ=environ)
        return RepositoryInspection([await _inspect_remote(run, environ)], site=site)
    try:
        site = await find_run_repository(str(folder) if run is None else run.repo, is_url=False, environ=environ)
    except RefusedError as error:
        no_repository = not_in_repository_error(folder) if run is None else None
        return RepositoryInspection([refusal_finding("repository", no_repository or error)])
    return await _inspect_site(site, site.repository, run, environ) if site.repository else RepositoryInspection([])


async def _inspect_site(
    site: RunRepository, repository: LocalRepository, run: RunConfig | None, environ: Mapping[str, str]
) -> RepositoryInspection:
    users = Git(None, as_user=True, environ=environ)
    whole = await _finding_of("repository", site.location, check_complete_clone(repository, users))
    base = await find_base_branch(repository, users) if run is None else run.base
    target = (None if run is None else run.target) or _OWN_TARGET
    source = site.source(Git(None, environ=environ))
    branches = await _finding_of(
        "base", printable_name(f"tasks start from {base}"), check_branches(source, base or "main", target)
    )
    found, size = [whole, branches], None
    if whole.level is Level.OK and branches.level is Level.OK:
        commit = (await list_branches(repository, users))[base or "main"]
        git = Git(repository.git_dir, as_user=True, environ=environ)
        found.append(
            await _finding_of(
                "content", "no submodules, no git LFS, no unsupported file names", check_supported(git, commit)
            )
        )
        if run is not None and run.worktrees != WorktreeSettings():
            sources = check_worktree_sources(
                run.worktrees, BaseCommit(run.base, commit, git), repository, [council_home(environ)]
            )
            found.append(await _finding_of("worktrees", "all required files and folders exist", sources))
        with suppress(GitError):
            size = await measure_repository(git, commit)
    if run is not None and run.target is not None:
        clean = check_checkout(repository, run.target, environ)
        found.append(await _finding_of("target", printable_name(f"tasks can land on {run.target}"), clean))
    if hooks := await find_hooks_in_checkouts(repository, users):
        named = printable_name(", ".join(str(hook) for hook in hooks[:_MOST_NAMED]))
        message, _, remedy = SKIPPED_HOOKS_REASON.partition(": ")
        found.append(Finding("hooks", Level.WARNING, f"landings do not run the hooks in {named}: {message}", remedy))
    if repository.top is not None:
        found.append(await _inspect_project_folder(Project(repository.top), users, environ))
    return RepositoryInspection(found, repository.top, size, site)


async def _inspect_remote(run: RunConfig, environ: Mapping[str, str]) -> Finding:
    git = Git(None, as_user=True, environ=environ)
    try:
        heads = ("ls-remote", "--refs", "--exit-code", "--", run.repo, f"refs/heads/{run.base}")
        done = await git(*heads, ok=(0, 2), limit=_REMOTE_TIMEOUT)
    except GitError as error:
        remedy = "check `repo`, your access and the network"
        return Finding("repository", Level.PROBLEM, f"{run.repo} can't be read: {error.stderr}", remedy)
    if done.returncode:
        return Finding(
            "repository", Level.PROBLEM, f"{run.repo} has no branch {run.base!r}", "set `base` to an existing branch"
        )
    return Finding("repository", Level.OK, f"{run.repo} can be read, and has {run.base!r}")


async def check_referenced_files(
    run: RunConfig,
    words: Iterable[str],
    scripts: Iterable[str],
    programs: Iterable[str],
    top: Path,
    environ: Mapping[str, str],
) -> list[Finding]:
    """Return warnings about files that the base lacks, and about programs that are not executable there.

    Checked are all `scripts`, and those of `words` and `programs` that are files in the checkout.
    """
    provided = (*run.worktrees.copied, *run.worktrees.linked)
    executed = {posixpath.normpath(program) for program in programs}
    there, absent = await anyio.to_thread.run_sync(_files_of, [*words, *executed], scripts, top, provided)
    absent = [] if run.worktrees.setup else absent  # setup may create them
    git = Git(None, as_user=True, environ=environ)
    try:
        committed = await git.entries(run.base, {*there, *absent}, top)
    except GitError:
        return []  # problems with the base are reported separately
    missing = [file for file in (*there, *absent) if file not in committed]
    ignored = await ignored_in(top, missing, environ)
    commit = "commit the files that adapters and checks need: sessions see only committed files"
    provide = "list them under `worktrees.copy`, or create them in `worktrees.setup`"
    found = []
    for files, where, remedy in (
        (set(there) - ignored, "in your checkout, but not in", commit),
        (set(absent) - ignored, "neither in your checkout nor in", "create and commit them, or correct `argv`"),
        (ignored, "ignored by git, and not in", provide),
    ):
        if named := [printable_name(file) for file in missing if file in files]:
            message = f"{join_names(named, _MOST_NAMED)}: {where} {run.base}, where sessions start"
            found.append(Finding("files", Level.WARNING, message, remedy))
    for file in sorted(executed & committed.keys()):
        if committed[file].startswith(_NOT_EXECUTABLE):
            message = f"{printable_name(file)} is not executable in {run.base}, where sessions start"
            found.append(Finding("files", Level.WARNING, message, make_chmod_hint(file)))
    return found


async def ignored_in(top: Path, paths: Iterable[str], environ: Mapping[str, str]) -> set[str]:
    """Return the paths in a checkout that git ignores."""
    inside = [path for path in map(os.path.normpath, paths) if not path.startswith("..")]
    try:
        return await Git(None, as_user=True, environ=environ).ignored(inside, top)
    except GitError:  # problems with the repository are reported separately
        return set()


def _files_of(
    words: Iterable[str], scripts: Iterable[str], top: Path, provided: Collection[str]
) -> tuple[list[str], list[str]]:
    """Return the words that are files in a checkout, and the missing scripts. Blocks."""

    def relative(names: Iterable[str]) -> list[str]:
        paths = dict.fromkeys(os.path.normpath(name) for name in names if name and not name.startswith(("/", "-")))
        inside = (path for path in paths if not path.startswith(".."))
        return [
            one for one in inside if not is_generated(top, one) and not any(covers(given, one) for given in provided)
        ]

    # A word may be a whole prompt: unlike Path.is_file, this returns False for names that are too long or contain NUL.
    there = [word for word in relative(words) if os.path.isfile(top / word)]  # noqa: PTH113  see above
    return there, [path for path in relative(scripts) if not os.path.lexists(top / path)]


def is_generated(top: Path, path: str) -> bool:
    """Return True if a file is in a generated environment, which is never committed.

    Blocks.
    """
    folders = [top / parent for parent in Path(path).parents][:-1]
    # Unlike Path.exists, this returns False for names that are too long or contain NUL.
    return is_of_environment(path) or any(os.path.exists(folder / "pyvenv.cfg") for folder in folders)  # noqa: PTH110


def covers(folder: str, path: str) -> bool:
    """Return True if `path` is `folder` or inside it."""
    return path == folder or path.startswith(f"{folder}/")


async def _finding_of(name: str, found: str, check: Awaitable[object]) -> Finding:
    try:
        await check
    except RefusedError as error:
        return refusal_finding(name, error)
    except GitError as error:
        return Finding(name, Level.PROBLEM, str(error), "check that `git status` works in the repository")
    return Finding(name, Level.OK, found)


async def _inspect_project_folder(project: Project, git: Git, environ: Mapping[str, str]) -> Finding:
    try:
        await anyio.to_thread.run_sync(project.check)
        await refuse_tracked_project_folder(project, environ)
    except RefusedError as error:
        return refusal_finding(".council", error)
    ignored = await git("check-ignore", "--quiet", f"{project.folder.name}/", cwd=project.top, ok=(0, 1, 128))
    exists = await anyio.to_thread.run_sync(project.folder.exists)
    return check_project_folder(exists=exists, is_ignored=not ignored.returncode)
