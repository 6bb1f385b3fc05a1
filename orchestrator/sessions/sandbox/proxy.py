"""An HTTP proxy that connects a session to the hosts in `network.allow`, and to no others.

It accepts `CONNECT host:port` and requests with an absolute `http:` URL. It refuses requests without the session's
token, hosts that no entry names, and names that resolve to an address that is not public. A name is resolved once, by
the proxy, which then connects to the address that it has checked.

Connections, lookups, the size of a request's head and all waiting times are limited.
"""

from __future__ import annotations

import re
import socket
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hmac import compare_digest
from http import HTTPStatus
from ipaddress import ip_address
from secrets import token_hex
from typing import Final

import anyio
import anyio.abc
from anyio.streams.buffered import BufferedByteStream

from orchestrator.domain.security.hosts import (
    LOCALHOST,
    LOOPBACK,
    Address,
    AllowedHost,
    addresses_to_try,
    canonical_host,
    is_allowed,
    parse_allowed_host,
    split_authority,
)
from orchestrator.sessions.socket.connections import accept_connection

PROXY_USER: Final = "council"
#: Bytes of a request's first line and its headers.
MAX_HEAD_BYTES: Final = 16 << 10

_MOST_LOOKUPS: Final = 4  # at once; each takes a thread
_MOST_ADDRESSES: Final = 8  # of a name
_MOST_DENIED: Final = 100  # recorded
_MOST_DRAINED: Final = 16  # chunks of a request that is refused
_CHUNK: Final = 64 << 10
_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST: Final = re.compile(rf"({_TOKEN}) ([\x21-\x7e]+) HTTP/1\.[01]")
_HEADER: Final = re.compile(rf"({_TOKEN}):[ \t]*([^\x00\r\n]*?)[ \t]*")
_LENGTH: Final = re.compile(r"[0-9]{1,18}")
_URL: Final = re.compile(r"(?i:http)://([^/?#]*)((?:/[^?#]*)?(?:\?[^#]*)?)")
# Those of one connection (RFC 9110, section 7.6.1), and those that are written anew.
_DROPPED: Final = frozenset(
    {"connection", "host", "keep-alive", "proxy-authorization", "proxy-connection", "te", "trailer", "upgrade"}
)

_DISCONNECTED: Final = (
    OSError,
    anyio.EndOfStream,
    anyio.IncompleteRead,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
)

Resolver = Callable[[str], Awaitable[Sequence[Address]]]


@dataclass(frozen=True, slots=True)
class ProxyTimeouts:
    """How long the proxy waits, in seconds."""

    head: float = 10.0
    """For the head of a request, from its first byte to its last."""
    connect: float = 30.0
    """For the lookup of a name, and for each connection attempt."""
    idle: float = 900.0
    """For the next byte in either direction. A model may take minutes to answer."""


class _RefusedRequest(Exception):
    def __init__(self, status: HTTPStatus, what: str, *headers: str) -> None:
        super().__init__(what)
        self.status, self.what, self.headers = status, what, headers

    @property
    def response(self) -> bytes:
        body = f"council: {self.what}\n".encode()
        lines = (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}",
            *self.headers,
            "Content-Type: text/plain; charset=utf-8",
            f"Content-Length: {len(body)}",
            "Connection: close",
        )
        return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass(frozen=True, slots=True)
class _Request:
    """What a client asks for: `head` is what its host gets to read first, None where a tunnel is wanted."""

    host: str
    port: int
    head: bytes | None = None
    length: int = 0


async def resolve_host(host: str) -> Sequence[Address]:
    """Return the addresses of a name, as all programs of the machine get them. Raises OSError."""
    found = await anyio.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(ip_address(address[0]) for _, _, _, _, address in found))


@dataclass(slots=True)
class Proxy:
    """The proxy of one session: `hosts` are entries of `network.allow`, `token` is the session's password for it."""

    hosts: Sequence[str]
    resolve: Resolver = resolve_host
    most_connections: int = 64
    """At once; further ones wait."""
    timeouts: ProxyTimeouts = field(default_factory=ProxyTimeouts)
    token: str = field(default_factory=lambda: token_hex(16))
    denied: dict[str, None] = field(default_factory=dict)
    """The first hosts with their ports that were asked for and refused, each once."""
    _entries: tuple[AllowedHost, ...] = field(init=False)
    _lookups: anyio.Semaphore = field(default_factory=lambda: anyio.Semaphore(_MOST_LOOKUPS), init=False)

    def __post_init__(self) -> None:
        """Read the entries, which a config has been checked for."""
        self._entries = tuple(map(parse_allowed_host, self.hosts))

    @property
    def secrets(self) -> tuple[str, str]:
        """What no log may show: the token, and what a program makes of it for its requests."""
        return self.token, b64encode(f"{PROXY_USER}:{self.token}".encode()).decode()

    def variables(self, port: int, direct: Sequence[str]) -> Mapping[str, str]:
        """Return the variables by which programs find the proxy at a port of their loopback.

        `direct` are hosts that are reached without it, less those that an entry names.
        """
        url = f"http://{PROXY_USER}:{self.token}@127.0.0.1:{port}"
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        own = ",".join(host for host in direct if host not in {entry.host for entry in self._entries})
        return {
            **{name: url for upper in names for name in (upper, upper.lower())},
            **({} if not own else {"NO_PROXY": own, "no_proxy": own}),
            "NODE_USE_ENV_PROXY": "1",
        }

    async def serve(self, listener: anyio.abc.SocketListener) -> None:
        """Serve connections until cancelled; close the listener then."""
        slots = anyio.Semaphore(self.most_connections)
        async with listener, anyio.create_task_group() as group:
            while True:
                await slots.acquire()  # the others wait in the kernel's queue
                group.start_soon(self._handle, await accept_connection(listener), slots)

    async def _handle(self, stream: anyio.abc.SocketStream, slots: anyio.Semaphore) -> None:
        try:
            async with stream:
                try:
                    await self._answer(BufferedByteStream(stream))
                except _RefusedRequest as refused:
                    await self._refuse(stream, refused)
        except _DISCONNECTED:
            return
        finally:
            slots.release()

    async def _refuse(self, stream: anyio.abc.SocketStream, refused: _RefusedRequest) -> None:
        with anyio.move_on_after(self.timeouts.head):
            await stream.send(refused.response)
            await stream.send_eof()
            # Closed with something unread, a connection is reset, and the client may never see the answer.
            for _ in range(_MOST_DRAINED):
                await stream.receive(_CHUNK)

    async def _answer(self, client: BufferedByteStream) -> None:
        request = _read_request(await self._head(client), self.token)
        async with await self._connect(request) as server:
            if request.head is None:
                await client.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                await server.send(request.head)
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    limit = None if request.head is None else request.length
                    group.start_soon(self._copy, client, server, scope, limit)
                    group.start_soon(self._copy, server, client, scope)

    async def _head(self, client: BufferedByteStream) -> bytes:
        try:
            with anyio.fail_after(self.timeouts.head):
                head = await client.receive_until(b"\r\n\r\n", MAX_HEAD_BYTES)
        except TimeoutError:
            raise _RefusedRequest(HTTPStatus.REQUEST_TIMEOUT, "no whole request came in time") from None
        except anyio.DelimiterNotFound:
            head = b" " * (MAX_HEAD_BYTES + 1)
        if len(head) > MAX_HEAD_BYTES:
            what = f"the head of the request is larger than {MAX_HEAD_BYTES} bytes"
            raise _RefusedRequest(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, what)
        return head

    async def _connect(self, request: _Request) -> anyio.abc.SocketStream:
        """Connect to the host of a request, if the session may reach it."""
        host, port = request.host, request.port
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if not is_allowed(self._entries, host, port):
            self._note(shown)
            raise _RefusedRequest(HTTPStatus.FORBIDDEN, f"{shown} is not among the hosts of `network.allow`")
        addresses = addresses_to_try(self._entries, host, port, await self._look_up(host, shown))
        if not addresses:
            self._note(shown)
            what = f"{shown} has an address that is not public: name the address itself under `network.allow`"
            raise _RefusedRequest(HTTPStatus.FORBIDDEN, what)
        why = ""
        for address in addresses[:_MOST_ADDRESSES]:
            try:
                with anyio.fail_after(self.timeouts.connect):
                    return await anyio.connect_tcp(str(address), port)
            except TimeoutError:
                why = "it does not answer"
            except OSError as error:
                why = str(error)
        raise _RefusedRequest(HTTPStatus.BAD_GATEWAY, f"{shown} can't be reached: {why}")

    async def _look_up(self, host: str, shown: str) -> Sequence[Address]:
        if host == LOCALHOST:
            return LOOPBACK
        try:
            return (ip_address(host),)
        except ValueError:
            pass
        try:
            with anyio.fail_after(self.timeouts.connect):
                async with self._lookups:
                    return await self.resolve(host)
        except (OSError, UnicodeError, TimeoutError) as error:
            what = f"{shown} can't be reached: its name has no address ({error})"
            raise _RefusedRequest(HTTPStatus.BAD_GATEWAY, what) from None

    def _note(self, shown: str) -> None:
        if len(self.denied) < _MOST_DENIED:
            self.denied[shown] = None

    async def _copy(
        self,
        source: anyio.abc.ByteStream,
        target: anyio.abc.ByteStream,
        scope: anyio.CancelScope,
        limit: int | None = None,
    ) -> None:
        """Copy at most `limit` bytes. `scope` is cancelled on an error, and when nothing was copied for too long."""
        left = limit
        try:
            while left is None or left:
                scope.deadline = anyio.current_time() + self.timeouts.idle
                try:
                    data = await source.receive(_CHUNK if left is None else min(_CHUNK, left))
                except anyio.EndOfStream:
                    break
                await target.send(data)
                left = None if left is None else left - len(data)
            # Some servers drop a request whose client has closed its side.
            if limit is None:
                await target.send_eof()
        except _DISCONNECTED:
            scope.cancel()


def _read_request(head: bytes, token: str) -> _Request:
    """Return what is asked for; what could be read in two ways is refused."""
    try:
        first, *lines = head.decode("ascii").split("\r\n")
    except UnicodeDecodeError:
        raise _bad_request("the head of the request is not ASCII") from None
    asked, found = _REQUEST.fullmatch(first), [_HEADER.fullmatch(line) for line in lines]
    headers = [(one[1], one[2]) for one in found if one is not None]
    if asked is None or len(headers) < len(found):
        raise _bad_request("this is no request of HTTP/1.1")
    _check_token([value for name, value in headers if name.lower() == "proxy-authorization"], token)
    if asked[1] == "CONNECT":
        host, port = _authority(asked[2])
        if port is None:
            raise _bad_request("CONNECT needs a host and a port")
        return _Request(host, port)
    url = _URL.fullmatch(asked[2])
    if url is None:
        raise _bad_request("a proxy takes CONNECT, or a URL that begins with http://")
    host, port = _authority(url[1])
    path = url[2] if url[2].startswith("/") else f"/{url[2]}"
    head, length = _build_forwarded_head(f"{asked[1]} {path} HTTP/1.1", url[1], headers)
    return _Request(host, 80 if port is None else port, head, length)


def _check_token(given: Sequence[str], token: str) -> None:
    expected = b64encode(f"{PROXY_USER}:{token}".encode()).decode()
    scheme, _, value = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    if scheme.lower() != "basic" or not compare_digest(value.strip(), expected):
        raise _RefusedRequest(
            HTTPStatus.PROXY_AUTHENTICATION_REQUIRED,
            "this proxy is for one session only, which has its password in HTTPS_PROXY",
            f'Proxy-Authenticate: Basic realm="{PROXY_USER}"',
        )


def _authority(text: str) -> tuple[str, int | None]:
    try:
        host, port = split_authority(text)
        return canonical_host(f"[{host}]" if ":" in host else host), port
    except ValueError as error:
        raise _bad_request(f"the host can't be used, {error}") from None


def _build_forwarded_head(first: str, authority: str, headers: Sequence[tuple[str, str]]) -> tuple[bytes, int]:
    """Return the head of a plain request as its host gets it, and how many bytes follow.

    One request a connection: a second one could be for another host.
    """
    named = {one.strip().lower() for name, value in headers if name.lower() == "connection" for one in value.split(",")}
    kept = [(name, value) for name, value in headers if name.lower() not in _DROPPED | (named - {"content-length"})]
    lengths = [value for name, value in kept if name.lower() == "content-length"]
    if any(name.lower() == "transfer-encoding" for name, _ in headers):
        raise _RefusedRequest(HTTPStatus.LENGTH_REQUIRED, "the request needs a Content-Length, or https")
    if len(lengths) > 1 or any(_LENGTH.fullmatch(value) is None for value in lengths):
        raise _bad_request("the Content-Length is none")
    lines = [first, f"Host: {authority}", *(f"{name}: {value}" for name, value in kept), "Connection: close", "", ""]
    return "\r\n".join(lines).encode("ascii"), int(lengths[0]) if lengths else 0


def _bad_request(what: str) -> _RefusedRequest:
    return _RefusedRequest(HTTPStatus.BAD_REQUEST, what)
