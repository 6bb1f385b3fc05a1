"""Fake session service for tests of the session socket: answers from memory, steered by the requested paths."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import pytest

from orchestrator.api.execution import leadership
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.engine.run_context import RunContext
from orchestrator.errors import RefusedError
from orchestrator.protocols import JsonObject


@dataclass
class FakeSessionService:
    """Files have one owner; those in `foreign_owners` are never released.

    Locking `fault` raises an error; locking `never` waits until the client disconnects.
    """

    foreign_owners: dict[str, str] = field(default_factory=dict)
    warning: str | None = None
    message: str | None = None
    owners: dict[str, SessionName] = field(default_factory=dict)
    asked: list[tuple[SessionName, str, JsonObject]] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)
    handed_over: list[JsonObject] = field(default_factory=list)
    left: int = 0
    """How many clients disconnected before their answer."""

    slots: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))

    @asynccontextmanager
    async def hold_slot(self, session: SessionName) -> AsyncIterator[None]:
        """Hold the only slot."""
        async with self.slots:
            self.asked.append((session, "hold_slot", {}))
            yield

    async def handle(self, session: SessionName, command: str, arguments: JsonObject) -> JsonObject:
        """Answer a request in the form of the protocol."""
        self.asked.append((session, command, arguments))
        match command:
            case "lock":
                return await self._lock(session, arguments["paths"])
            case "unlock":
                had = [path for path in arguments["paths"] if self.owners.pop(path, None) is not None]
                return {"unlocked": had}
            case "peers":
                return {"peers": [self._peer(one, session) for one in dict.fromkeys([session, *self.owners.values()])]}
            case "note":
                return {"id": "n1"}
            case "notes":
                note = {
                    "id": "n1",
                    "task": session.task,
                    "topic": "tests",
                    "paths": [],
                    "text": "one\ntwo",
                    "time": 1.0,
                }
                return {"notes": [note]}
            case "ask":
                stats = {"commits": 1, "files": 2, "added": 3, "removed": 4}
                reported = {"plan": "a plan", "diff": "+a line", "log": "said", "handoffs": [], "stats": stats}
                return {"task": arguments["task"], "attempt": 1, "status": "working", **reported}
            case "share_put" | "share_get" | "share_wait" | "share_list":
                return self._share(command, arguments)
            case "submit_handoff":
                self.handed_over.append(arguments["data"])
                return {"size": 2}
            case "check_edit":
                owner = self.foreign_owners.get(arguments["path"])
                return {
                    "allowed": owner is None,
                    "owner": owner,
                    "since": None,
                    "reason": None,
                    "warning": self.warning,
                }
            case _:
                return {"message": self.message} if command == "take_messages" else {}

    async def _lock(self, session: SessionName, paths: list[str]) -> JsonObject:
        if "fault" in paths:
            raise ZeroDivisionError("an error of the session API")
        if "never" in paths:
            try:
                await anyio.sleep_forever()
            finally:
                self.left += 1
        for path in paths:
            owner = self.foreign_owners.get(path) or str(self.owners.get(path, session))
            if owner != str(session):
                raise RefusedError(f"{path} is locked by {owner}", "wait for it, or work on other files")
        self.owners.update(dict.fromkeys(paths, session))
        return {"locked": paths}

    def _share(self, command: str, arguments: JsonObject) -> JsonObject:
        if command == "share_put":
            self.shared[arguments["key"]] = arguments["value"]
            return {"key": arguments["key"], "version": len(self.shared)}
        reported = {"version": 1, "writer": None, "time": 1.0}
        if command == "share_list":
            return {"shared": [{"key": key, "size": 2, **reported} for key in self.shared]}
        key = arguments["key"]
        return {"key": key, "value": self.shared[key], **reported}

    def _peer(self, one: SessionName, me: SessionName) -> JsonObject:
        files = [path for path, owner in self.owners.items() if owner == one]
        reported = {"adapter": "fake", "status": "working", "file": None, "progress": None, "message": None}
        more = {"blocked_on": None, "files": files, "updated": 1.0, "is_me": one == me}
        return {**one._asdict(), **reported, **more}


def use_in_runs(service: FakeSessionService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use this service as the session API of runs in this process."""

    def seat(shop: RunContext, *_: object) -> RunContext:
        return replace(shop, tools=replace(shop.tools, session_service=service))

    monkeypatch.setattr(leadership, "with_session_service", seat)
