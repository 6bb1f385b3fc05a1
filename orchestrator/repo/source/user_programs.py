"""Find hooks and filter drivers in the user's checkouts that a landing would run.

A landing writes files into a checkout and must not run any of them: a hook or filter written by an agent would run as
the user, unsandboxed and unreviewed. Hooks outside the checkouts do run.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio.to_thread

from orchestrator.repo.git.command import Git, printable_name, split_nul
from orchestrator.repo.source.checkout_update import MARK_VARIABLE, UPDATED_VARIABLE, run_hook
from orchestrator.repo.source.user_checkouts import LocalRepository, list_checkouts
from orchestrator.system.files import atomic_write
from orchestrator.system.process import internal_program

#: The hook that updates a checkout for a push (githooks(5)).
UPDATE_HOOK: Final = "push-to-checkout"
#: The file in the hooks folder that our hook creates after updating a checkout.
UPDATED_FILE: Final = "updated"
#: The hook that runs after the ref has moved. It unlocks the indexes, then calls the user's hook.
_RELEASE_HOOK: Final = "post-receive"
_RELEASE: Final = f"""#!/bin/sh
for lock in "$GIT_DIR"/index.lock "$GIT_DIR"/worktrees/*/index.lock; do
    if [ -f "$lock" ] && read -r mark <"$lock" && [ "$mark" = "${MARK_VARIABLE}" ]; then rm -f "$lock"; fi
done
"""
# Closes all descriptors; a portable shell can't name descriptors above 9.
_CLOSE: Final = "import os, sys; os.closerange(3, os.sysconf('SC_OPEN_MAX')); os.execv(sys.argv[1], sys.argv[1:])"
#: The hooks that a push can run in the receiving repository (githooks(5)).
_RUN_BY_PUSH: Final = (
    "pre-receive", "update", "post-receive", "post-update", "reference-transaction", UPDATE_HOOK,
    "proc-receive", "post-index-change",
)  # fmt: skip
#: References to the checkout's root in a shell command.
_TOP: Final = re.compile(r"show-toplevel|\$\{?(?:PWD|GIT_WORK_TREE)\b")
_MAX_LINKS: Final = 40
_FILTER: Final = re.compile(r"filter\..*\.(clean|smudge|process)", re.DOTALL)
#: Settings that name a program which the user's git runs by itself. Landings skip hooks in a checkout and report them.
_PROGRAM: Final = re.compile(
    r"core\.(fsmonitor|sshcommand|askpass|pager|editor|gitproxy)|sequence\.editor|gpg\.(.*\.)?program|credential\.(.*\.)?helper"
    r"|diff\.external|diff\..*\.(textconv|command)|merge\..*\.driver|interactive\.difffilter|pager\..*|alias\..*",
    re.DOTALL,
)
_SEPARATORS: Final = ";|&"
#: Syntax that runs commands inside an argument or after a newline. If present, all words are examined.
_SUBSHELL: Final = re.compile(r"[`\n\r]|[$<>]\s*\(|\$'")
#: Programs that never execute files named in their arguments.
_INERT: Final = frozenset({"cat", "cut", "expand", "fold", "grep", "head", "rev", "tail", "tr", "unexpand"})
#: The words before a sed script, and a script that only replaces text (runs no command, writes no file).
_BEFORE_SCRIPTS: Final = frozenset({"sed", "-e", "-n", "-E", "-r", "-u", "-z", "--posix"})
_SED_SCRIPT: Final = re.compile(r"[sy]([/|,:#@!])(?:(?!\1)[^\\\n]|\\.)*\1(?:(?!\1)[^\\\n]|\\.)*\1[gIip0-9]*")
#: A word that may name a script or a module, and programs that read instructions from files with fixed names.
_PLAIN: Final = re.compile(r"[\w.+-]*\w[\w.+-]*")
_MAKE: Final = frozenset({"make", "gmake"})
_MAKEFILES: Final = ("GNUmakefile", "makefile", "Makefile")
_INCLUDE: Final = re.compile(r"include\.path|includeif\..*\.path", re.DOTALL)
#: Why a landing skips hooks, for messages.
SKIPPED_HOOKS_REASON: Final = (
    "they are in a checkout, where agents' work lands; to run them, move them out of the repository"
)


async def find_hooks_in_checkouts(repository: LocalRepository, git: Git) -> list[Path]:
    """Return the hooks, existing or not, in checkouts that a landing would run.

    For a hooks folder inside a checkout, returns only the folder. `git` runs with the user's configuration.
    """
    inside, _ = await _classify_hooks(repository, git, None)
    return inside


async def write_landing_hooks(repository: LocalRepository, git: Git, folder: Path, checkout: Path | None) -> None:
    """Fill a push's hooks folder with calls to the user's hooks outside checkouts.

    If the user has no hook that updates a checkout, ours is used, even without a checkout, because the user may switch
    to the branch during the push.
    """
    _, outside = await _classify_hooks(repository, git, checkout)
    program, _ = internal_program(run_hook.__module__, run_hook.__name__)
    update = f'#!/bin/sh\nexport {UPDATED_VARIABLE}="${{0%/*}}/{UPDATED_FILE}"\nexec {shlex.join(program)} "$@"\n'
    calls = {UPDATE_HOOK: update, _RELEASE_HOOK: _RELEASE} | {hook.name: _call(hook) for hook in outside}
    await anyio.to_thread.run_sync(_write_hooks, folder, calls)


def _call(hook: Path) -> str:
    """Return a script that runs a user's hook.

    Hooks that may start a daemon don't inherit our locks. The hook that updates a checkout does, because it may outlive
    every process that could wait for it.
    """
    command = [] if hook.name == UPDATE_HOOK else [sys.executable, "-I", "-S", "-c", _CLOSE]
    before = _RELEASE if hook.name == _RELEASE_HOOK else "#!/bin/sh\n"
    return f'{before}exec {shlex.join([*command, str(hook)])} "$@"\n'


async def _classify_hooks(
    repository: LocalRepository, git: Git, checkout: Path | None
) -> tuple[list[Path], list[Path]]:
    """Return the hooks inside the repository's checkouts, and the hooks outside."""
    folders = dict.fromkeys((repository.folder, *([checkout] if checkout is not None else [])))
    configured = [value for folder in folders for value in [await _hooks_path(git, folder)] if value is not None]
    return await anyio.to_thread.run_sync(_sort_hooks, repository, configured, len(configured) == len(folders))


async def _hooks_path(git: Git, folder: Path) -> str | None:
    """Return the user's `core.hooksPath` with `~` expanded; None if it is not set."""
    command = ("config", "--null", "--show-scope", "--type=path", "--get-all", "core.hooksPath")
    fields = split_nul((await git(*command, cwd=folder, ok=(0, 1))).stdout)
    # The last value applies; values with scope `command` are ours.
    values = [value for scope, value in zip(fields[::2], fields[1::2], strict=False) if scope != "command"]
    return values[-1] if values else None


def _sort_hooks(
    repository: LocalRepository,
    configured: Sequence[str],
    everywhere: bool,
) -> tuple[list[Path], list[Path]]:
    tops, git_dir = list_checkouts(repository), repository.git_dir.resolve()
    # Git resolves a relative path from the folder in which the hook runs: the git directory or the checkout.
    folders = [Path(base, value) for value in configured for base in (git_dir, *tops)]
    folders += [] if everywhere else [git_dir / "hooks"]
    inside: dict[Path, None] = {}
    outside: dict[str, Path] = {}
    for folder in dict.fromkeys(folders):
        if passes_through_checkout(folder, tops, git_dir):
            inside[folder] = None
            continue
        for name in _RUN_BY_PUSH:
            hook = folder / name
            if passes_through_checkout(hook, tops, git_dir):
                inside[hook] = None
            elif os.access(hook, os.X_OK):
                outside.setdefault(name, hook)
    # A relative path names a folder in each checkout; missing folders need not be reported.
    existing = [path for path in inside if os.path.lexists(path)]
    return existing or list(inside), list(outside.values())


def passes_through_checkout(path: Path, tops: Sequence[Path], git_dir: Path) -> bool:
    """Return whether resolving a path visits anything inside a checkout. Blocks."""
    return any(
        any(at != top and at.is_relative_to(top) for top in tops) and not at.is_relative_to(git_dir)
        for at in _path_components(path)
    )


def _path_components(path: Path) -> Iterator[Path]:
    """Yield each file and folder that path resolution visits, including missing ones."""
    ahead, at, links = list(reversed(path.absolute().parts[1:])), Path("/"), 0
    while ahead and links <= _MAX_LINKS:
        part = ahead.pop()
        if part == "..":
            at = at.parent
            continue
        at /= part
        yield at
        with suppress(OSError):
            target = at.readlink()
            links += 1
            at = Path("/") if target.is_absolute() else at.parent
            ahead += reversed([part for part in target.parts if part != "/"])


def _write_hooks(folder: Path, scripts: Mapping[str, str]) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in scripts:
            path.unlink()
    for name, script in scripts.items():
        atomic_write(folder / name, script, mode=0o700)


@dataclass(frozen=True, slots=True)
class GitSetting:
    """An entry of the user's git configuration: file (or None), key and value."""

    file: Path | None
    key: str
    value: str


async def read_git_config(git: Git, checkout: Path) -> list[GitSetting]:
    """Return the user's configuration as git reads it, including included files."""
    done = await git("config", "--null", "--show-origin", "--list", cwd=checkout, ok=(0, 1))
    fields = split_nul(done.stdout)
    settings = []
    for origin, entry in zip(fields[::2], fields[1::2], strict=False):
        kind, _, path = origin.partition(":")
        key, _, value = entry.partition("\n")
        settings.append(GitSetting(checkout / path if kind == "file" else None, key, value))
    return settings


async def find_unsafe_filter(
    repository: LocalRepository, checkout: Path, configuration: Sequence[GitSetting]
) -> tuple[str, str] | None:
    """Return a filter that runs a file in a checkout as (problem, remedy), or None.

    To write files, a landing would run the landed version of that file. Indirect calls, such as a wrapper on PATH that
    runs a file in the current folder, can't be detected.
    """
    commands = [(setting.key, setting.value) for setting in configuration if _FILTER.fullmatch(setting.key)]
    unsafe = await anyio.to_thread.run_sync(_find_first_inside, repository, checkout, commands) if commands else None
    if unsafe is None:
        return None
    key, command = unsafe
    program = f"`{printable_name(command)}` ({printable_name(key)})"
    return (
        f"landings would make git run {program}, which agents can change",
        "move it out of the repository, or land on a branch that is not checked out",
    )


async def find_path_controlling_git(
    repository: LocalRepository, git: Git, checkout: Path, configuration: Sequence[GitSetting], changed: Sequence[str]
) -> str | None:
    """Return the first changed path that decides what the user's git runs, or None.

    Such a path is a configuration file that git reads, or would read if it existed or an include condition were true; a
    file that a setting names as a program; or a link in the path of one. A change to it can choose what the user's next
    git command runs.
    """
    files = await _configuration_files(repository, git, configuration)
    return await anyio.to_thread.run_sync(_find_controlling_path, repository, checkout, files, configuration, changed)


async def _configuration_files(repository: LocalRepository, git: Git, configuration: Sequence[GitSetting]) -> set[Path]:
    read = {setting.file for setting in configuration if setting.file is not None}
    standard = await anyio.to_thread.run_sync(lambda: list(_standard_files(git, repository)))
    waiting = [*(file for file in standard if file not in read), *_includes(configuration)]
    while waiting:
        file = waiting.pop()
        if file in read:
            continue
        read.add(file)
        if await anyio.Path(file).is_file():
            command = ("config", "--null", "--no-includes", "--list", "--file", str(file))
            done = await git(*command, cwd=repository.folder, ok=(0, 1, 128))
            entries = [entry.partition("\n") for entry in split_nul(done.stdout)]
            waiting += _includes([GitSetting(file, key, value) for key, _, value in entries])
    return read


def _includes(settings: Iterable[GitSetting]) -> list[Path]:
    includes = ((setting.file, setting.value) for setting in settings if _INCLUDE.fullmatch(setting.key))
    return [file.parent / Path(value).expanduser() for file, value in includes if file is not None]


def _find_controlling_path(
    repository: LocalRepository,
    checkout: Path,
    files: Collection[Path],
    configuration: Sequence[GitSetting],
    changed: Sequence[str],
) -> str | None:
    top, git_dir = checkout.resolve(), repository.git_dir.resolve()
    programs = [
        path
        for setting in configuration
        if _PROGRAM.fullmatch(setting.key) or _FILTER.fullmatch(setting.key)
        for path in (*_paths_in(setting.value, checkout), *_plain_paths_in(setting.value, checkout))
    ]
    controlling = {
        at.relative_to(top).as_posix()
        for file in (*files, *programs)
        for at in _path_components(file)
        if at != top and at.is_relative_to(top) and not at.is_relative_to(git_dir)
    }
    return next((path for path in changed if path in controlling), None)


def _standard_files(git: Git, repository: LocalRepository) -> Iterator[Path]:
    """Yield the standard configuration files, existing or not (git-config(1), FILES)."""
    environ = git.environ
    yield from (repository.git_dir / name for name in ("config", "config.worktree"))
    yield from repository.git_dir.glob("worktrees/*/config.worktree")
    yield from (Path(environ[name]) for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM") if environ.get(name))
    if home := environ.get("HOME"):
        yield from (Path(home, ".gitconfig"), Path(home, ".config/git/config"))
    if folder := environ.get("XDG_CONFIG_HOME"):
        yield Path(folder, "git/config")


def _find_first_inside(
    repository: LocalRepository, checkout: Path, commands: Sequence[tuple[str, str]]
) -> tuple[str, str] | None:
    tops, git_dir = list_checkouts(repository), repository.git_dir.resolve()
    for key, command in commands:
        if _TOP.search(command) or any(
            passes_through_checkout(path, tops, git_dir)
            for path in (*_paths_in(command, checkout), *filter(os.path.lexists, _plain_paths_in(command, checkout)))
        ):
            return key, command
    return None


def _paths_in(command: str, checkout: Path) -> Iterator[Path]:
    """Yield the words of a shell command that look like paths, below the checkout."""
    for number, word in enumerate(_words_in(command.removeprefix("!"))):
        name = word.partition("=")[2] if word.startswith("-") else word
        if "/" in name or (number and re.search(r"\w\.\w+$", name)):
            yield checkout / Path(name).expanduser()


def _plain_paths_in(command: str, checkout: Path) -> Iterator[Path]:
    """Yield the paths, below the checkout, of the files that other words of a shell command may name.

    These are scripts (`sh fmt`), modules (`python -m fmt`) and the files of make.
    """
    for number, word in enumerate(_words_in(command.removeprefix("!"))):
        name = word.lstrip("<")
        if Path(name).name in _MAKE:
            yield from (checkout / makefile for makefile in _MAKEFILES)
        elif number and name and not name.startswith("-") and _PLAIN.fullmatch(name):
            module = name.replace(".", "/")
            yield from (checkout / path for path in (name, f"{module}.py", f"{module}/__main__.py"))


def _words_in(command: str) -> Iterator[str]:
    """Yield the words of a shell command that may name a program or script."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=_SEPARATORS)
    lexer.whitespace_split, lexer.commenters = True, ""
    is_plain, program, before = _SUBSHELL.search(command) is None, "", ""
    try:
        words = list(lexer)
    except ValueError:
        words, is_plain = re.split(rf"[\s{_SEPARATORS}]+", command), False
    for word in words:
        if set(word) <= {*_SEPARATORS}:
            program = before = ""
            continue
        is_script = program == "sed" and before in _BEFORE_SCRIPTS and _SED_SCRIPT.fullmatch(word)
        if not (is_plain and (program in _INERT or is_script)):
            yield word
        program, before = program or word, word
