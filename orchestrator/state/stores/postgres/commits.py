"""Send groups of commits: each is applied once, even if its connection is lost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

import psycopg

from orchestrator.errors import LeaseLost, StoreUnavailable, VersionConflict
from orchestrator.state.log.codec import get_writer_name
from orchestrator.state.log.commit_queue import PendingCommit
from orchestrator.state.stores.postgres.records import commit_parameters, escape, unescape
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
        self._server, self._query, self._await_standbys = server, queries["commit"], queries["await_standbys"]
        self._by = escape(get_writer_name())
        self.position = KnownPosition(str(server.address))
        self._unknown: dict[str, None] = {}
        """Ids of commits that may have been applied although their caller got an error."""

    async def commit(self, pending: deque[PendingCommit]) -> None:
        """Commit the first of the pending commits and set their outcomes."""
        group, size = list[PendingCommit](), 0
        while pending and len(group) < _GROUP and (not group or size < _GROUP_BYTES):
            group.append(pending.popleft())
            size += len(group[-1].commit.payload)
        try:
            for one, reply in zip(group, await self._send(group), strict=True):
                self._settle(one, reply)
        except StoreUnavailable as error:
            for one in group:
                one.failure = error

    async def _send(self, group: Sequence[PendingCommit]) -> Sequence[Any]:
        """Return the server's reply to each commit of a group, in one transaction."""
        calls = (self._query.replace("{n}", str(number)) for number in range(len(group)))
        query = "SELECT " + ", ".join((*calls, self._await_standbys))
        ids = [one.commit.id for one in group]
        parameters: dict[str, Any] = {"by": self._by, "is_repeated": any(name in self._unknown for name in ids)}
        parameters["is_durable"] = any(one.commit.durable for one in group)
        for number, one in enumerate(group):
            parameters |= commit_parameters(one.commit, number)

        async def send(connection: Connection) -> Sequence[Any]:
            # A later attempt has a higher number, also that of a caller who tries again.
            parameters.update(attempt=time.time_ns(), seen=self.position.newest)
            try:
                ((*replies, _),) = await fetch(connection, query, parameters)
            except psycopg.Error:
                parameters["is_repeated"] = True
                raise
            return replies

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

    def _settle(self, pending: PendingCommit, reply: Sequence[Any]) -> None:
        """Set the outcome of a commit."""
        commit = pending.commit
        match reply:
            case ["ok", position]:
                self.position.note(position, 0)
                pending.position = position
            case ["conflict", number, found, by, when]:
                write = commit.writes[number - 1]
                pending.failure = VersionConflict(
                    str(write.key), write.expected, int(found), writer=unescape(by), time=float(when)
                )
            case ["lease", number, epoch]:
                guard = commit.guards[number - 1]
                pending.failure = LeaseLost(str(guard.key), guard.epoch, epoch)
            case ["lost", position]:
                pending.failure = self.position.lost(position)
            case _:
                raise AssertionError(reply)
