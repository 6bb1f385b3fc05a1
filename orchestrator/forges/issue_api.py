"""What the trackers need from a forge: the issues of one repository."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Final, TypeVar

import anyio

from orchestrator.forges.connection import Members
from orchestrator.forges.issues import Issue

A = TypeVar("A")
R = TypeVar("R")

#: Requests at the same time: forges ask for few.
_CONCURRENCY: Final = 4


class IssueApi(ABC):
    """The issues of one repository."""

    #: The field with the number of an issue, and the state of an open one.
    number_field: ClassVar[str]
    open_state: ClassVar[str]

    def __init__(self, members: Members) -> None:
        self.http, self.members = members.http, members
        self._limiter = anyio.CapacityLimiter(_CONCURRENCY)

    @abstractmethod
    async def list_selected(self) -> Sequence[Mapping[str, Any]]:
        """Return the selected open issues, as the API lists them."""

    @abstractmethod
    async def read(self, number: int) -> Mapping[str, Any] | None:
        """Return an issue, as in the list; None if it does not exist."""

    @abstractmethod
    async def complete(self, found: Mapping[str, Any]) -> Issue:
        """Return a listed issue with its comments, dependencies and permissions."""

    @abstractmethod
    async def write_comment(self, number: int, comment: int | None, body: str) -> None:
        """Write a comment, or replace an existing one."""

    @abstractmethod
    async def delete_comment(self, number: int, comment: int) -> None:
        """Delete a comment."""

    @abstractmethod
    async def change_labels(self, number: int, added: Collection[str], removed: Collection[str]) -> None:
        """Add and remove labels; the others stay."""

    @abstractmethod
    async def close(self, number: int) -> None:
        """Close an issue as completed."""

    async def open_issues(self) -> list[Issue]:
        """Return the selected open issues, with their comments."""
        return await self._complete_all(await self.list_selected())

    async def issues(self, numbers: Collection[int]) -> list[Issue]:
        """Return these issues, with their comments; missing ones are left out."""
        return await self._complete_all(await self._read_all(numbers))

    async def open_among(self, numbers: Collection[int]) -> set[int]:
        """Return those of the issues that are open."""
        found = await self._read_all(numbers)
        return {one[self.number_field] for one in found if one["state"] == self.open_state}

    async def _read_all(self, numbers: Collection[int]) -> list[Mapping[str, Any]]:
        found = await self._gather(self.read, sorted(numbers))
        return [one for one in found if one is not None]

    async def _complete_all(self, found: Sequence[Mapping[str, Any]]) -> list[Issue]:
        return await self._gather(self.complete, found)

    async def _gather(self, call: Callable[[A], Awaitable[R]], arguments: Sequence[A]) -> list[R]:
        """Return the results of a call for each argument, a few at the same time."""
        results: dict[int, R] = {}

        async def run(index: int, argument: A) -> None:
            async with self._limiter:
                results[index] = await call(argument)

        async with anyio.create_task_group() as group:
            for index, argument in enumerate(arguments):
                group.start_soon(run, index, argument)
        return [results[index] for index in range(len(arguments))]
