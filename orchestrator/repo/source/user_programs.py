"""Programs in the user's checkouts that git would run on a landing: hooks, and drivers of filters.

A landing writes the files of a checkout, so it must not run any of them: a hook or a filter that an agent has written
would run as the user, without a sandbox, before anybody has seen it. Hooks outside of the checkouts do run.
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
from orchestrator.repo.source.user_checkouts import LocalRepository, list_checkouts

#: The hook that updates a checkout for a push (githooks(5)).
UPDATE_HOOK: Final = "push-to-checkout"
#: The variable by which a landing hands it the commit that the target was at; empty where it did not exist.
OLD_COMMIT_VARIABLE: Final = "COUNCIL_OLD_COMMIT"
#: The file by which that hook says, in its own folder, that it has updated a checkout.
UPDATED_FILE: Final = "updated"
#: The variables with the ref that is to be moved, and with what a lock of ours on an index has as its content.
TARGET_VARIABLE: Final = "COUNCIL_TARGET"
MARK_VARIABLE: Final = "COUNCIL_MARK"
# As git does it without a hook, but for two things. `read-tree` gets both commits, and so leaves alone in index and
# files what they have in common: git's own makes all like the new commit, which takes out what the user has committed
# since the push began. And the index stays locked until the ref is moved (`_RELEASE`): what is staged meanwhile, but on
# no branch yet, would be part of the user's next commit, and who switches branches would take it along.
_UPDATE: Final = f"""#!/bin/sh
refuse() {{
    echo "$1" >&2
    rm -f "$new" "$GIT_DIR/index.lock"
    exit 1
}}
new=$GIT_DIR/index.${MARK_VARIABLE}
(set -C && : >"$GIT_DIR/index.lock") 2>/dev/null || {{
    echo "its index is locked by another git command" >&2
    exit 1
}}
# Not in one step: on a full disk the lock would be there, and nothing in it would show that it is ours.
echo "${MARK_VARIABLE}" >"$GIT_DIR/index.lock" || refuse "its index can't be locked"
read -r head <"$GIT_DIR/HEAD"
[ "$head" = "ref: ${TARGET_VARIABLE}" ] || [ "$(git symbolic-ref -q HEAD)" = "${TARGET_VARIABLE}" ] ||
    refuse "another branch was checked out meanwhile"
[ ! -e "$new.lock" ] || rm -f "$new.lock"
[ ! -e "$GIT_DIR/index" ] || cp -p "$GIT_DIR/index" "$new" || refuse "its index can't be copied"
export GIT_INDEX_FILE="$new"
old=${{{OLD_COMMIT_VARIABLE}:-$(git hash-object -t tree --stdin </dev/null)}}
git update-index -q --ignore-submodules --refresh
git diff-files --quiet --ignore-submodules -- && git diff-index --quiet --cached --ignore-submodules "$old" -- ||
    refuse "the checkout has changes"
git read-tree -u -m "$old" "$1" && mv "$new" "$GIT_DIR/index" && : >"${{0%/*}}/{UPDATED_FILE}"
"""
#: The hook that runs when the ref has been moved, and what it does before the user's own is called: it unlocks indexes.
_RELEASE_HOOK: Final = "post-receive"
_RELEASE: Final = f"""#!/bin/sh
for lock in "$GIT_DIR"/index.lock "$GIT_DIR"/worktrees/*/index.lock; do
    if [ -f "$lock" ] && read -r mark <"$lock" && [ "$mark" = "${MARK_VARIABLE}" ]; then rm -f "$lock"; fi
done
"""
# What a shell can't say of a descriptor above 9.
_CLOSE: Final = "import os, sys; os.closerange(3, os.sysconf('SC_OPEN_MAX')); os.execv(sys.argv[1], sys.argv[1:])"
#: The hooks that a push into a repository can run there (githooks(5)).
_RUN_BY_PUSH: Final = (
    "pre-receive", "update", "post-receive", "post-update", "reference-transaction", UPDATE_HOOK,
    "proc-receive", "post-index-change",
)  # fmt: skip
#: What stands in a shell command for the top of the checkout.
_TOP: Final = re.compile(r"show-toplevel|\$\{?(?:PWD|GIT_WORK_TREE)\b")
_MAX_LINKS: Final = 40
_FILTER: Final = re.compile(r"filter\..*\.(clean|smudge|process)", re.DOTALL)
#: What names a program that the user's git runs by itself. Hooks in a checkout are left out of landings and named.
_PROGRAM: Final = re.compile(
    r"core\.(fsmonitor|sshcommand|askpass|pager|editor|gitproxy)|sequence\.editor|gpg\.(.*\.)?program|credential\.(.*\.)?helper"
    r"|diff\.external|diff\..*\.(textconv|command)|merge\..*\.driver|interactive\.difffilter|pager\..*|alias\..*",
    re.DOTALL,
)
_SEPARATORS: Final = ";|&"
#: What runs commands inside of an argument or after a line: then all words are looked at.
_SUBSHELL: Final = re.compile(r"[`\n\r]|[$<>]\s*\(|\$'")
#: Programs that execute nothing of what their arguments name.
_INERT: Final = frozenset({"cat", "cut", "expand", "fold", "grep", "head", "rev", "tail", "tr", "unexpand"})
#: Words before a script of sed, and a script that only replaces text: it runs no command and writes no file.
_BEFORE_SCRIPTS: Final = frozenset({"sed", "-e", "-n", "-E", "-r", "-u", "-z", "--posix"})
_SED_SCRIPT: Final = re.compile(r"[sy]([/|,:#@!])(?:(?!\1)[^\\\n]|\\.)*\1(?:(?!\1)[^\\\n]|\\.)*\1[gIip0-9]*")
_INCLUDE: Final = re.compile(r"include\.path|includeif\..*\.path", re.DOTALL)
#: Why a landing leaves hooks out, for people.
SKIPPED_HOOKS_REASON: Final = (
    "they are in a checkout, where agents' work lands: move them out of the repository to have them run"
)


async def find_hooks_in_checkouts(repository: LocalRepository, git: Git, checkout: Path | None = None) -> list[Path]:
    """Return the hooks inside the repository's checkouts that a landing would run, whether they exist yet or not.

    Of a folder of hooks inside of a checkout that is the folder alone. `git` runs at the user's side.
    """
    inside, _ = await _classify_hooks(repository, git, checkout)
    return inside


async def write_landing_hooks(repository: LocalRepository, git: Git, folder: Path, checkout: Path | None) -> None:
    """Fill the folder of hooks that a push is to use with calls of the user's that are outside of the checkouts.

    Where the user has no hook that updates a checkout there is ours, also without one: the user may switch to the
    branch while the push is under way.
    """
    _, outside = await _classify_hooks(repository, git, checkout)
    calls = {UPDATE_HOOK: _UPDATE, _RELEASE_HOOK: _RELEASE} | {hook.name: _call(hook) for hook in outside}
    await anyio.to_thread.run_sync(_write_hooks, folder, calls)


def _call(hook: Path) -> str:
    """Return a script that runs a hook of the user's; one that may leave a daemon behind does not get our locks.

    The hook that updates a checkout keeps them: it may outlive all that could wait for its end.
    """
    command = [] if hook.name == UPDATE_HOOK else [sys.executable, "-I", "-S", "-c", _CLOSE]
    before = _RELEASE if hook.name == _RELEASE_HOOK else "#!/bin/sh\n"
    return f'{before}exec {shlex.join([*command, str(hook)])} "$@"\n'


async def _classify_hooks(
    repository: LocalRepository, git: Git, checkout: Path | None
) -> tuple[list[Path], list[Path]]:
    """Return the hooks inside the repository's checkouts, and those outside."""
    places = dict.fromkeys((repository.folder, *([checkout] if checkout is not None else [])))
    configured = [value for place in places for value in [await _hooks_path(git, place)] if value is not None]
    return await anyio.to_thread.run_sync(_sort_hooks, repository, configured, len(configured) == len(places))


async def _hooks_path(git: Git, folder: Path) -> str | None:
    """Return `core.hooksPath` of the user's configuration with `~` expanded; None if it is not set."""
    asked = ("config", "--null", "--show-scope", "--type=path", "--get-all", "core.hooksPath")
    fields = split_nul((await git(*asked, cwd=folder, ok=(0, 1))).stdout)
    # The last one counts, and those of the scope `command` are ours.
    values = [value for scope, value in zip(fields[::2], fields[1::2], strict=False) if scope != "command"]
    return values[-1] if values else None


def _sort_hooks(
    repository: LocalRepository,
    configured: Sequence[str],
    everywhere: bool,
) -> tuple[list[Path], list[Path]]:
    tops, git_dir = list_checkouts(repository), repository.git_dir.resolve()
    # Git takes a relative path as one from the folder in which the hook runs: the git directory or the checkout.
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
    # A relative path names a folder in each checkout: of those that are not there nothing need be said.
    there = [path for path in inside if os.path.lexists(path)]
    return there or list(inside), list(outside.values())


def passes_through_checkout(path: Path, tops: Sequence[Path], git_dir: Path) -> bool:
    """Whether the way to a path, along all of its links, has a file or folder inside one of the checkouts. Blocks."""
    return any(
        any(at != top and at.is_relative_to(top) for top in tops) and not at.is_relative_to(git_dir)
        for at in _path_components(path)
    )


def _path_components(path: Path) -> Iterator[Path]:
    """Yield each file and folder that the system looks at on the way to a path; what is not there counts, too."""
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
            ahead += reversed([one for one in target.parts if one != "/"])


def _write_hooks(folder: Path, scripts: Mapping[str, str]) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in scripts:
            path.unlink()
    for name, script in scripts.items():
        staged = folder / f"{name}.new"
        staged.write_text(script)
        staged.chmod(0o700)
        staged.replace(folder / name)


@dataclass(frozen=True, slots=True)
class GitSetting:
    """An entry of the user's configuration: the file that it is in (None: none), its key and its value."""

    file: Path | None
    key: str
    value: str


async def read_git_config(git: Git, checkout: Path) -> list[GitSetting]:
    """Return the user's configuration as git reads it in a checkout, with the files that it includes."""
    done = await git("config", "--null", "--show-origin", "--list", cwd=checkout, ok=(0, 1))
    fields = split_nul(done.stdout)
    found = []
    for origin, entry in zip(fields[::2], fields[1::2], strict=False):
        kind, _, path = origin.partition(":")
        key, _, value = entry.partition("\n")
        found.append(GitSetting(checkout / path if kind == "file" else None, key, value))
    return found


async def find_unsafe_filter(
    repository: LocalRepository, checkout: Path, configuration: Sequence[GitSetting]
) -> tuple[str, str] | None:
    """Return what is wrong and what to do where a filter of the user's configuration runs a file of a checkout.

    A landing would run it as it is after that, to write files. What a command reaches otherwise, such as by a wrapper
    on PATH that runs a file of the current folder, can't be seen.
    """
    commands = [(one.key, one.value) for one in configuration if _FILTER.fullmatch(one.key)]
    found = await anyio.to_thread.run_sync(_find_first_inside, repository, checkout, commands) if commands else None
    if found is None:
        return None
    key, command = found
    what = f"git would run `{printable_name(command)}` ({printable_name(key)}) on landings, a program that agents can change"
    return what, "move it out of the repository, or land on a branch that is not checked out"


async def find_path_controlling_git(
    repository: LocalRepository, git: Git, checkout: Path, configuration: Sequence[GitSetting], changed: Sequence[str]
) -> str | None:
    """Return the first of some paths of a checkout that decides what the user's git runs; None if none does.

    That is a file that git reads its configuration from or would if it were there or the condition of an include were
    true, a file that a setting names as a program, or a link on the way to one. Whoever changes it chooses what the
    user's next git command runs.
    """
    files = await _configuration_files(repository, git, configuration)
    return await anyio.to_thread.run_sync(_find_controlling_path, repository, checkout, files, configuration, changed)


async def _configuration_files(repository: LocalRepository, git: Git, configuration: Sequence[GitSetting]) -> set[Path]:
    read = {one.file for one in configuration if one.file is not None}
    standard = await anyio.to_thread.run_sync(lambda: list(_standard_files(git, repository)))
    waiting = [*(one for one in standard if one not in read), *_includes(configuration)]
    while waiting:
        file = waiting.pop()
        if file in read:
            continue
        read.add(file)
        if await anyio.Path(file).is_file():
            asked = ("config", "--null", "--no-includes", "--list", "--file", str(file))
            done = await git(*asked, cwd=repository.folder, ok=(0, 1, 128))
            entries = [entry.partition("\n") for entry in split_nul(done.stdout)]
            waiting += _includes([GitSetting(file, key, value) for key, _, value in entries])
    return read


def _includes(settings: Iterable[GitSetting]) -> list[Path]:
    found = (one for one in settings if one.file is not None and _INCLUDE.fullmatch(one.key))
    return [one.file.parent / Path(one.value).expanduser() for one in found if one.file is not None]


def _find_controlling_path(
    repository: LocalRepository,
    checkout: Path,
    files: Collection[Path],
    configuration: Sequence[GitSetting],
    changed: Sequence[str],
) -> str | None:
    top, git_dir = checkout.resolve(), repository.git_dir.resolve()
    programs = [path for one in configuration if _PROGRAM.fullmatch(one.key) for path in _paths_in(one.value, checkout)]
    on_the_way = {
        at.relative_to(top).as_posix()
        for file in (*files, *programs)
        for at in _path_components(file)
        if at != top and at.is_relative_to(top) and not at.is_relative_to(git_dir)
    }
    return next((one for one in changed if one in on_the_way), None)


def _standard_files(git: Git, repository: LocalRepository) -> Iterator[Path]:
    """Yield where git looks for configuration, whether there is any or not (git-config(1), FILES)."""
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
            passes_through_checkout(path, tops, git_dir) for path in _paths_in(command, checkout)
        ):
            return key, command
    return None


def _paths_in(command: str, checkout: Path) -> Iterator[Path]:
    """Yield the paths that a shell command names, as seen from the checkout: words with a slash or an ending."""
    for number, word in enumerate(_words_in(command.removeprefix("!"))):
        name = word.partition("=")[2] if word.startswith("-") else word
        if "/" in name or (number and re.search(r"\w\.\w+$", name)):
            yield checkout / Path(name).expanduser()


def _words_in(command: str) -> Iterator[str]:
    """Yield the words of a shell command, without arguments that are certain to name no program or script."""
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
