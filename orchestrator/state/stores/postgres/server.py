"""The server of a store: URL, credentials, connections, and errors in one line."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import anyio
import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from orchestrator.domain.wording import quote_text
from orchestrator.errors import RefusedError, StoreFull, StoreUnavailable, StoreUnreachable
from orchestrator.protocols import PoolStatistics
from orchestrator.state.stores.servers import read_password

T = TypeVar("T")

# Lost connections are reported as errors of the store, not as warnings of the client library on standard error.
logging.getLogger("psycopg").addHandler(logging.NullHandler())

Connection = psycopg.AsyncConnection[Any]

PASSWORD: Final = "COUNCIL_POSTGRES_PASSWORD"  # noqa: S105  (the name of a variable)
PASSWORD_FILE: Final = f"{PASSWORD}_FILE"
TIMEOUT: Final = 5.0
"""Seconds without an answer after which a server counts as unreachable."""
MAINTENANCE_TIMEOUT: Final = 600.0
"""The same for statements that read the whole log."""
_SET_PASSWORD: Final = (
    f"set {PASSWORD}, or {PASSWORD_FILE} to the path of a file that contains it, or use ~/.pgpass (mode 600)"
)
_ALL_USED: Final = "it has its maximum of connections"
_RAISE_LIMIT: Final = "close other connections, raise `max_connections`, or use a pooler"
_URL_FORM: Final = "use postgresql://[USER@]HOST[:PORT]/DATABASE[?schema=NAME][&sslmode=verify-full]"
_PORT: Final = 5432
_CONNECTIONS: Final = 4
_PAUSES: Final = (0, 0.2, 0.6)
"""Seconds between attempts. The first retry is immediate: the server may have closed an idle connection."""
_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,39}")
#: Options of the client library, for which the URL may have other values.
_DEFAULTS: Final[Mapping[str, str | int]] = {
    "application_name": "council",
    "connect_timeout": int(TIMEOUT),
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


@dataclass(frozen=True, slots=True)
class Address:
    """The parts of a store's URL."""

    options: Mapping[str, Any]
    """Options of the client library: host, port, user, database, TLS."""
    schema: str
    """The schema that contains the tables."""

    def option(self, name: str, fallback: str = "") -> str:
        """Return an option of the URL, or its default in the environment of this process, or `fallback`."""
        defaults = {one.keyword: one.val for one in psycopg.pq.Conninfo.get_defaults()}
        return str(self.options.get(name) or (defaults[name.encode()] or b"").decode() or fallback)

    @property
    def user(self) -> str:
        """The user on the server."""
        return self.option("user")

    @property
    def database(self) -> str:
        """The database; the server's default is named like the user."""
        return self.option("dbname", self.user)

    @property
    def host(self) -> str:
        """The host, or several hosts separated by commas."""
        return self.option("host", "localhost")

    def __str__(self) -> str:
        hosts, ports = self.host.split(","), self.option("port").split(",")
        pairs = zip(hosts, ports if len(ports) > 1 else ports * len(hosts), strict=False)
        return f"postgresql {','.join(f'{host}:{port or _PORT}' for host, port in pairs)}/{self.database}"


def parse_url(url: str) -> Address:
    """Parse the URL of a store.

    Raises RefusedError, also if it has a password, which state and logs would show.
    """
    try:
        parts = urlsplit(url)
        if "," not in parts.netloc:  # several hosts, for a failover
            _ = parts.port  # raises ValueError
        own = dict(parse_qsl(parts.query, keep_blank_values=True))
        schema = own.pop("schema", "council")
        options = conninfo_to_dict(parts._replace(query=urlencode(own)).geturl())
    except (ValueError, psycopg.Error):
        raise RefusedError("the URL of the PostgreSQL store is malformed", _URL_FORM) from None
    if "password" in options or "sslpassword" in options:
        raise RefusedError("the URL of the PostgreSQL store has a password", f"remove it, and {_SET_PASSWORD}")
    if not _SCHEMA.fullmatch(schema):
        raise RefusedError(f"{quote_text(schema)} is not the name of a schema", "use letters, digits and underscores")
    return Address(options, schema)


class Server:
    """Connections to a server; created by `connect`."""

    def __init__(self, address: Address, options: Mapping[str, Any]) -> None:
        self.address = address
        self._options = options
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            kwargs=dict(options),
            min_size=1,
            max_size=_CONNECTIONS,
            timeout=TIMEOUT,
            reconnect_timeout=1.0,  # after this, the next call connects
            open=False,
        )
        self._is_down = False

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str) -> AsyncIterator[Server]:
        """Connect to the server at a URL. Raises RefusedError or StoreUnavailable."""
        address = parse_url(url)
        options: dict[str, Any] = {**_DEFAULTS, **address.options, "autocommit": True, "prepare_threshold": None}
        if password := await anyio.to_thread.run_sync(read_password, os.environ, "postgresql", PASSWORD, _SET_PASSWORD):
            options["password"] = password
        server = cls(address, options)
        await server._retry(server.check_reachable)
        server._is_down = False
        try:
            await server._pool.open()
            yield server
        finally:
            with anyio.CancelScope(shield=True):
                await server._pool.close()

    def sql(self, text: str) -> str:
        """Return an SQL text of this package with the names of this store."""
        names = {"schema": f'"{self.address.schema}"', "channel": self.channel}
        for name, value in names.items():
            text = text.replace(f"{{{name}}}", value)
        return text

    @property
    def channel(self) -> str:
        """The channel that announces commits."""
        return f"council.{self.address.schema}"

    @property
    def pool(self) -> PoolStatistics:
        """The connections of the pool."""
        found = self._pool.get_stats()
        size, free = found["pool_size"], found["pool_available"]
        return PoolStatistics(size, _CONNECTIONS, size - free, found["requests_waiting"])

    async def open_connection(self) -> Connection:
        """Return a new connection that is not part of the pool. Raises StoreUnavailable."""
        with self.translated():
            try:
                return await psycopg.AsyncConnection.connect(**self._options)
            except psycopg.Error:
                self._is_down = True
                raise

    async def check_reachable(self) -> None:
        """Raise the error of a new connection, if any.

        Errors of the pool do not have the cause.
        """
        connection = await self.open_connection()
        await connection.close()

    async def _reconnect(self) -> None:
        """Replace all connections; a check of a silent one would wait. Raises StoreUnavailable."""
        await self.check_reachable()
        if self._is_down:
            self._is_down = False
            await self._pool.drain()

    @asynccontextmanager
    async def connection(self, limit: float = TIMEOUT) -> AsyncIterator[Connection]:
        """Provide a connection with a timeout for each statement.

        Raises StoreUnavailable.
        """
        if self._is_down:
            await self._reconnect()
        with self.translated():
            try:
                connection = await self._pool.getconn()
            except PoolTimeout:
                await self.check_reachable()
                raise
            try:
                with self.time_limit(connection, limit):
                    yield connection
            finally:
                with anyio.CancelScope(shield=True):
                    await self._pool.putconn(connection)

    @contextmanager
    def time_limit(self, connection: Connection, seconds: float = TIMEOUT) -> Iterator[None]:
        """Raise StoreUnavailable if the statements of the block take longer."""
        loop = asyncio.get_running_loop()
        deadline = loop.call_later(seconds, _interrupt, connection)
        try:
            yield
        except (psycopg.OperationalError, psycopg.InterfaceError):
            if loop.time() < deadline.when():
                raise
            self._is_down = True
            raise _no_answer(self.address, seconds) from None  # no cause: another attempt would not help
        finally:
            deadline.cancel()

    async def run(self, call: Callable[[Connection], Awaitable[T]], limit: float = TIMEOUT) -> T:
        """Return the result of `call`, which is repeated on a new connection if its connection fails."""

        async def attempt() -> T:
            async with self.connection(limit) as connection:
                return await call(connection)

        return await self._retry(attempt)

    async def _retry(self, call: Callable[[], Awaitable[T]]) -> T:
        for pause in _PAUSES:
            try:
                return await call()
            except StoreUnavailable as error:
                if not is_disconnected(error.__cause__):
                    raise
            self._is_down = True
            await anyio.sleep(pause)
        return await call()

    async def fetch(
        self, query: str, parameters: Mapping[str, Any] | None = None, *, limit: float = TIMEOUT
    ) -> list[tuple[Any, ...]]:
        """Return the rows of a query, which is repeated if the connection fails."""

        async def execute(connection: Connection) -> list[tuple[Any, ...]]:
            return await fetch(connection, query, parameters)

        return await self.run(execute, limit)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raise StoreUnavailable for errors of the client library."""
        try:
            yield
        except (psycopg.Error, PoolTimeout) as error:
            raise to_store_error(self.address, error) from error


async def fetch(
    connection: Connection, query: str, parameters: Mapping[str, Any] | None = None
) -> list[tuple[Any, ...]]:
    """Return the rows of a query on a connection."""
    cursor = await connection.execute(query, parameters, binary=True)
    return await cursor.fetchall()


def _interrupt(connection: Connection) -> None:
    """Close a connection's socket, so that its statement fails immediately.

    Used if the server does not respond.
    """
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as one:
        one.shutdown(socket.SHUT_RDWR)


def is_disconnected(error: BaseException | None) -> bool:
    """Return True for an error of a connection that was lost; another one may succeed."""
    if not isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)):
        return False
    if isinstance(error, (PoolTimeout, psycopg.errors.ConnectionTimeout)) or "FATAL" in str(error):
        return error.sqlstate is not None and error.sqlstate.startswith("57P")
    return error.sqlstate is None or error.sqlstate.startswith(("57P", "08"))


_Report = tuple[str, type[StoreUnavailable], str, str]
#: States of errors of the server, or words in them, and what to report. A refused connection has no state.
_REPORTS: Final[Sequence[_Report]] = (
    ("53100", StoreFull, "the server's disk is full", "free space on it"),
    ("53200", StoreUnavailable, "the server is out of memory", "add memory, or reduce its connections"),
    ("25006", StoreUnavailable, "the server accepts no writes", "use the URL of the primary"),
    ("42501", StoreUnavailable, "user {user!r} lacks a privilege: {text}", "{grant}"),
    ("42P01", StoreUnavailable, "the tables of the store are missing: {text}", "restore them, or use another schema"),
    ("the database system is", StoreUnreachable, "{text}", "wait for it, or see the server's log"),
    ("password authentication failed", StoreUnavailable, "the password of user {user!r} is wrong", _SET_PASSWORD),
    ("no password supplied", StoreUnavailable, "user {user!r} needs a password", _SET_PASSWORD),
    ("pg_hba.conf", StoreUnavailable, "the server accepts no such connection: {text}", "add it to pg_hba.conf"),
    ("not permitted to log in", StoreUnavailable, "{text}", "`ALTER ROLE {role} LOGIN`"),
    ("connections for role", StoreUnavailable, "{text}", "`ALTER ROLE {role} CONNECTION LIMIT -1`"),
    ("connections for database", StoreUnavailable, "{text}", "`ALTER DATABASE {database} CONNECTION LIMIT -1`"),
    ("too many", StoreUnavailable, _ALL_USED, _RAISE_LIMIT),
    ("remaining connection slots", StoreUnavailable, _ALL_USED, _RAISE_LIMIT),
    ("permission denied for database", StoreUnavailable, "{text}", "`GRANT CONNECT ON DATABASE {database} TO {role}`"),
    ("role ", StoreUnavailable, "{text}", "`CREATE ROLE {role} LOGIN PASSWORD '…'`, or correct the user in the URL"),
    ("database ", StoreUnavailable, "{text}", "`CREATE DATABASE {database}`, or correct the database in the URL"),
    ("resolve host", StoreUnavailable, "unknown host {host!r}", "correct its name in the URL"),
    ("translate host", StoreUnavailable, "unknown host {host!r}", "correct its name in the URL"),
    ("SSL", StoreUnavailable, "TLS failed: {text}", "correct `sslmode` or `sslrootcert` in the URL"),
    ("certificate", StoreUnavailable, "TLS failed: {text}", "correct `sslmode` or `sslrootcert` in the URL"),
    ("No space left", StoreFull, "the server's disk is full", "free space on it"),
)
#: Objects in "permission denied for OBJECT NAME", and the privilege that is missing.
_GRANTS: Final[Mapping[str, str]] = {
    "database": "CREATE ON DATABASE {database}",
    "schema": "ALL ON SCHEMA {schema}",
    "function": "EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema}",
    "": "ALL ON ALL TABLES IN SCHEMA {schema}",
}


def to_store_error(address: Address, error: Exception) -> StoreUnavailable:
    """Return the store's error, with a remedy, for an error of the client library."""
    text = _summary(error)
    names = {"role": address.user, "database": address.database, "schema": address.schema}
    facts = {name: psycopg.sql.Identifier(value).as_string() for name, value in names.items()}
    grant = next(grant for kind, grant in _GRANTS.items() if f"denied for {kind}" in text or not kind)
    facts |= {"text": text, "user": address.user, "host": address.host}
    facts |= {"grant": f"`GRANT {grant} TO {{role}}`".format(**facts)}
    state = getattr(error, "sqlstate", None) or ""
    for words, kind, what, remedy in _REPORTS:
        if words == state or words in text:
            return kind(str(address), what.format(**facts), remedy.format(**facts))
    if isinstance(error, PoolTimeout):
        return StoreUnavailable(str(address), f"no free connection in {TIMEOUT:g} s", "check the load of the server")
    if isinstance(error, psycopg.errors.ConnectionTimeout) or "timeout" in text:
        return _no_answer(address, TIMEOUT)
    if isinstance(error, psycopg.OperationalError):
        return StoreUnreachable(str(address), f"unreachable: {text}", "start the server, or correct the URL")
    return StoreUnavailable(str(address), f"the server failed: {text}", "see its log")


def _no_answer(address: Address, seconds: float) -> StoreUnreachable:
    return StoreUnreachable(str(address), f"no answer in {seconds:g} s", "check the network and the load of the server")


def _summary(error: Exception) -> str:
    """Return an error's message on one line, without the names of the host."""
    message = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    lines = [line for line in (message or str(error)).splitlines() if line.strip()]
    # Of several addresses of a host, each failure is an item of a list; hints are in further lines.
    (reason,) = [line for line in lines if line.startswith("- ")][-1:] or lines[:1] or [type(error).__name__]
    line = next((line for line in lines if "FATAL:" in line), reason)
    return re.sub(r".*(FATAL:| failed: |connection is bad: )", "", line).strip()
