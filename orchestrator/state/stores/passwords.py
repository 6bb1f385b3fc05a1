"""Passwords of stores on servers: a URL has none, because state and logs would show it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.errors import RefusedError


def read_password(environ: Mapping[str, str], server: str, variable: str, remedy: str) -> str | None:
    """Return the password of a store's server from the environment, or None. Blocks.

    It is the value of `variable`, or the content of the file that `<variable>_FILE` names. `server` and `remedy` are
    for the RefusedError of an unreadable file.
    """
    if (path := environ.get(f"{variable}_FILE")) and variable not in environ:
        try:
            return Path(path).read_text().rstrip("\n")
        except (OSError, UnicodeError) as error:
            raise RefusedError(f"can't read the {server} password from {path}: {error}", remedy) from None
    return environ.get(variable) or None
