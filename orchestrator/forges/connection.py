"""Connect to the API of a forge: its address, the token, and who may write to the repository."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Self, TypeVar

import anyio
from pydantic import BaseModel, ConfigDict

from orchestrator.errors import RefusedError
from orchestrator.system.process import run

if TYPE_CHECKING:
    from orchestrator.forges.http import ForgeHttp

_TOKEN_TIMEOUT: Final = 10.0


@dataclass(frozen=True, slots=True)
class Connection:
    """The URL of an API, the headers of each request, and the remedies for status codes."""

    api: str
    headers: Mapping[str, str] = field(repr=False)
    remedies: Mapping[int, str]


class RepositoryOptions(BaseModel, ABC):
    """The options that name a repository on a forge, and its token."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)

    @abstractmethod
    async def connection(self) -> Connection:
        """Return the API and the token; raise RefusedError if there is none."""

    @abstractmethod
    def members(self, http: ForgeHttp) -> Members:
        """Return the users who may write to the repository."""


OptionsT = TypeVar("OptionsT", bound=RepositoryOptions)


class Connected(Generic[OptionsT]):
    """An object with a connection to a forge in the body of an `async with`."""

    Options: ClassVar[type[BaseModel]]

    def __init__(self, options: OptionsT, /) -> None:
        self._options = options
        self._stack = AsyncExitStack()
        self._http: ForgeHttp
        self._members: Members

    async def __aenter__(self) -> Self:
        """Find the token and open the connection; raise RefusedError if a package is missing."""
        try:
            from orchestrator.forges.http import ForgeHttp  # noqa: PLC0415  optional, and slow to import
        except ModuleNotFoundError as error:
            remedy = "install it: `pip install 'cli-council[forge]'`"
            raise RefusedError(f"the package {error.name} is not installed", remedy) from error
        connection = await self._options.connection()
        http = ForgeHttp(connection.api, connection.headers, connection.remedies)
        self._http = await self._stack.enter_async_context(http)
        self._members = self._options.members(http)
        return self

    async def __aexit__(self, *raised: object) -> None:
        """Close the connection."""
        await self._stack.aclose()


class Members(ABC):
    """The users who may write to a repository."""

    def __init__(self, http: ForgeHttp) -> None:
        self.http = http
        self._asking = anyio.Lock()
        self._own: Any = None
        self._trusted: dict[Any, bool] = {}

    @abstractmethod
    async def read_own_user(self) -> Any:
        """Return the user of the token; None if it has none, such as the token of an app."""

    @abstractmethod
    async def may_write(self, user: Any) -> bool:
        """Return True if a user may write to the repository."""

    async def is_trusted(self, user: Any) -> bool:
        """Return True for the user of the token, and for users who may write to the repository."""
        async with self._asking:
            if self._own is None:
                self._own = await self.read_own_user() or ""
        if user in (None, "", self._own):
            return bool(user)
        async with self._asking:
            if user not in self._trusted:
                self._trusted[user] = await self.may_write(user)
        return self._trusted[user]


async def find_token(variable: str, command: Sequence[str]) -> str:
    """Return the token from a variable, or else from the forge's own CLI.

    Raises RefusedError if neither has one.
    """
    if token := os.environ.get(variable, "").strip():
        return token
    try:
        done = await run(command, env=os.environ, timeout=_TOKEN_TIMEOUT)
    except (OSError, TimeoutError):
        done = None
    token = "" if done is None or done.returncode else done.stdout.decode(errors="replace").strip()
    if not token:
        raise RefusedError(f"there is no token: ${variable} is not set", f"set it, or run `{command[0]} auth login`")
    return token
