"""Accept connections on a session socket."""

from __future__ import annotations

from typing import Final

import anyio
import anyio.abc

_RETRY_INTERVAL: Final = 0.1  # seconds, when no file descriptor is free


async def accept_connection(listener: anyio.abc.SocketListener) -> anyio.abc.SocketStream:
    """Return the next connected client; wait while no descriptor is free."""
    while True:
        try:
            return await listener.accept()
        except (OSError, anyio.BrokenResourceError):  # anyio raises OSError for EMFILE
            await anyio.sleep(_RETRY_INTERVAL)
