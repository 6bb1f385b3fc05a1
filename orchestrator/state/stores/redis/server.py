"""The server of a store: URL, credentials, settings, and errors in one line."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.connection import parse_url as parse_server_url
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff

from orchestrator.domain.wording import quote_text
from orchestrator.errors import RefusedError, StoreFull, StoreUnavailable, StoreUnreachable
from orchestrator.protocols import PoolStatistics, ReplicaStatistics, ServerStatistics

PASSWORD: Final = "COUNCIL_REDIS_PASSWORD"  # noqa: S105  (the name of a variable)
PASSWORD_FILE: Final = f"{PASSWORD}_FILE"
TIMEOUT: Final = 5.0
"""Seconds without an answer after which a server counts as unreachable."""
SET_PASSWORD: Final = f"set {PASSWORD}, or {PASSWORD_FILE} to the path of a file that contains it"
_CONNECTIONS: Final = 16
_ATTEMPTS: Final = 3
_OLDEST: Final = (6, 2)
_WITH_WAITAOF: Final = (7, 2)
_TLS: Final = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"})
_URL_FORM: Final = (
    "use redis://[USER@]HOST[:PORT][/DATABASE][?prefix=NAME][&replicas=N], or rediss:// for TLS, with the options "
    + ", ".join(sorted(_TLS))
)


@dataclass(frozen=True, slots=True)
class Address:
    """The parts of a store's URL."""

    name: str
    """The server and its database, for messages."""
    options: Mapping[str, Any]
    """Options of the client: host, port, user, database, TLS."""
    prefix: str
    """Begins the name of each key."""
    replicas: int
    """The number of replicas that must have a durable commit on disk before it is acknowledged."""

    @property
    def user(self) -> str:
        """The user on the server."""
        return str(self.options.get("username", "default"))

    def __str__(self) -> str:
        return self.name


def parse_url(url: str) -> Address:
    """Parse the URL of a store.

    Raises RefusedError, also if it has a password, which state and logs would show.
    """
    try:
        parts = urlsplit(url)
        own = dict(parse_qsl(parts.query, keep_blank_values=True))
        database, port = parts.path.strip("/") or "0", parts.port or 6379
    except ValueError:
        raise RefusedError("the URL of the redis store is malformed", _URL_FORM) from None
    if parts.password is not None or "password" in own:
        raise RefusedError("the URL of the redis store has a password", f"remove it, and {SET_PASSWORD}")
    prefix, replicas = own.pop("prefix", "council"), own.pop("replicas", "0")
    unknown = own.keys() - (_TLS if parts.scheme == "rediss" else ())
    if not (parts.hostname and prefix and database.isdecimal() and replicas.isdecimal()) or unknown:
        raise RefusedError(f"{quote_text(url)} is not the URL of a redis store", _URL_FORM)
    options = parse_server_url(parts._replace(query=urlencode(own)).geturl())
    return Address(f"redis {parts.hostname}:{port}/{database}", {**options}, prefix, int(replicas))


def choose_wait(address: Address, info: Mapping[str, Any], config: Mapping[Any, Any]) -> tuple[int, int] | None:
    """Return the counts of `WAITAOF` that make a commit durable.

    None if each acknowledgement implies durability. Raises RefusedError for a server that may lose an acknowledged
    commit, with the commands that fix this.
    """
    version = tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])
    replicas, can_wait = int(info.get("connected_slaves", 0)), version >= _WITH_WAITAOF
    policy, eviction = config.get("appendfsync"), config.get("maxmemory-policy")
    problems: Sequence[tuple[bool, str, str]] = (
        (version < _OLDEST, f"the server is redis {info['redis_version']}", "upgrade it to 6.2 or newer, or to Valkey"),
        (
            info.get("redis_mode") == "cluster" or bool(info.get("cluster_enabled")),
            "the server is in cluster mode, where no commit is atomic",
            "use a server with `cluster-enabled no`",
        ),
        (info.get("role") != "master", "the server is a replica", "use the URL of the primary"),
        (
            replicas > address.replicas,
            f"it has {replicas} replicas, which may lack acknowledged commits after a failover",
            f"add `replicas={replicas}` to the URL, so that commits wait for them, or detach them",
        ),
        (
            address.replicas > 0 and not can_wait,
            f"redis {info['redis_version']} can't wait for the disks of replicas",
            "upgrade it to 7.2 or newer, or remove `replicas` from the URL",
        ),
        (config.get("appendonly") != "yes", "it loses its data when it stops", _set("appendonly", "yes")),
        (eviction != "noeviction", f"it evicts data ({eviction})", _set("maxmemory-policy", "noeviction")),
        (
            config.get("no-appendfsync-on-rewrite") != "no",
            "it does not sync its log while it rewrites it",
            _set("no-appendfsync-on-rewrite", "no"),
        ),
        (
            policy == "no" or (policy == "everysec" and not can_wait),
            f"with `appendfsync {policy}`, a power failure loses acknowledged commits",
            _set("appendfsync", "always"),
        ),
    )
    for is_wrong, what, remedy in problems:
        if is_wrong:
            raise RefusedError(f"{address}: {what}", remedy)
    return None if policy == "always" and not address.replicas else (1, address.replicas)


def _set(name: str, value: str) -> str:
    return f"`redis-cli config set {name} {value}` and `redis-cli config rewrite`"


@dataclass(frozen=True, slots=True)
class Server:
    """A connected server with suitable settings."""

    address: Address
    client: Any
    watcher: Any
    """A client for calls that wait for a change, each on its own connection."""
    wait: tuple[int, int] | None
    """See `choose_wait`."""


class CountedPool(BlockingConnectionPool):
    """A pool that counts the calls that wait for a connection."""

    waiting = 0

    async def get_connection(self, *_names: object, **_options: object) -> Any:
        """Return a free connection, or wait for one; the parameters have no effect."""
        self.waiting += 1
        try:
            return await super().get_connection()  # type: ignore[no-untyped-call]  # of the library
        finally:
            self.waiting -= 1

    @property
    def statistics(self) -> PoolStatistics:
        """The connections of the pool."""
        in_use = len(self._in_use_connections)
        return PoolStatistics(len(self._available_connections) + in_use, self.max_connections, in_use, self.waiting)


async def read_server(server: Server) -> ServerStatistics:
    """Return the state of a server: its connections, its replicas, and unsuitable settings."""
    info, config = await server.client.info(), await server.client.config_get()
    problem = remedy = ""
    try:
        choose_wait(server.address, info, config)
    except RefusedError as error:
        problem, remedy = error.message, error.remedy
    pool: CountedPool = server.client.connection_pool
    return ServerStatistics(
        f"redis {info['redis_version']}",
        int(info["connected_clients"]),
        int(config["maxclients"]),
        pool.statistics,
        _read_replicas(server.address, info),
        problem,
        remedy,
    )


def _read_replicas(address: Address, info: Mapping[str, Any]) -> Sequence[ReplicaStatistics]:
    found = [value for name, value in info.items() if name.startswith("slave") and name[5:].isdigit()]
    offset, is_synchronous = int(info["master_repl_offset"]), address.replicas >= len(found)
    return [
        ReplicaStatistics(
            f"{one['ip']}:{one['port']}",
            one["state"],
            is_synchronous,
            max(offset - int(one["offset"]), 0),
            float(one["lag"]),
        )
        for one in found
    ]


@asynccontextmanager
async def connect(address: Address, password: str | None) -> AsyncIterator[Server]:
    """Connect to a server and check its settings.

    Raises RefusedError or StoreUnavailable.
    """
    options = {
        **address.options,
        "password": password,
        "protocol": 2,
        "socket_timeout": TIMEOUT,
        "socket_connect_timeout": TIMEOUT,
        "socket_keepalive": True,
        "client_name": "council",
        # Each call can be repeated: a commit by its id. After a timeout, another attempt would not help.
        "retry": Retry(ExponentialWithJitterBackoff(0.5, 0.02), _ATTEMPTS - 1, (exceptions.ConnectionError,)),
    }
    pool = CountedPool(max_connections=_CONNECTIONS, timeout=None, **options)
    async with Redis.from_pool(pool) as client, Redis.from_pool(ConnectionPool(**options)) as watcher:
        with translated(address, refuse_denied=True):
            info, config = await client.info(), await client.config_get()
        yield Server(address, client, watcher, choose_wait(address, info, config))


@contextmanager
def translated(address: Address, *, refuse_denied: bool = False) -> Iterator[None]:
    """Raise StoreUnavailable in place of an error of the client.

    With `refuse_denied`, raise RefusedError for a wrong password or a missing privilege.
    """
    try:
        yield
    except exceptions.RedisError as error:
        found = to_store_error(address, error)
        if refuse_denied and _is_denied(error):
            raise RefusedError(found.message, found.remedy) from None
        raise found from error


def _is_denied(error: Exception) -> bool:
    """Return True if the password is wrong, or the user lacks a privilege."""
    denied = (exceptions.AuthenticationError, exceptions.NoPermissionError)
    return isinstance(error, denied) or "no permissions" in str(error) or "can't run this command" in str(error)


#: Text in errors of the server: the error, the description and the remedy.
_REPORTS: Final[Sequence[tuple[str, type[StoreUnavailable], str, str]]] = (
    ("maxmemory", StoreFull, "the server's memory is full", "raise `maxmemory`, or run `council state compact`"),
    ("No space left", StoreFull, "the server's disk is full", "free some space on it"),
    ("MISCONF", StoreUnavailable, "the server can't write to its disk", "check its disk and its log"),
    ("read only replica", StoreUnavailable, "the server has become a replica", "use the URL of the primary"),
    ("max number of clients", StoreUnavailable, "the server has no free connections", "raise `maxclients`"),
)


def to_store_error(address: Address, error: Exception) -> StoreUnavailable:
    """Convert an error of the client: what happened and how to fix it."""
    text, name = " ".join(str(error).split()), str(address)
    for part, kind, what, remedy in _REPORTS:
        if part in text:
            return kind(name, what, remedy)
    if isinstance(error, exceptions.AuthenticationError):
        return StoreUnavailable(name, f"the password of user {address.user!r} is missing or wrong", SET_PASSWORD)
    if _is_denied(error):
        remedy = f"`redis-cli acl setuser {address.user} '~{address.prefix}:*' +@all`"
        return StoreUnavailable(name, f"user {address.user!r} lacks a privilege: {text}", remedy)
    if isinstance(error, exceptions.TimeoutError):
        return StoreUnreachable(name, f"no answer in {TIMEOUT:g} s", "check the network and the load of the server")
    if any(isinstance(one, socket.gaierror) for one in (error.__cause__, error.__context__)):
        host = address.options.get("host")
        return StoreUnavailable(name, f"unknown host {host!r}", "correct the host in the URL")
    if isinstance(error, (exceptions.LockError, exceptions.WatchError)):
        return StoreUnavailable(name, "another process changed the log in the meantime", "try again")
    if isinstance(error, exceptions.ConnectionError):
        return StoreUnreachable(name, f"unreachable: {text}", "start the server, or correct the URL")
    return StoreUnavailable(name, f"the server failed: {text}", "see its log")
