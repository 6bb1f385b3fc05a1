"""The rules for ids, branch names and repository locations. Each check returns its text or raises ValueError."""

from __future__ import annotations

import re
from typing import Final

from orchestrator.config.problems import shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAME_REMEDY: Final = (
    "use up to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit, "
    "without '..' and not ending in '.' or '.lock'"
)
# For JSON Schema, which knows searches only (json-schema.org, "Regular Expressions"): the same rules as one expression.
NAME_PATTERN: Final = rf"^(?!.*\.\.)(?!.*\.(?:lock)?$){_NAME.pattern}$"
BRANCH_PATTERN: Final = (
    r"^(?!-|/|refs/|(?:HEAD|@)$)(?!.*(?:\.\.|@\{|//|[/.]$))(?!(?:.*/)?\.)(?!.*\.lock(?:/|$))"
    r"[^\x00-\x20\x7f~^:?*\[\\]+$"
)
_NOT_IN_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SCHEMES: Final = ("https", "http", "ssh", "git", "file")


def check_name(text: str) -> str:
    """Accept an id of a task or adapter: it becomes a part of git refs and of folder names."""
    if not _NAME.fullmatch(text) or ".." in text or text.endswith((".", ".lock")):
        raise ValueError(f"{shown(text)} can't be a name: {_NAME_REMEDY}")
    return text


def check_branch(text: str) -> str:
    """Accept the name of a branch, by the rules of git-check-ref-format(1)."""
    fault = _branch_fault(text)
    if fault:
        raise ValueError(f"{shown(text)} can't be a branch, {fault}: write a branch's name, as in main or team/work")
    return text


def _branch_fault(text: str) -> str | None:
    forbidden = _NOT_IN_BRANCH.search(text)
    if forbidden:
        return f"it contains {forbidden[0]!r}"
    for part in ("..", "@{", "//"):
        if part in text:
            return f"it contains {part!r}"
    if text in {"", "@", "HEAD"}:
        return "git keeps that word for itself" if text else "it is empty"
    if text.startswith(("-", "/", "refs/")):
        return f"it begins with {'refs/' if text.startswith('refs/') else text[0]!r}"
    if text.endswith(("/", ".")):
        return f"it ends with {text[-1]!r}"
    if any(part.startswith(".") or part.endswith(".lock") for part in text.split("/")):
        return "a part of it begins with '.' or ends with '.lock'"
    return None


def check_repo(text: str) -> str:
    """Accept a path, a URL of a scheme that git speaks by itself, or `host:path`."""
    if not text.strip() or any(ord(character) < 0x20 or character == "\x7f" for character in text):
        raise ValueError(f"{shown(text)} can't be a repository: write a path or a URL")
    # git would take the first as an option, and run a program for the second.
    if text.startswith("-") or "::" in text.partition("/")[0]:
        raise ValueError(f"{shown(text)} can't be a repository: write ./ before a path that begins like this")
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() not in _SCHEMES:
        raise ValueError(f"{shown(text)} can't be a repository: write a path or a URL of {', '.join(_SCHEMES)}")
    return text


def is_url(repo: str) -> bool:
    """Tell a URL or `host:path` from a path, as git does: by a colon before the first slash."""
    return ":" in repo.partition("/")[0]
