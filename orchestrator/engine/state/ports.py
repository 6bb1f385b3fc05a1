"""TCP ports of this machine: test which are in use, and find a block of free ones."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection, Iterable
from typing import Final

# A session's server may listen on any of these; a listener on one specific address also blocks the wildcard ones.
_ADDRESSES: Final = (
    (socket.AF_INET, "127.0.0.1"),
    (socket.AF_INET, "0.0.0.0"),
    (socket.AF_INET6, "::1"),
    (socket.AF_INET6, "::"),
)
_NO_SUCH_ADDRESS: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})
_IN_USE: Final = frozenset({errno.EADDRINUSE, errno.EACCES})


def ports_in_use(ports: Iterable[int]) -> tuple[int, ...]:
    """Return the ports on which a server cannot listen now. Blocks.

    All addresses of this machine are tried. A port with only TIME_WAIT connections counts as free, if its server set
    SO_REUSEADDR as this probe does (socket(7)). OSError if the probe fails, for example for lack of descriptors.
    """
    return tuple(port for port in ports if not all(_can_bind(*address, port) for address in _ADDRESSES))


def find_free_block(ports: range, count: int, begin: int, taken: Collection[int]) -> range | None:
    """Return `count` consecutive ports that are neither `taken` nor in use.

    None if there are none. Blocks. The search starts at position `begin` (any number) and wraps around.
    """
    unusable = set(taken)
    positions = len(ports) - count + 1
    for step in range(positions):
        first = ports[(begin + step) % positions]
        block = range(first, first + count)
        if unusable.isdisjoint(block):
            in_use = ports_in_use(block)
            if not in_use:
                return block
            unusable.update(in_use)
    return None


def _can_bind(family: socket.AddressFamily, address: str, port: int) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # Also keeps concurrent probes from mistaking each other for a server.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((address, port))
    except OSError as error:
        if error.errno in _IN_USE:
            return False
        if error.errno not in _NO_SUCH_ADDRESS:
            raise
    return True
