"""Find the programs that shell commands call, and missing ones in messages."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Final

#: Exit codes of a shell if a program can't be executed, or was not found.
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127

_ASSIGNMENT: Final = re.compile(r"[A-Za-z_]\w*\+?=")
_PUNCTUATION: Final = "();<>|&"
_SEPARATING: Final = frozenset(";|&\n")
#: Shell keywords that are followed by a command.
_BEFORE_COMMANDS: Final = frozenset({"!", "if", "then", "elif", "else", "while", "until", "do", "exec", "time"})
#: Shell keywords that are not programs.
_GRAMMAR: Final = frozenset({"fi", "done", "esac", "for", "case", "function", "{", "}", "[["})
#: Functions, subshells, substitutions and here documents: then only the first word is inspected.
_BEYOND_WORDS: Final = re.compile(r"[(){}`]|<<")
#: Characters whose meaning depends on variables or files.
_EXPANDED: Final = re.compile(r"[$*?\[\]~]")
#: Programs that don't create other programs.
_HARMLESS: Final = frozenset(
    {":", "[", "cd", "echo", "env", "export", "nice", "nohup", "set", "test", "timeout", "true", "ulimit", "unset"}
)
#: Environment folders, which are never committed.
_ENVIRONMENTS: Final = frozenset({".nox", ".tox", ".venv", "node_modules", "venv"})
_INTERPRETER: Final = re.compile(r"(?:python|node|ruby|perl|php|(?:ba|da|k|z)?sh)[\d.]*")
#: A path without spaces and variables; no option.
_PATH: Final = re.compile(r"[\w./@+][\w./@+-]*")
#: Messages of shells and `env` for a program that can't run.
_MESSAGES: Final = (
    re.compile(r"^\S*sh(?:\[\d+\])?: (?:line )?\d+: (?:\S*sh: \d+: )?(?P<name>\S+): "
               r"(?:not found|command not found|No such file or directory|Permission denied)", re.MULTILINE),
    re.compile(r"^\S*sh: (?P<name>\S+): (?:not found|command not found|Permission denied)", re.MULTILINE),
    re.compile(r"^\S*sh:\d+: (?:command not found|permission denied|no such file or directory): (?P<name>\S+)",
               re.MULTILINE),
    re.compile(r"^\S*env: \W?(?P<name>[^\s:'\"\u2019]+)\W?: (?:No such file|Permission denied)", re.MULTILINE),
)  # fmt: skip


def is_not_runnable(exit_code: int | None) -> bool:
    """Return whether an exit code means that a program is missing or not executable."""
    return exit_code in {NOT_EXECUTABLE, NOT_FOUND}


def find_programs(command: str) -> list[str]:
    """Return the distinct programs that a shell command visibly calls."""
    text = command.replace("\\\n", " ")
    named = list(dict.fromkeys(_programs(text)))
    return named if _BEYOND_WORDS.search(text) is None else named[:1]


def is_in_worktree(program: str) -> bool:
    """Return whether a program is a path in the worktree, so that tasks may change it."""
    return "/" in program and not program.startswith("/")


def is_of_environment(path: str) -> bool:
    """Return whether a path is named like one in a virtual environment or similar."""
    return not _ENVIRONMENTS.isdisjoint(path.split("/")[:-1])


def may_create(command: str, program: str) -> bool:
    """Return whether a command may create a program before it runs it."""
    return not _HARMLESS.issuperset(find_programs(command.partition(program)[0]))


def find_script(argv: Sequence[str]) -> str | None:
    """Return the worktree file that a command runs, itself or by an interpreter."""
    program, *arguments = argv
    is_interpreter = _INTERPRETER.fullmatch(posixpath.basename(program)) is not None
    name = arguments[0] if is_interpreter and arguments else program
    return name if is_in_worktree(name) and _PATH.fullmatch(name) else None


def make_chmod_hint(path: str) -> str:
    """Return a hint on making a committed file executable."""
    return f"`chmod +x {shlex.quote(posixpath.normpath(path))}` and commit it"


def make_lookup_command(program: str) -> str:
    """Return a shell command that succeeds if a program can be found and opened.

    The program is a name or an absolute path. Under Landlock, files that can't be opened can still be found.
    """
    opened = 'case $found in /*) test ! -r "$found" || true <"$found";; esac'
    return f"found=$(command -v {shlex.quote(program)}) && {opened}"


def _programs(text: str) -> Iterator[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=f"{_PUNCTUATION}\n")
    lexer.whitespace = " \t\r"
    is_next = True
    try:
        for word in lexer:
            if set(word) <= _SEPARATING:
                is_next = True
            elif set(word) <= {*_PUNCTUATION}:
                continue
            elif is_next and not _ASSIGNMENT.match(word) and word not in _BEFORE_COMMANDS:
                is_next = False
                if word not in _GRAMMAR and not _EXPANDED.search(word):
                    yield word
    except ValueError:  # an unclosed quote
        return


def find_missing_program(output: str) -> str | None:
    """Return the program that a shell reports as missing or not executable, or None."""
    matches = [match for pattern in _MESSAGES for match in pattern.finditer(output)]
    return max(matches, key=lambda match: match.start())["name"] if matches else None
