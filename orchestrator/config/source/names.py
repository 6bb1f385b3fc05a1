"""The rules for ids, branch names, paths and repository locations. Each check returns its text or raises ValueError."""

from __future__ import annotations

import re
from typing import Final

from orchestrator.config.source.problems import quote_text
from orchestrator.domain.scheduling.path_patterns import split_path

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
_PATH: Final = r"^(?:(?!(?:\.\.?|\.[gG][iI][tT])(?:/|$))[^{}]+(?:/|$))+$(?!\n)"
PATH_PATTERN: Final = _PATH.replace("{}", r"/\\\x00-\x1f\x7f")
KEPT_PATTERN: Final = _PATH.replace("{}", r"/\\*?\[\x00-\x1f\x7f")
_NOT_IN_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_WILDCARD = re.compile(r"[*?\[]")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SCHEMES: Final = ("https", "http", "ssh", "git", "file")


def check_name(text: str) -> str:
    """Accept an id of a task or adapter: it becomes a part of git refs and of folder names."""
    if not _NAME.fullmatch(text) or ".." in text or text.endswith((".", ".lock")):
        raise ValueError(f"{quote_text(text)} can't be a name: {_NAME_REMEDY}")
    return text


def check_branch(text: str) -> str:
    """Accept the name of a branch, by the rules of git-check-ref-format(1)."""
    fault = _branch_fault(text)
    if fault:
        raise ValueError(
            f"{quote_text(text)} can't be a branch, {fault}: write a branch's name, as in main or team/work"
        )
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


def check_path(text: str) -> str:
    """Return a path below the top of a repository, without a slash at its end."""
    control = _CONTROL.search(text)
    if control:
        raise ValueError(f"the path holds the character {control[0]!r}: remove it, or give the file another name")
    segments = split_path(text)
    if any(segment.casefold() == ".git" for segment in segments):
        raise ValueError(f"{quote_text(text)} is what git itself works with: name another path")
    return "/".join(segments)


def check_kept_path(text: str) -> str:
    """Return the name of what is anywhere in a repository, or a path as `check_path` does; neither has wildcards."""
    wildcard = _WILDCARD.search(text)
    if wildcard:
        raise ValueError(f"{quote_text(text)} has the wildcard {wildcard[0]!r}: write a name, or a path from the top")
    return check_path(text)


def check_repo(text: str) -> str:
    """Accept a path, a URL of a scheme that git speaks by itself, or `host:path`."""
    if not text.strip() or _CONTROL.search(text):
        raise ValueError(f"{quote_text(text)} can't be a repository: write a path or a URL")
    # git would take the first as an option, and run a program for the second.
    if text.startswith("-") or "::" in text.partition("/")[0]:
        raise ValueError(f"{quote_text(text)} can't be a repository: write ./ before a path that begins like this")
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() not in _SCHEMES:
        raise ValueError(f"{quote_text(text)} can't be a repository: write a path or a URL of {', '.join(_SCHEMES)}")
    return text


def is_url(repo: str) -> bool:
    """Tell a URL or `host:path` from a path, as git does: by a colon before the first slash."""
    return ":" in repo.partition("/")[0]
