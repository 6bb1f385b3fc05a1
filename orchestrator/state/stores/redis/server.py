"""The server of a store: URL, credentials, settings, and errors in one line."""

from __future__ import annotations

import os
import socket
import ssl
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
_RAISE_LIMIT: Final = "close other connections, then raise `maxclients`"
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

    def command(self, words: str) -> str:
        """Return a command for the server, as typed in a shell."""
        return f"`redis-cli -h {self.options['host']} -p {self.options.get('port', 6379)} {words}`"

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
        raise RefusedError("the URL of the Redis store is malformed", _URL_FORM) from None
    if parts.password is not None or "password" in own:
        raise RefusedError("the URL of the Redis store has a password", f"remove it, and {SET_PASSWORD}")
    prefix, replicas = own.pop("prefix", "council"), own.pop("replicas", "0")
    unknown = own.keys() - (_TLS if parts.scheme == "rediss" else ())
    if not (parts.hostname and prefix and database.isdecimal() and replicas.isdecimal()) or unknown:
        raise RefusedError(f"{quote_text(url)} is not the URL of a Redis store", _URL_FORM)
    options = parse_server_url(parts._replace(query=urlencode(own)).geturl())
    return Address(f"redis {parts.hostname}:{port}/{database}", {**options}, prefix, int(replicas))


def choose_wait(address: Address, info: Mapping[str, Any], config: Mapping[Any, Any]) -> tuple[int, int] | None:
    """Return the counts of `WAITAOF` that make a commit durable.

    None if each acknowledgement implies durability. Raises RefusedError for a server that may lose an acknowledged
    commit, with the commands that fix this.
    """
    # Valkey reports the version of Redis with which it is compatible.
    version = tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])
    replicas, can_wait = find_replicas(info), version >= _WITH_WAITAOF
    policy, eviction = config.get("appendfsync"), config.get("maxmemory-policy")

    def change(setting: str) -> str:
        lasts = address.command("config rewrite") if info.get("config_file") else f"start it with `--{setting}`"
        return f"{address.command(f'config set {setting}')}, and to make this permanent {lasts}"

    problems: Sequence[tuple[bool, str, str]] = (
        (version < _OLDEST, f"the server is {describe_version(info)}", "upgrade it to 6.2 or newer, or to Valkey"),
        (
            info.get("redis_mode") == "cluster" or bool(info.get("cluster_enabled")),
            "the server is in cluster mode, where no commit is atomic",
            "start the server with `--cluster-enabled no`",
        ),
        (
            info.get("role") != "master",
            "the server is a replica",
            f"use the URL of the primary, {info.get('master_host')}:{info.get('master_port')}",
        ),
        (
            len(replicas) > address.replicas,
            f"it has {len(replicas)} replicas, which may lack acknowledged commits after a failover",
            f"add `replicas={len(replicas)}` to the URL, so that commits wait for them, or detach them: "
            + " and ".join(f"`redis-cli -h {one['ip']} -p {one['port']} replicaof no one`" for one in replicas),
        ),
        (
            address.replicas > 0 and not can_wait,
            f"{describe_version(info)} can't wait for the disks of replicas",
            "upgrade it to 7.2 or newer, or remove `replicas` from the URL",
        ),
        (config.get("appendonly") != "yes", "it loses its data when it stops", change("appendonly yes")),
        (eviction != "noeviction", f"it evicts data ({eviction})", change("maxmemory-policy noeviction")),
        (
            config.get("no-appendfsync-on-rewrite") != "no",
            "it does not sync its log while it rewrites it",
            change("no-appendfsync-on-rewrite no"),
        ),
        (
            policy == "no" or (policy == "everysec" and not can_wait),
            f"with `appendfsync {policy}`, a power failure loses acknowledged commits",
            change("appendfsync always"),
        ),
    )
    for is_wrong, what, remedy in problems:
        if is_wrong:
            raise RefusedError(f"{address}: {what}", remedy)
    return None if policy == "always" and not address.replicas else (1, address.replicas)


def find_replicas(info: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the attached replicas of a server."""
    return [one for name, one in info.items() if name.startswith("slave") and name[5:].isdigit()]


def describe_version(info: Mapping[str, Any]) -> str:
    """Return the name and the version of a server."""
    return f"valkey {info['valkey_version']}" if "valkey_version" in info else f"redis {info['redis_version']}"


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
        describe_version(info),
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
        with translated(address):
            info, config = await client.info(), await client.config_get()
        yield Server(address, client, watcher, choose_wait(address, info, config))


@contextmanager
def translated(address: Address) -> Iterator[None]:
    """Raise StoreUnavailable in place of an error of the client."""
    try:
        yield
    except exceptions.RedisError as error:
        raise to_store_error(address, error) from error


#: Text in errors of a script, which have no class, if the user lacks a privilege.
_DENIED: Final = ("no permissions", "can't run this command", "can't access at least one of the keys")
#: Text in errors of the server: the error, the description and the remedy.
_REPORTS: Final[Sequence[tuple[str, type[StoreUnavailable], str, str]]] = (
    ("maxmemory", StoreFull, "the server's memory is full", "raise `maxmemory`, or run `council state compact`"),
    ("No space left", StoreFull, "the server's disk is full", "free some space on it"),
    ("MISCONF", StoreUnavailable, "the server can't write to its disk", "check its disk and its log"),
    ("read only replica", StoreUnavailable, "the server has become a replica", "use the URL of the primary"),
    ("max number of clients", StoreUnavailable, "it has its maximum of connections", _RAISE_LIMIT),
)


def to_store_error(address: Address, error: Exception) -> StoreUnavailable:
    """Convert an error of the client: what happened and how to fix it."""
    text, name = " ".join(str(error).split()), str(address)
    for part, kind, what, remedy in _REPORTS:
        if part in text:
            return kind(name, what, remedy)
    if isinstance(error, exceptions.AuthenticationError):
        what, remedy = f"the password of user {address.user!r} is missing or wrong", SET_PASSWORD
        if "disabled" in text:
            what += ", or the user is disabled"
            remedy += f", or enable the user: {address.command(f'acl setuser {address.user} on')}"
        return StoreUnavailable(name, what, remedy)
    if isinstance(error, exceptions.NoPermissionError) or any(words in text for words in _DENIED):
        right = f"'~{address.prefix}:*'" if "access" in text else "+@all"
        remedy = address.command(f"acl setuser {address.user} {right}")
        return StoreUnavailable(name, f"user {address.user!r} lacks a privilege: {text}", remedy)
    if isinstance(error, exceptions.TimeoutError):
        return StoreUnreachable(name, f"no answer in {TIMEOUT:g} s", "check the network and the load of the server")
    if any(isinstance(one, socket.gaierror) for one in (error.__cause__, error.__context__)):
        host = address.options.get("host")
        return StoreUnavailable(name, f"unknown host {host!r}", "correct the host in the URL")
    if isinstance(error, (exceptions.LockError, exceptions.WatchError)):
        return StoreUnavailable(name, "another process changed the log in the meantime", "try again")
    if isinstance(error, exceptions.ConnectionError):
        # The text of the client repeats the address, which `name` has.
        causes = (one for one in (error.__cause__, error.__context__) if isinstance(one, OSError))
        cause = next((one.errno for one in causes if not isinstance(one, ssl.SSLError | socket.gaierror)), None)
        reason = text if cause is None else os.strerror(cause)
        return StoreUnreachable(name, f"unreachable: {reason}", "start the server, or correct the URL")
    return StoreUnavailable(name, f"the server failed: {text}", "see its log")
