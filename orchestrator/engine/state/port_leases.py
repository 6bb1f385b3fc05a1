"""A name and a block of ports for each of the pool's places: no two places on a machine have the same.

What a place has is said by its `lease.json`. Those of all places in a home are what is taken there, whichever project
they are of, and under the home's lock a block is chosen that none of them has. The store has a document for each port
as well, which keeps runs apart that share it from different homes.

`lease.json` is written before the documents. So a document is proof only as long as the place that it names says the
same: any other was left by a killed process or belonged to a place that is gone, and whoever needs the port takes it
over. A `lease.json` whose documents are missing gets them the next time.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import anyio.to_thread

from orchestrator.engine.state.ports import find_free_block, ports_in_use
from orchestrator.errors import RefusedError, VersionConflict
from orchestrator.protocols import Commit, Document, Key, Store, Write
from orchestrator.system.clock import Clock
from orchestrator.system.file_lock import FileLock

#: Where blocks are looked for: below the ports that systems give to outgoing connections (ip(7), RFC 6335).
DEFAULT_PORTS: Final = range(20000, 30000)

_KIND = "ports"
_FILE = "lease.json"
_LOCK = "ports.lock"


@dataclass(frozen=True, slots=True)
class PortLease:
    """What a place has to itself on this machine, for as long as the place is there.

    `name` is fit for a host, a database or a Compose project: lower-case letters, digits and `-`, at most 40
    characters, a letter first. `ports` follow each other. `lost` are those ports of the block it had before that
    somebody else has now, which is why it was given another; none where that has not happened.
    """

    name: str
    ports: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()

    def environment(self) -> dict[str, str]:
        """Return the variables that tell a place's commands and sessions of it."""
        numbered = {f"COUNCIL_PORT_{number}": str(port) for number, port in enumerate(self.ports)}
        return {"COUNCIL_NAME": self.name, **numbered}


class PortLeases:
    """Leases `count` ports to each place, from `ports`, and records them in the store.

    A place is the absolute path `<home>/<hub>/places/<number>` of a folder; the caller holds the place's lock.
    """

    def __init__(self, store: Store, clock: Clock, count: int, *, ports: range = DEFAULT_PORTS) -> None:
        self._store, self._clock = store, clock
        self._count, self._ports = count, ports

    async def lease(self, place: Path) -> PortLease:
        """Return what the place has, or give it a block if it has none that it could use now.

        To be asked for each time that the place is handed out. RefusedError where no block is free.
        """
        if self._count == 0:
            await self.release(place)
            return PortLease(_name(place))
        lost: set[int] = set()
        async with FileLock(_home(place) / _LOCK).hold():
            before = await anyio.to_thread.run_sync(_read, place)
            while True:
                documents = await _documents(self._store)
                lease = await anyio.to_thread.run_sync(self._settle, place, documents)
                lost.update(lease.lost)
                with suppress(VersionConflict):  # a run of another home was quicker: look again
                    await self._record(place, lease, documents, anew=not before)
                    return replace(lease, lost=tuple(port for port in before if port in lost))

    async def release(self, place: Path) -> None:
        """Give back what the place has, if anything, before the caller deletes its folder or after."""
        await anyio.to_thread.run_sync(lambda: (place / _FILE).unlink(missing_ok=True))
        documents = await _documents(self._store)
        await delete_port_leases(self._store, [found for found in documents.values() if _holder(found) == place])

    def _settle(self, place: Path, documents: Mapping[int, Document]) -> PortLease:
        """Return the place's lease, its `lease.json` being written. Blocks."""
        taken = _taken_by_others(place, documents)
        # A place that was lost by a kill is made anew under its number: it has what it had.
        had = _read(place) or tuple(sorted(port for port, found in documents.items() if _holder(found) == place))
        lost: tuple[int, ...] = ()
        if len(had) == self._count and all(port in self._ports for port in had):
            lost = tuple(port for port in had if port in taken) or ports_in_use(had)
            if not lost:
                lease = PortLease(_name(place), had)
                _write(place, lease)
                return lease
        block = find_free_block(self._ports, self._count, _first_position(place), taken.union(lost))
        if block is None:
            what = f"no {self._count} ports in a row are free from {self._ports.start} to {self._ports.stop - 1}"
            raise RefusedError(what, "lower `ports` or `max` under `worktrees`")
        lease = PortLease(_name(place), tuple(block), lost)
        _write(place, lease)
        return lease

    async def _record(self, place: Path, lease: PortLease, documents: Mapping[int, Document], *, anew: bool) -> None:
        """Make the store say what `lease.json` says; `anew` where somebody may be about to forget what it says."""
        host = socket.gethostname()
        value = {**_content(place, lease), "host": host, "since": self._clock.now()}
        writes = []
        for port in lease.ports:
            found = documents.get(port)
            if anew or found is None or _holder(found) != place or found.value.get("ports") != value["ports"]:
                writes.append(Write(_key(host, port), found.version if found else 0, value))
        for port, found in documents.items():
            if _holder(found) == place and port not in lease.ports:
                writes.append(Write(found.key, found.version, None))
        if writes:
            await self._store.commit(Commit(writes))


async def find_stale_port_leases(store: Store) -> list[Document]:
    """Return the leases of this host in a store whose places are gone, or have other ports by now.

    One of a place that is only out of reach, as on a disk that is not mounted, is among them: it is recorded anew
    when the place is used again, if nobody has taken its ports.
    """
    documents = await _documents(store)
    return await anyio.to_thread.run_sync(
        lambda: [found for port, found in documents.items() if _is_stale(port, found)],
    )


async def delete_port_leases(store: Store, leases: Sequence[Document]) -> None:
    """Delete leases from a store, but for those that have changed since they were read."""
    while True:
        same = [found for found in leases if await store.get(found.key) == found]
        with suppress(VersionConflict):
            if same:
                await store.commit(Commit([Write(found.key, found.version, None) for found in same]))
            return


def _key(host: str, port: int) -> Key:
    # One for each port: blocks of different sizes can't overlap unnoticed.
    return Key(_KIND, f"{host}/{port}")


async def _documents(store: Store) -> dict[int, Document]:
    """Return the leases of this host by port."""
    found = await store.list(_KIND, f"{socket.gethostname()}/")
    return {int(one.key.id.rpartition("/")[2]): one for one in found}


def _holder(found: Document) -> Path | None:
    """Return the place that a lease names; None where that is not known."""
    return None if found.damaged else Path(found.value["place"])


def _is_stale(port: int, found: Document) -> bool:
    holder = _holder(found)
    return holder is None or port not in _read(holder)


def _taken_by_others(place: Path, documents: Mapping[int, Document]) -> set[int]:
    """Return the ports of all other places that are known of."""
    taken: set[int] = set()
    for hub in _entries(_home(place)):
        for other in _entries(hub / "places"):
            taken.update(() if other == place else _read(other))
    for port, found in documents.items():
        if port not in taken and _holder(found) != place and not _is_stale(port, found):
            taken.add(port)
    return taken


def _entries(folder: Path) -> list[Path]:
    # Other errors are not passed over: what was not looked at must not count as free.
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        return list(folder.iterdir())
    return []


def _read(place: Path) -> tuple[int, ...]:
    """Return the ports that a place has; none where its `lease.json` is missing, unreadable or another place's."""
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError, ValueError, KeyError, TypeError):
        found = json.loads((place / _FILE).read_bytes())
        return tuple(map(int, found["ports"])) if found["place"] == str(place) else ()
    return ()


def _write(place: Path, lease: PortLease) -> None:
    staged = place / f"{_FILE}.{secrets.token_hex(4)}.new"
    try:
        staged.write_text(json.dumps(_content(place, lease)))
        staged.replace(place / _FILE)
    finally:
        staged.unlink(missing_ok=True)


def _content(place: Path, lease: PortLease) -> dict[str, object]:
    return {"place": str(place), "name": lease.name, "ports": list(lease.ports)}


def _home(place: Path) -> Path:
    return place.parents[2]


def _name(place: Path) -> str:
    return f"council-{_digest(place)[:8]}-{place.name}"


def _first_position(place: Path) -> int:
    # The same for all places of a hub: their blocks lie together, so that those of two homes seldom meet.
    return int(_digest(place.parent)[:8], 16)


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()
