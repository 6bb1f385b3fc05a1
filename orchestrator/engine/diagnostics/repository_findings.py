"""Whether a run could work in a repository: each look is the one that a run itself takes before it starts."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.config.model import RunConfig, WorktreesConfig
from orchestrator.domain.sessions.shell_commands import is_of_environment
from orchestrator.engine.diagnostics.facts import Size, measure
from orchestrator.engine.diagnostics.findings import Finding, Level, judge_folder, refused
from orchestrator.engine.diagnostics.preflight import check_branches, check_checkout
from orchestrator.engine.worktree_sources import Base, check_sources
from orchestrator.errors import GitError, RefusedError
from orchestrator.project import Project, council_home, outside
from orchestrator.repo.git.runner import Git, shown
from orchestrator.repo.source.branches import find_base, find_branches
from orchestrator.repo.source.checkout import LocalRepository, check_own
from orchestrator.repo.source.site import Site, find_site
from orchestrator.repo.source.supported import check_complete, check_supported
from orchestrator.repo.source.user_programs import WHY_SKIPPED, hooks_in_checkouts

_REACH = 20.0  # seconds for a server to answer
#: Stands for the branch that a run makes where the file names no target.
_OWN_TARGET = "council/run"
_MOST_NAMED = 3  # files


@dataclass(frozen=True, slots=True)
class Looked:
    """What was found of a repository: the top of its checkout (None: there is none), its size where it matters.

    `site` is where it is; None where that is not known.
    """

    findings: list[Finding]
    top: Path | None = None
    size: Size | None = None
    site: Site | None = None


async def look_at_repository(run: RunConfig | None, folder: Path, environ: Mapping[str, str]) -> Looked:
    """Look at the repository of a run, or without one at that of a folder."""
    if run is not None and run.is_url:
        site = await find_site(run.repo, is_url=True, environ=environ)
        return Looked([await _look_at_server(run, environ)], site=site)
    try:
        site = await find_site(str(folder) if run is None else run.repo, is_url=False, environ=environ)
    except RefusedError as error:
        no_repository = outside(folder) if run is None else None
        return Looked([refused("repository", no_repository or error)])
    return await _look_at_site(site, site.repository, run, environ) if site.repository else Looked([])


async def _look_at_site(
    site: Site, repository: LocalRepository, run: RunConfig | None, environ: Mapping[str, str]
) -> Looked:
    users = Git(None, users=True, environ=environ)
    whole = await _judged("repository", site.location, check_complete(repository, users))
    base = await find_base(repository, users) if run is None else run.base
    target = (None if run is None else run.target) or _OWN_TARGET
    source = site.source(Git(None, environ=environ))
    branches = await _judged("base", shown(f"work starts from {base}"), check_branches(source, base or "main", target))
    found, size = [whole, branches], None
    if whole.level is Level.OK and branches.level is Level.OK:
        commit = (await find_branches(repository, users))[base or "main"]
        git = Git(repository.git_dir, users=True, environ=environ)
        found.append(await _judged("content", "no submodules, no git LFS, no odd names", check_supported(git, commit)))
        if run is not None and run.worktrees != WorktreesConfig():
            sources = check_sources(run.worktrees, Base(run.base, commit, git), repository, [council_home(environ)])
            found.append(await _judged("worktrees", "what they are made of is there", sources))
        with suppress(GitError):
            size = await measure(git, commit)
    if run is not None and run.target is not None:
        clean = check_checkout(repository, run.target, environ)
        found.append(await _judged("target", shown(f"{run.target} can be landed on"), clean))
    if hooks := await hooks_in_checkouts(repository, users):
        named = shown(", ".join(str(hook) for hook in hooks[:_MOST_NAMED]))
        what, _, remedy = WHY_SKIPPED.partition(": ")
        found.append(Finding("hooks", Level.WARNING, f"landings do not run the hooks in {named}: {what}", remedy))
    if repository.top is not None:
        found.append(await _look_at_folder(Project(repository.top), users, environ))
    return Looked(found, repository.top, size, site)


async def _look_at_server(run: RunConfig, environ: Mapping[str, str]) -> Finding:
    git = Git(None, users=True, environ=environ)
    try:
        heads = ("ls-remote", "--refs", "--exit-code", "--", run.repo, f"refs/heads/{run.base}")
        done = await git(*heads, ok=(0, 2), limit=_REACH)
    except GitError as error:
        remedy = "check `repo`, your access and the network"
        return Finding("repository", Level.PROBLEM, f"{run.repo} can't be read: {error.stderr}", remedy)
    if done.returncode:
        return Finding(
            "repository", Level.PROBLEM, f"{run.repo} has no branch {run.base!r}", "set `base` to one that is"
        )
    return Finding("repository", Level.OK, f"{run.repo} can be read, and has {run.base!r}")


async def look_for_files(
    run: RunConfig, words: Iterable[str], scripts: Iterable[str], top: Path, environ: Mapping[str, str]
) -> list[Finding]:
    """Warn of files that no session sees, as the base has none: of `words` those in the checkout, and all `scripts`."""
    provided = (*run.worktrees.copied, *run.worktrees.linked)
    there, absent = await anyio.to_thread.run_sync(_files_of, words, scripts, top, provided)
    absent = [] if run.worktrees.setup else absent  # which may create them
    git = Git(None, users=True, environ=environ)
    try:
        committed = await git.entries(run.base, {*there, *absent}, top)
    except GitError:
        return []  # what is wrong with the base has been told
    missing = [file for file in (*there, *absent) if file not in committed]
    ignored = await ignored_in(top, missing, environ)
    commit = "commit what adapters and checks need: sessions see nothing else"
    provide = "name them under `worktrees.copy`, or create them by `worktrees.setup`"
    found = []
    for files, where, remedy in (
        (set(there) - ignored, "in your checkout, but not in", commit),
        (set(absent) - ignored, "neither in your checkout nor in", "create and commit them, or correct `argv`"),
        (ignored, "ignored by git, and not in", provide),
    ):
        if named := [shown(file) for file in missing if file in files]:
            rest = len(named) - _MOST_NAMED
            more = f" and {rest} more" if rest > 0 else ""
            what = f"{', '.join(named[:_MOST_NAMED])}{more}: {where} {run.base}, where sessions start"
            found.append(Finding("files", Level.WARNING, what, remedy))
    return found


async def ignored_in(top: Path, paths: Iterable[str], environ: Mapping[str, str]) -> set[str]:
    """Return those of the paths in a checkout that git ignores, so that nobody commits them."""
    inside = [path for path in map(os.path.normpath, paths) if not path.startswith("..")]
    try:
        return await Git(None, users=True, environ=environ).ignored(inside, top)
    except GitError:  # what is wrong with the repository is another finding
        return set()


def _files_of(
    words: Iterable[str], scripts: Iterable[str], top: Path, provided: Collection[str]
) -> tuple[list[str], list[str]]:
    """Return the files in a checkout that words name, and the scripts that are not there. Blocks."""

    def relative(names: Iterable[str]) -> list[str]:
        paths = dict.fromkeys(os.path.normpath(name) for name in names if name and not name.startswith(("/", "-")))
        inside = (path for path in paths if not path.startswith(".."))
        return [one for one in inside if not is_made(top, one) and not any(covers(given, one) for given in provided)]

    # A word may be a whole prompt: unlike Path.is_file this says no to what is too long for a name or holds a NUL.
    there = [word for word in relative(words) if os.path.isfile(top / word)]  # noqa: PTH113
    return there, [path for path in relative(scripts) if not os.path.lexists(top / path)]


def is_made(top: Path, path: str) -> bool:
    """Return whether a file belongs to an environment that tools create, which nobody commits. Blocks."""
    folders = [top / parent for parent in Path(path).parents][:-1]
    return is_of_environment(path) or any((folder / "pyvenv.cfg").exists() for folder in folders)


def covers(folder: str, path: str) -> bool:
    """Return whether a path is that of a folder, or in it."""
    return path == folder or path.startswith(f"{folder}/")


async def _judged(name: str, found: str, check: Awaitable[object]) -> Finding:
    try:
        await check
    except RefusedError as error:
        return refused(name, error)
    except GitError as error:
        return Finding(name, Level.PROBLEM, str(error), "see that git itself can work with the repository")
    return Finding(name, Level.OK, found)


async def _look_at_folder(project: Project, git: Git, environ: Mapping[str, str]) -> Finding:
    try:
        await anyio.to_thread.run_sync(project.check)
        await check_own(project, environ)
    except RefusedError as error:
        return refused(".council", error)
    ignored = await git("check-ignore", "--quiet", f"{project.folder.name}/", cwd=project.top, ok=(0, 1, 128))
    exists = await anyio.to_thread.run_sync(project.folder.exists)
    return judge_folder(exists=exists, is_ignored=not ignored.returncode)
