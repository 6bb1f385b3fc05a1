"""Send groups of commits: each is applied once, even if its connection is lost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

import psycopg

from orchestrator.errors import LeaseLost, StoreUnavailable, VersionConflict
from orchestrator.protocols import Guard, Key
from orchestrator.state.log.codec import EncodedCommit, EncodedWrite, get_writer_name
from orchestrator.state.log.commit_queue import PendingCommit
from orchestrator.state.stores.postgres.records import escape, group_parameters, unescape
from orchestrator.state.stores.postgres.server import Connection, Server, fetch, is_disconnected
from orchestrator.state.stores.servers import KnownPosition

_GROUP: Final = 50
"""The maximum number of commits in a transaction."""
_GROUP_BYTES: Final = 8 << 20
_UNKNOWN: Final = 1_000
"""The number of commits with an unknown outcome whose ids are remembered."""


class CommitGroups:
    """The commits of this process on a server, one transaction per group."""

    def __init__(self, server: Server, queries: Mapping[str, str]) -> None:
        self._server, self._query = server, queries["commit"]
        self._by = escape(get_writer_name())
        self.position = KnownPosition(str(server.address))
        self._unknown: dict[str, None] = {}
        """Ids of commits that may have been applied although their caller got an error."""

    async def commit(self, pending: deque[PendingCommit]) -> None:
        """Commit the first of the pending commits and set their outcomes."""
        group = _take_group(pending)
        try:
            replies = await self._send([one.commit for one in group])
        except StoreUnavailable as error:
            for one in group:
                one.failure = error
            return
        writes = [write for one in group for write in one.commit.writes]
        guards = [guard for one in group for guard in one.commit.guards]
        for one, reply in zip(group, replies, strict=True):
            self._settle(one, reply, writes, guards)

    async def _send(self, group: Sequence[EncodedCommit]) -> Sequence[Any]:
        """Return the server's reply to each commit of a group, in one transaction."""
        ids = [commit.id for commit in group]
        parameters = group_parameters(group) | {
            "by": self._by,
            "is_repeated": any(name in self._unknown for name in ids),
            "is_durable": any(commit.durable for commit in group),
        }

        async def send(connection: Connection) -> Sequence[Any]:
            # A later attempt has a higher number, also that of a caller who tries again.
            parameters.update(attempt=time.time_ns(), seen=self.position.newest)
            try:
                ((replies, _),) = await fetch(connection, self._query, parameters)
            except psycopg.Error:
                parameters["is_repeated"] = True
                raise
            return list(replies)

        try:
            replies = await self._server.run(send)
        except StoreUnavailable as error:
            if is_disconnected(error.__cause__) or parameters["is_repeated"]:
                self._unknown |= dict.fromkeys(ids)
                while len(self._unknown) > _UNKNOWN:
                    del self._unknown[next(iter(self._unknown))]
            raise
        for name in ids:
            self._unknown.pop(name, None)
        return replies

    def _settle(
        self, pending: PendingCommit, reply: Sequence[Any], writes: Sequence[EncodedWrite], guards: Sequence[Guard]
    ) -> None:
        """Set the outcome of a commit of a group with these writes and guards."""
        match reply:
            case ["ok", position]:
                self.position.note(position, 0)
                pending.position = position
            case ["conflict", number, found, by, when]:
                write = writes[number - 1]
                pending.failure = VersionConflict(
                    str(write.key), write.expected, int(found), writer=unescape(by), time=float(when)
                )
            case ["lease", number, epoch]:
                guard = guards[number - 1]
                pending.failure = LeaseLost(str(guard.key), guard.epoch, epoch)
            case ["lost", position]:
                pending.failure = self.position.lost(position)
            case _:  # an outcome like the others: without one, it and the rest of the group would wait forever
                pending.failure = AssertionError(f"unknown reply of the function commit: {reply}")


def _take_group(pending: deque[PendingCommit]) -> list[PendingCommit]:
    """Remove the next group from the pending commits.

    A commit on a document that an earlier one writes is part of a later group: the server checks a group's commits
    together.
    """
    group, size, written = list[PendingCommit](), 0, set[Key]()
    while pending and len(group) < _GROUP and (not group or size < _GROUP_BYTES):
        commit = pending[0].commit
        keys = {write.key for write in commit.writes}
        if not written.isdisjoint(keys.union(guard.key for guard in commit.guards)):
            break
        written |= keys
        size += len(commit.payload)
        group.append(pending.popleft())
    return group
