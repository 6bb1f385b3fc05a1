"""HTTP proxy that connects a session only to the hosts in `network.allow`.

It accepts `CONNECT host:port` and requests with an absolute `http:` URL. It refuses requests without the session's
token, hosts without an entry, and names that resolve to a non-public address. The proxy resolves each name once and
connects to the address that it has checked.

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
#: Maximum bytes of a request line and its headers.
MAX_HEAD_BYTES: Final = 16 << 10

_MAX_LOOKUPS: Final = 4  # concurrent; each takes a thread
_MAX_ADDRESSES: Final = 8  # tried per name
_MAX_DENIED: Final = 100  # recorded
_MAX_DRAINED: Final = 16  # chunks of a rejected request
_CHUNK: Final = 64 << 10
_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105  (RFC 9110, section 5.6.2)
_REQUEST: Final = re.compile(rf"({_TOKEN}) ([\x21-\x7e]+) HTTP/1\.[01]")
_HEADER: Final = re.compile(rf"({_TOKEN}):[ \t]*([^\x00\r\n]*?)[ \t]*")
_LENGTH: Final = re.compile(r"[0-9]{1,18}")
_URL: Final = re.compile(r"(?i:http)://([^/?#]*)((?:/[^?#]*)?(?:\?[^#]*)?)")
# Hop-by-hop headers (RFC 9110, section 7.6.1), and the headers that the proxy writes itself.
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
    """The timeouts of the proxy, in seconds."""

    head: float = 10.0
    """For receiving the whole head of a request."""
    connect: float = 30.0
    """For each name lookup and each connection attempt."""
    idle: float = 900.0
    """For the next byte in either direction. A model may take minutes to answer."""


class _RefusedRequest(Exception):
    def __init__(self, status: HTTPStatus, message: str, *headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers

    @property
    def response(self) -> bytes:
        body = f"council: {self.message}\n".encode()
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
    """A client's request: `head` is forwarded to the host first; None for a tunnel."""

    host: str
    port: int
    head: bytes | None = None
    length: int = 0


async def resolve_host(host: str) -> Sequence[Address]:
    """Return the addresses of a name from the system resolver. Raises OSError."""
    infos = await anyio.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(ip_address(address[0]) for _, _, _, _, address in infos))


@dataclass(slots=True)
class Proxy:
    """A session's proxy to `hosts`, in the format of `network.allow`.

    `token` is the session's proxy password.
    """

    hosts: Sequence[str]
    resolve: Resolver = resolve_host
    max_connections: int = 64
    """The number of concurrent connections; further ones wait."""
    timeouts: ProxyTimeouts = field(default_factory=ProxyTimeouts)
    token: str = field(default_factory=lambda: token_hex(16))
    denied: dict[str, None] = field(default_factory=dict)
    """The first distinct `host:port` values that were denied."""
    _entries: tuple[AllowedHost, ...] = field(init=False)
    _lookups: anyio.Semaphore = field(default_factory=lambda: anyio.Semaphore(_MAX_LOOKUPS), init=False)

    def __post_init__(self) -> None:
        """Parse the entries, which config loading has validated."""
        self._entries = tuple(map(parse_allowed_host, self.hosts))

    @property
    def secrets(self) -> tuple[str, str]:
        """The values to redact in logs: the token, and its encoding in requests."""
        return self.token, b64encode(f"{PROXY_USER}:{self.token}".encode()).decode()

    def variables(self, port: int, direct: Sequence[str]) -> Mapping[str, str]:
        """Return the variables that point programs to the proxy at a loopback `port`.

        `direct` lists hosts to reach without the proxy unless they have an entry.
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
        """Serve connections until cancelled, then close the listener."""
        slots = anyio.Semaphore(self.max_connections)
        async with listener, anyio.create_task_group() as group:
            while True:
                await slots.acquire()  # more connections wait in the kernel's queue
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
            # Closing a socket with unread data resets the connection, and the client may lose the response.
            for _ in range(_MAX_DRAINED):
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
            raise _RefusedRequest(HTTPStatus.REQUEST_TIMEOUT, "timed out waiting for a complete request") from None
        except anyio.DelimiterNotFound:
            head = b" " * (MAX_HEAD_BYTES + 1)
        if len(head) > MAX_HEAD_BYTES:
            message = f"the request header is larger than {MAX_HEAD_BYTES} bytes"
            raise _RefusedRequest(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message)
        return head

    async def _connect(self, request: _Request) -> anyio.abc.SocketStream:
        """Connect to a request's host if the session may reach it."""
        host, port = request.host, request.port
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if not is_allowed(self._entries, host, port):
            self._note(shown)
            raise _RefusedRequest(HTTPStatus.FORBIDDEN, f"{shown} is not in `network.allow`")
        addresses = addresses_to_try(self._entries, host, port, await self._look_up(host, shown))
        if not addresses:
            self._note(shown)
            message = f"{shown} has a non-public address: add the address itself to `network.allow`"
            raise _RefusedRequest(HTTPStatus.FORBIDDEN, message)
        reason = ""
        for address in addresses[:_MAX_ADDRESSES]:
            try:
                with anyio.fail_after(self.timeouts.connect):
                    return await anyio.connect_tcp(str(address), port)
            except TimeoutError:
                reason = "timed out"
            except OSError as error:
                reason = str(error)
        raise _RefusedRequest(HTTPStatus.BAD_GATEWAY, f"can't connect to {shown}: {reason}")

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
            message = f"can't connect to {shown}: name lookup failed ({error})"
            raise _RefusedRequest(HTTPStatus.BAD_GATEWAY, message) from None

    def _note(self, shown: str) -> None:
        if len(self.denied) < _MAX_DENIED:
            self.denied[shown] = None

    async def _copy(
        self,
        source: anyio.abc.ByteStream,
        target: anyio.abc.ByteStream,
        scope: anyio.CancelScope,
        limit: int | None = None,
    ) -> None:
        """Copy at most `limit` bytes; cancel `scope` on an error or the idle timeout."""
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
            # Some servers drop a request when the client closes its side.
            if limit is None:
                await target.send_eof()
        except _DISCONNECTED:
            scope.cancel()


def _read_request(head: bytes, token: str) -> _Request:
    """Parse the head of a request; reject ambiguous ones."""
    try:
        first, *lines = head.decode("ascii").split("\r\n")
    except UnicodeDecodeError:
        raise _bad_request("the request header is not ASCII") from None
    request, matches = _REQUEST.fullmatch(first), [_HEADER.fullmatch(line) for line in lines]
    headers = [(match[1], match[2]) for match in matches if match is not None]
    if request is None or len(headers) < len(matches):
        raise _bad_request("not an HTTP/1.1 request")
    _check_token([value for name, value in headers if name.lower() == "proxy-authorization"], token)
    if request[1] == "CONNECT":
        host, port = _authority(request[2])
        if port is None:
            raise _bad_request("CONNECT needs a host and a port")
        return _Request(host, port)
    url = _URL.fullmatch(request[2])
    if url is None:
        raise _bad_request("expected CONNECT or a URL that begins with http://")
    host, port = _authority(url[1])
    path = url[2] if url[2].startswith("/") else f"/{url[2]}"
    head, length = _build_forwarded_head(f"{request[1]} {path} HTTP/1.1", url[1], headers)
    return _Request(host, 80 if port is None else port, head, length)


def _check_token(given: Sequence[str], token: str) -> None:
    expected = b64encode(f"{PROXY_USER}:{token}".encode()).decode()
    scheme, _, value = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    if scheme.lower() != "basic" or not compare_digest(value.strip(), expected):
        raise _RefusedRequest(
            HTTPStatus.PROXY_AUTHENTICATION_REQUIRED,
            "wrong or missing password: this proxy serves one session, whose HTTPS_PROXY contains the password",
            f'Proxy-Authenticate: Basic realm="{PROXY_USER}"',
        )


def _authority(text: str) -> tuple[str, int | None]:
    try:
        host, port = split_authority(text)
        return canonical_host(f"[{host}]" if ":" in host else host), port
    except ValueError as error:
        raise _bad_request(f"invalid host: {error}") from None


def _build_forwarded_head(first: str, authority: str, headers: Sequence[tuple[str, str]]) -> tuple[bytes, int]:
    """Return the head of a request as forwarded, and its body length in bytes.

    Only one request per connection is allowed: a second one could name another host.
    """
    options = {
        option.strip().lower() for name, value in headers if name.lower() == "connection" for option in value.split(",")
    }
    dropped = _DROPPED | (options - {"content-length"})
    forwarded = [(name, value) for name, value in headers if name.lower() not in dropped]
    lengths = [value for name, value in forwarded if name.lower() == "content-length"]
    if any(name.lower() == "transfer-encoding" for name, _ in headers):
        raise _RefusedRequest(HTTPStatus.LENGTH_REQUIRED, "the request needs a Content-Length, or https")
    if len(lengths) > 1 or any(_LENGTH.fullmatch(value) is None for value in lengths):
        raise _bad_request("invalid Content-Length")
    fields = (f"{name}: {value}" for name, value in forwarded)
    lines = [first, f"Host: {authority}", *fields, "Connection: close", "", ""]
    return "\r\n".join(lines).encode("ascii"), int(lengths[0]) if lengths else 0


def _bad_request(message: str) -> _RefusedRequest:
    return _RefusedRequest(HTTPStatus.BAD_REQUEST, message)
