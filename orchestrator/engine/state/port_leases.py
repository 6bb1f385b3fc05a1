"""Lease a name and a block of ports to each worktree slot.

Names and ports are unique among the slots of a machine. The `lease.json` of a slot contains its lease. Together, these
files of all slots in a home, for all projects, list the ports in use; a free block is chosen under the lock of the
home. The store also has a document per port, which separates runs from different homes that share the store.

`lease.json` is written before the documents. So a document is valid only while its slot has the same lease: other
documents were left behind by a killed process or belonged to a deleted slot, and are replaced by a process that needs
the port. Missing documents of a `lease.json` are written at the next lease.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import anyio.to_thread

from orchestrator.errors import RefusedError, VersionConflict
from orchestrator.protocols import Commit, Document, Key, Store, Write
from orchestrator.system.clock import Clock
from orchestrator.system.file_lock import FileLock
from orchestrator.system.files import atomic_write

#: The range of blocks, below the ephemeral ports of outgoing connections (ip(7), RFC 6335).
DEFAULT_PORTS: Final = range(20000, 30000)

_KIND = "ports"
_FILE = "lease.json"
_LOCK = "ports.lock"

# A session's server may listen on any of these; a listener on one specific address also blocks the wildcard ones.
_ADDRESSES: Final = (
    (socket.AF_INET, "127.0.0.1"),
    (socket.AF_INET, "0.0.0.0"),  # noqa: S104  bound for a moment, never listened on
    (socket.AF_INET6, "::1"),
    (socket.AF_INET6, "::"),
)
_NO_SUCH_ADDRESS: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})
_IN_USE: Final = frozenset({errno.EADDRINUSE, errno.EACCES})


@dataclass(frozen=True, slots=True)
class PortLease:
    """The name and ports of a slot on this machine.

    They belong to the slot as long as it exists. `name` is a valid name for a host, a database or a Compose project:
    lower-case letters, digits and `-`, at most 40 characters, starting with a letter. `ports` are consecutive. If the
    previous block was replaced because another program uses some of its ports, `conflicting` are these ports.
    """

    name: str
    ports: tuple[int, ...] = ()
    conflicting: tuple[int, ...] = ()

    def environment(self) -> dict[str, str]:
        """Return the environment variables for the commands and sessions of a slot."""
        numbered = {f"COUNCIL_PORT_{number}": str(port) for number, port in enumerate(self.ports)}
        return {"COUNCIL_NAME": self.name, **numbered}


class PortLeases:
    """Leases `count` ports from `ports` to each slot, and records them in the store.

    A slot is a folder with the absolute path `<home>/<hub>/slots/<number>`; the caller holds the lock of the slot.
    """

    def __init__(self, store: Store, clock: Clock, count: int, *, ports: range = DEFAULT_PORTS) -> None:
        self._store, self._clock = store, clock
        self._count, self._ports = count, ports

    async def lease(self, slot: Path) -> PortLease:
        """Return the lease of a slot.

        The slot gets a new block if it has none, or if its ports are in use. Call this each time the slot is acquired.
        Raises RefusedError if no block is free.
        """
        if self._count == 0:
            await self.release(slot)
            return PortLease(_name(slot))
        conflicting: set[int] = set()
        async with FileLock(_home(slot) / _LOCK).hold():
            previous = await anyio.to_thread.run_sync(_read, slot)
            while True:
                documents = await _documents(self._store)
                lease = await anyio.to_thread.run_sync(self._settle, slot, documents)
                conflicting.update(lease.conflicting)
                with suppress(VersionConflict):  # a run of another home was first: retry
                    await self._record(slot, lease, documents, rewrite=not previous)
                    return replace(lease, conflicting=tuple(port for port in previous if port in conflicting))

    async def release(self, slot: Path) -> None:
        """Release the lease of a slot, if any.

        The caller may delete its folder before or after this call.
        """
        await anyio.to_thread.run_sync(lambda: (slot / _FILE).unlink(missing_ok=True))
        documents = await _documents(self._store)
        await delete_port_leases(
            self._store, [document for document in documents.values() if _holder(document) == slot]
        )

    def _settle(self, slot: Path, documents: Mapping[int, Document]) -> PortLease:
        """Write `lease.json` and return the lease of a slot. Blocks."""
        taken = _taken_by_others(slot, documents)
        # A slot that is recreated with its number after its process was killed keeps its ports.
        previous = _read(slot) or tuple(
            sorted(port for port, document in documents.items() if _holder(document) == slot)
        )
        conflicting: tuple[int, ...] = ()
        if len(previous) == self._count and all(port in self._ports for port in previous):
            conflicting = tuple(port for port in previous if port in taken) or ports_in_use(previous)
            if not conflicting:
                lease = PortLease(_name(slot), previous)
                _write(slot, lease)
                return lease
        block = find_free_block(self._ports, self._count, _first_position(slot), taken.union(conflicting))
        if block is None:
            message = f"no {self._count} consecutive ports are free from {self._ports.start} to {self._ports.stop - 1}"
            raise RefusedError(message, "lower `ports` or `max` under `worktrees`")
        lease = PortLease(_name(slot), tuple(block), conflicting)
        _write(slot, lease)
        return lease

    async def _record(self, slot: Path, lease: PortLease, documents: Mapping[int, Document], *, rewrite: bool) -> None:
        """Make the documents match `lease.json`.

        `rewrite` writes all of them again, because other processes may be about to delete them.
        """
        host = socket.gethostname()
        value = {**_content(slot, lease), "host": host, "since": self._clock.now()}
        writes = []
        for port in lease.ports:
            document = documents.get(port)
            if (
                rewrite
                or document is None
                or _holder(document) != slot
                or document.value.get("ports") != value["ports"]
            ):
                writes.append(Write(_key(host, port), document.version if document else 0, value))
        for port, document in documents.items():
            if _holder(document) == slot and port not in lease.ports:
                writes.append(Write(document.key, document.version, None))
        if writes:
            await self._store.commit(Commit(writes))


async def find_stale_port_leases(store: Store) -> list[Document]:
    """Return this host's port leases without a slot, or whose slot has other ports.

    The slot of a stale lease may just be unreachable, for example on an unmounted disk. Its lease is recorded again at
    the next use, unless its ports are in use by then.
    """
    documents = await _documents(store)
    return await anyio.to_thread.run_sync(
        lambda: [document for port, document in documents.items() if _is_stale(port, document)],
    )


async def delete_port_leases(store: Store, leases: Sequence[Document]) -> None:
    """Delete leases from a store, except those that changed since they were read."""
    while True:
        unchanged = [lease for lease in leases if await store.get(lease.key) == lease]
        with suppress(VersionConflict):
            if unchanged:
                await store.commit(Commit([Write(lease.key, lease.version, None) for lease in unchanged]))
            return


def _key(host: str, port: int) -> Key:
    # One document per port: blocks of different sizes cannot overlap unnoticed.
    return Key(_KIND, f"{host}/{port}")


async def _documents(store: Store) -> dict[int, Document]:
    """Return the leases of this host by port."""
    documents = await store.list(_KIND, f"{socket.gethostname()}/")
    return {int(document.key.id.rpartition("/")[2]): document for document in documents}


def _holder(document: Document) -> Path | None:
    """Return the slot of a lease; None if unknown."""
    return None if document.damaged else Path(document.value["slot"])


def _is_stale(port: int, document: Document) -> bool:
    holder = _holder(document)
    return holder is None or port not in _read(holder)


def _taken_by_others(slot: Path, documents: Mapping[int, Document]) -> set[int]:
    """Return the ports of all other known slots."""
    taken: set[int] = set()
    for hub in _entries(_home(slot)):
        for other in _entries(hub / "slots"):
            taken.update(() if other == slot else _read(other))
    for port, document in documents.items():
        if port not in taken and _holder(document) != slot and not _is_stale(port, document):
            taken.add(port)
    return taken


def _entries(folder: Path) -> list[Path]:
    # Other errors propagate: an unread slot must not count as free.
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        return list(folder.iterdir())
    return []


def _read(slot: Path) -> tuple[int, ...]:
    """Return the ports of a slot.

    Empty if its `lease.json` is missing or unreadable, or belongs to another slot.
    """
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError, ValueError, KeyError, TypeError):
        content = json.loads((slot / _FILE).read_bytes())
        return tuple(map(int, content["ports"])) if content["slot"] == str(slot) else ()
    return ()


def _write(slot: Path, lease: PortLease) -> None:
    atomic_write(slot / _FILE, json.dumps(_content(slot, lease)))


def _content(slot: Path, lease: PortLease) -> dict[str, object]:
    return {"slot": str(slot), "name": lease.name, "ports": list(lease.ports)}


def _home(slot: Path) -> Path:
    return slot.parents[2]


def _name(slot: Path) -> str:
    return f"council-{_digest(slot)[:8]}-{slot.name}"


def _first_position(slot: Path) -> int:
    # Equal for all slots of a hub: their blocks are adjacent, so blocks of two homes rarely collide.
    return int(_digest(slot.parent)[:8], 16)


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()


def ports_in_use(ports: Iterable[int]) -> tuple[int, ...]:
    """Return the ports on which a server can't listen now. Blocks.

    All addresses of this machine are tried. A port with only TIME_WAIT connections counts as free if its server set
    SO_REUSEADDR, as this probe does (socket(7)). Raises OSError if the probe fails, for example for lack of
    descriptors.
    """
    return tuple(port for port in ports if not all(_can_bind(*address, port) for address in _ADDRESSES))


def find_free_block(ports: range, count: int, begin: int, taken: Collection[int]) -> range | None:
    """Return `count` consecutive ports that are neither `taken` nor in use.

    Return None if there is no such block. Blocks. The search starts at position `begin` (any number) and wraps around.
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
            # Also prevents concurrent probes from mistaking each other for a server.
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
