"""Validate ids, branches, paths and repositories; raise ValueError if invalid."""

from __future__ import annotations

import re
from typing import Final

from orchestrator.domain.settings.path_patterns import split_path
from orchestrator.domain.wording import quote_text
from orchestrator.errors import InvalidValue

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAME_REMEDY: Final = (
    "use up to 64 ASCII letters, digits, '.', '_' and '-', starting with a letter or digit, "
    "without '..' and not ending in '.' or '.lock'"
)
# For JSON Schema, which only supports searches (json-schema.org, "Regular Expressions"): the same rules.
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
_PASSWORD = re.compile(r"[^/@:]*:[^/]+@")
_SCHEMES: Final = ("https", "http", "ssh", "git", "file")


#: Between the name of an adapter and that of one of its accounts; names contain none.
_ACCOUNT_SEPARATOR: Final = "@"


def account_adapter_name(entry: str, account: str) -> str:
    """Return the name of the adapter of an account, such as `claude@work`."""
    return f"{entry}{_ACCOUNT_SEPARATOR}{account}"


def entry_of_adapter(adapter: str) -> str:
    """Return the name of an adapter without its account, if any."""
    return adapter.partition(_ACCOUNT_SEPARATOR)[0]


def check_name(text: str) -> str:
    """Validate a task or adapter id, which is used in git refs and folder names."""
    if not _NAME.fullmatch(text) or ".." in text or text.endswith((".", ".lock")):
        raise InvalidValue(f"{quote_text(text)} can't be a name", _NAME_REMEDY)
    return text


def check_branch(text: str) -> str:
    """Validate a branch name by the rules of git-check-ref-format(1)."""
    fault = _branch_fault(text)
    if fault:
        raise InvalidValue(
            f"{quote_text(text)} can't be a branch, {fault}", "write a branch name, such as main or team/work"
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
        return "git reserves this name" if text else "it is empty"
    if text.startswith(("-", "/", "refs/")):
        return f"it starts with {'refs/' if text.startswith('refs/') else text[0]!r}"
    if text.endswith(("/", ".")):
        return f"it ends with {text[-1]!r}"
    if any(part.startswith(".") or part.endswith(".lock") for part in text.split("/")):
        return "a component starts with '.' or ends with '.lock'"
    return None


def check_path(text: str) -> str:
    """Validate a path in a repository; return it without a trailing slash."""
    control = _CONTROL.search(text)
    if control:
        raise InvalidValue(f"the path contains the character {control[0]!r}", "remove it, or rename the file")
    segments = split_path(text)
    if any(segment.casefold() == ".git" for segment in segments):
        raise InvalidValue(f"{quote_text(text)} is inside git's own folder", "use another path")
    return "/".join(segments)


def check_kept_path(text: str) -> str:
    """Validate a file name at any depth, or a path, both without wildcards."""
    wildcard = _WILDCARD.search(text)
    if wildcard:
        raise InvalidValue(
            f"{quote_text(text)} has the wildcard {wildcard[0]!r}",
            "write a name, or a path from the root of the repository",
        )
    return check_path(text)


def check_repo(text: str) -> str:
    """Validate a repository: a path, a URL with git's own scheme, or `host:path`."""
    if not text.strip() or _CONTROL.search(text):
        raise InvalidValue(f"{quote_text(text)} can't be a repository", "write a path or a URL")
    # git would read the first as an option, and run a remote helper for the second.
    if text.startswith("-") or "::" in text.partition("/")[0]:
        raise InvalidValue(f"{quote_text(text)} can't be a repository", "prefix the path with ./")
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() not in _SCHEMES:
        raise InvalidValue(
            f"{quote_text(text)} can't be a repository", f"write a path or a URL of {', '.join(_SCHEMES)}"
        )
    if scheme and _PASSWORD.match(text, scheme.end()):  # the record of the run and lists of processes would show it
        remedy = "remove it: a credential helper of git gives it, such as that of `gh auth setup-git`"
        raise InvalidValue("the URL of the repository has a password", remedy)
    return text


def is_url(repo: str) -> bool:
    """Return whether a repository is remote by git's rules: a URL or `host:path`.

    In `host:path` the colon is before the first slash.
    """
    return ":" in repo.partition("/")[0]
