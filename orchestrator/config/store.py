"""Where state is kept, as users say it: by the URL of a store, whose scheme says which kind of store it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from orchestrator.config.source.problems import quote_text
from orchestrator.errors import RefusedError

#: The URL of the store that is gone with its process.
MEMORY: Final = "memory:"

# What editors know of it, too (RFC 3986, section 3.1); a single letter is a drive of Windows.
STORE_PATTERN: Final = r"^[a-z][a-z0-9+.-]+:"
_SCHEME = re.compile(STORE_PATTERN)


def check_store_url(url: str) -> str:
    """Accept the URL of a store; ValueError otherwise. Which schemes there are is for what is installed."""
    if not _SCHEME.match(url):
        raise ValueError(
            f"{quote_text(url)} is no URL of a store: write file:///a/folder or memory:, or name a folder under `state_dir`"
        )
    if scheme_of(url) == "file":
        store_folder(url)
    return url


def to_store_url(text: str) -> str:
    """Return the URL of a store that a person has named, by its URL or by the path of its folder."""
    return text if _SCHEME.match(text) or not text else folder_url(Path(text).expanduser().absolute())


def scheme_of(url: str) -> str:
    """Return what a store's URL begins with, without the colon."""
    return url.partition(":")[0]


def store_folder(url: str) -> Path | None:
    """Return the folder that a `file:` URL names (RFC 8089), None for another scheme.

    ValueError if it names none of this machine.
    """
    if scheme_of(url) != "file":
        return None
    try:
        parts = urlsplit(url)
    except ValueError:  # of a host that can't be
        parts = urlsplit("file://?")
    path = unquote(parts.path)
    if parts.netloc not in {"", "localhost"} or not path.startswith("/") or "\0" in path:
        raise ValueError(f"{quote_text(url)} names no folder of this machine: write file:///an/absolute/path")
    return Path(path)


def require_local_folder(url: str) -> Path | None:
    """Return the same for a URL that somebody has named; RefusedError if it names none of this machine."""
    try:
        return store_folder(url)
    except ValueError as error:
        what, _, remedy = str(error).partition(": write ")
        raise RefusedError(what, f"write {remedy}") from None


def folder_url(folder: Path) -> str:
    """Return the URL of the store in a folder, whose path is absolute."""
    return f"file://{quote(bytes(folder))}"
