"""URLs of state stores; the scheme is the kind of store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from orchestrator.domain.wording import quote_text
from orchestrator.errors import InvalidValue, RefusedError

#: The URL of the in-memory store, which is lost at exit.
MEMORY: Final = "memory:"

# Also used in the JSON Schema (RFC 3986, section 3.1); a single letter is a Windows drive.
STORE_PATTERN: Final = r"^[a-z][a-z0-9+.-]+:"
_SCHEME = re.compile(STORE_PATTERN)


def check_store_url(url: str) -> str:
    """Return a store's URL; raise ValueError if invalid. Plugins may add schemes."""
    if not _SCHEME.match(url):
        raise InvalidValue(
            f"{quote_text(url)} is not a store URL", "use file:///a/folder or memory:, or set `state_dir` to a folder"
        )
    if has_password(url):
        raise InvalidValue("the URL of the store has a password", "remove it, and set it in the environment instead")
    if scheme_of(url) == "file":
        store_folder(url)
    return url


def has_password(url: str) -> bool:
    """Return True if a store URL has a password, which state and logs would show."""
    _, _, rest = url.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    return bool(at) and ":" in user and scheme_of(url) != "file"


def to_store_url(text: str) -> str:
    """Return the URL of a store from user input: its URL, or the path of its folder."""
    return text if _SCHEME.match(text) or not text else folder_url(Path(text).expanduser().absolute())


def scheme_of(url: str) -> str:
    """Return the scheme of a store URL, without the colon."""
    return url.partition(":")[0]


def store_folder(url: str) -> Path | None:
    """Return the folder of a `file:` URL (RFC 8089); None for other schemes.

    Raises ValueError if it is not a folder on this machine.
    """
    if scheme_of(url) != "file":
        return None
    try:
        parts = urlsplit(url)
    except ValueError:  # an invalid host
        parts = urlsplit("file://?")
    path = unquote(parts.path)
    if parts.netloc not in {"", "localhost"} or not path.startswith("/") or "\0" in path:
        raise InvalidValue(f"{quote_text(url)} is not a folder on this machine", "use file:///an/absolute/path")
    return Path(path)


def require_local_folder(url: str) -> Path | None:
    """Return the folder of a `file:` URL; raise RefusedError if it is not local."""
    try:
        return store_folder(url)
    except InvalidValue as error:
        raise RefusedError(error.message, error.remedy) from None


def folder_url(folder: Path) -> str:
    """Return the store URL of a folder with an absolute path."""
    return f"file://{quote(bytes(folder))}"
