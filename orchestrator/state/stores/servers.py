"""Shared parts of the stores on servers: passwords, and the newest known position."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from orchestrator.errors import RefusedError, StateLost


def read_password(environ: Mapping[str, str], server: str, variable: str, remedy: str) -> str | None:
    """Return the password of a store's server from the environment, or None. Blocks.

    A URL has none, because state and logs would show it. The password is the value of `variable`, or the content of the
    file that `<variable>_FILE` names. `server` and `remedy` are for the RefusedError of an unreadable file.
    """
    if (path := environ.get(f"{variable}_FILE")) and variable not in environ:
        try:
            return Path(path).read_text().rstrip("\n")
        except (OSError, UnicodeError) as error:
            raise RefusedError(f"can't read the {server} password from {path}: {error}", remedy) from None
    return environ.get(variable) or None


class KnownPosition:
    """The newest known position of a server: one that is behind it has lost commits."""

    def __init__(self, address: str) -> None:
        """Know nothing of the server at an address."""
        self._address = address
        self.newest = 0

    def note(self, position: int, known: int) -> None:
        """Record the position of the server.

        Raises StateLost if it is less than `known`, the newest known one when the server was asked.
        """
        if position < known:
            raise self.lost(position)
        self.newest = max(self.newest, position)

    def lost(self, position: int) -> StateLost:
        """Return the error of a server that is behind."""
        return StateLost(self._address, f"it is at position {position}, after it was at {self.newest}")
