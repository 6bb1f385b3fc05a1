"""The proxy of a session: which requests it forwards, which it rejects, and its limits."""

from __future__ import annotations

import socket
import socketserver
import threading
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest

from orchestrator.domain.security.hosts import Address
from orchestrator.sessions.sandbox.proxy import MAX_HEAD_BYTES, Proxy, ProxyTimeouts

PATIENCE = 30.0


class Upstream(socketserver.ThreadingTCPServer):
    """A server that records its input; it echoes input that begins with `echo`, and answers `hi` otherwise."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.received = b""

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class Answer(socketserver.BaseRequestHandler):
    """Answer one connection."""

    def handle(self) -> None:
        assert isinstance(self.server, Upstream)
        while data := self.request.recv(1 << 16):
            self.server.received += data
            if self.server.received.startswith(b"echo"):
                self.request.sendall(data)
            elif self.server.received.endswith(b"body" if self.server.received.startswith(b"POST") else b"\r\n\r\n"):
                self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
                self.request.shutdown(socket.SHUT_WR)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@asynccontextmanager
async def serving(proxy: Proxy) -> AsyncIterator[int]:
    """Serve a proxy on loopback and yield its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    async with anyio.create_task_group() as group:
        group.start_soon(proxy.serve, await anyio.abc.SocketListener.from_socket(listening))
        with anyio.fail_after(PATIENCE):
            yield port
        group.cancel_scope.cancel()


def authorized(proxy: Proxy, token: str | None = None) -> str:
    credentials = b64encode(f"council:{token or proxy.token}".encode()).decode()
    return f"Proxy-Authorization: Basic {credentials}\r\n"


async def ask(port: int, request: str | bytes) -> str:
    """Return the whole answer to a request."""
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(request.encode() if isinstance(request, str) else request)
        return await rest(stream)


async def rest(stream: anyio.abc.ByteReceiveStream) -> str:
    data = b""
    try:
        async for chunk in stream:
            data += chunk
    except anyio.BrokenResourceError:
        pass
    return data.decode()


async def connect(proxy: Proxy, port: int, host: str) -> str:
    return await ask(port, f"CONNECT {host} HTTP/1.1\r\n{authorized(proxy)}\r\n")


def resolver(*texts: str) -> Any:
    asked: list[str] = []

    async def resolve(host: str) -> Sequence[Address]:
        asked.append(host)
        return tuple(map(ip_address, texts))

    resolve.asked = asked  # type: ignore[attr-defined]
    return resolve


async def test_tunnel_to_an_allowed_host_works(upstream: Upstream) -> None:
    """In both directions, including bytes sent with the request, and the end of the stream."""
    proxy = Proxy([f"127.0.0.1:{upstream.port}"])
    async with serving(proxy) as port, await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(f"CONNECT 127.0.0.1:{upstream.port} HTTP/1.1\r\n{authorized(proxy)}\r\necho".encode())
        expected = b"HTTP/1.1 200 Connection established\r\n\r\necho"
        data = b""
        while len(data) < len(expected):
            data += await stream.receive()
        assert data == expected
        large = b"echo" * (1 << 18)
        async with anyio.create_task_group() as group:
            group.start_soon(stream.send, large)
            received = 0
            while received < len(large):
                received += len(await stream.receive())
        await stream.send_eof()
        assert await rest(stream) == ""
    assert upstream.received == b"echo" + large
    assert not proxy.denied


async def test_plain_request_is_forwarded(upstream: Upstream) -> None:
    """Without the token and proxy headers, and to the host that was checked."""
    proxy = Proxy([f"localhost:{upstream.port}"], resolve=resolver())
    request = (
        f"GET http://localhost:{upstream.port}/a/b?c=d HTTP/1.1\r\nHost: other.example\r\nAccept: */*\r\n"
        f"{authorized(proxy)}Proxy-Connection: keep-alive\r\nConnection: X-Hop, close\r\nX-Hop: 1\r\n\r\n"
    )
    async with serving(proxy) as port:
        assert (await ask(port, request)).endswith("hi")
    head = f"GET /a/b?c=d HTTP/1.1\r\nHost: localhost:{upstream.port}\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    assert upstream.received.decode() == head


async def test_second_request_does_not_reach_the_first_host(upstream: Upstream) -> None:
    """Bytes after the body could be for another host, and are dropped."""
    proxy = Proxy([f"127.0.0.1:{upstream.port}"])
    first = f"POST http://127.0.0.1:{upstream.port}/ HTTP/1.1\r\n{authorized(proxy)}Content-Length: 4\r\n\r\n"
    second = f"GET http://evil.example/ HTTP/1.1\r\n{authorized(proxy)}\r\n"
    async with serving(proxy) as port:
        assert (await ask(port, f"{first}body{second}")).endswith("hi")
    assert upstream.received.endswith(b"body")
    assert b"evil" not in upstream.received
    assert proxy.token.encode() not in upstream.received
    assert not proxy.denied


async def test_unlisted_host_is_denied(upstream: Upstream) -> None:
    """The message names it and the setting; it is not resolved, and recorded once."""
    proxy = Proxy(["api.example.com"], resolve=resolver("127.0.0.1"))
    async with serving(proxy) as port:
        for host in ("evil.example:443", "EVIL.example.:443", "api.example.com:22", f"127.0.0.1:{upstream.port}"):
            assert "HTTP/1.1 403 Forbidden" in (answer := await connect(proxy, port, host))
            assert "`network.allow`" in answer
            assert host.lower().replace(".:", ":") in answer
        answer = await ask(port, f"GET http://evil.example/ HTTP/1.1\r\n{authorized(proxy)}\r\n")
        assert "evil.example:80 is not in `network.allow`" in answer
    assert proxy.resolve.asked == []  # type: ignore[attr-defined]
    assert upstream.received == b""
    expected = ["evil.example:443", "api.example.com:22", f"127.0.0.1:{upstream.port}", "evil.example:80"]
    assert list(proxy.denied) == expected


async def test_denied_hosts_are_recorded_up_to_a_limit() -> None:
    """A session that tries many names uses bounded memory."""
    proxy = Proxy(["api.example.com"])
    async with serving(proxy) as port:
        for number in range(120):
            await connect(proxy, port, f"h{number}.example:443")
    assert len(proxy.denied) == 100


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::ffff:127.0.0.1"], ["169.254.169.254"], ["::1"], ["10.0.0.1"]],
)
async def test_name_of_a_private_address_is_denied(upstream: Upstream, addresses: list[str]) -> None:
    """The owner of an allowed name must not select a service of this machine or its network."""
    proxy = Proxy([f"api.example.com:{upstream.port}"], resolve=resolver(*addresses))
    async with serving(proxy) as port:
        answer = await connect(proxy, port, f"api.example.com:{upstream.port}")
    assert "403" in answer
    assert "non-public address" in answer
    assert upstream.received == b""
    assert list(proxy.denied) == [f"api.example.com:{upstream.port}"]


async def test_name_is_resolved_once(upstream: Upstream) -> None:
    """The connection uses the checked address: a second lookup could return another one."""
    entries = [f"api.example.com:{upstream.port}", f"127.0.0.1:{upstream.port}"]
    proxy = Proxy(entries, resolve=resolver("127.0.0.1"))
    async with serving(proxy) as port, await anyio.connect_tcp("127.0.0.1", port) as stream:
        request = f"CONNECT api.example.com:{upstream.port} HTTP/1.1\r\n{authorized(proxy)}\r\n"
        await stream.send(request.encode())
        assert (await stream.receive()).startswith(b"HTTP/1.1 200 ")
    assert proxy.resolve.asked == ["api.example.com"]  # type: ignore[attr-defined]


async def test_name_without_an_address_is_an_error(upstream: Upstream) -> None:
    """So is an unreachable server: the message says which."""

    async def fails(host: str) -> Sequence[Address]:
        raise OSError("no such name")

    proxy = Proxy(["api.example.com", "127.0.0.1:1"], resolve=fails)
    async with serving(proxy) as port:
        answer = await connect(proxy, port, "api.example.com:443")
        assert "502 Bad Gateway" in answer
        assert "can't connect to api.example.com:443: name lookup failed (no such name)" in answer
        assert "can't connect to 127.0.0.1:1" in await connect(proxy, port, "127.0.0.1:1")
    assert not proxy.denied


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Proxy-Authorization: Basic Y291bmNpbDo=\r\n",
        "Proxy-Authorization: Bearer x\r\n",
        "Authorization: {right}",
        "{right}{right}",
        "{wrong}",
    ],
)
async def test_missing_token_is_rejected(upstream: Upstream, header: str) -> None:
    """Other sessions and programs can't use the proxy of a session; their hosts are not recorded either."""
    proxy = Proxy([f"127.0.0.1:{upstream.port}"])
    right = authorized(proxy)
    header = header.format(right=right, wrong=authorized(proxy, Proxy([]).token))
    async with serving(proxy) as port:
        for host in (f"127.0.0.1:{upstream.port}", "evil.example:443"):
            answer = await ask(port, f"CONNECT {host} HTTP/1.1\r\n{header}\r\n")
            assert answer.startswith("HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic ")
    assert upstream.received == b""
    assert not proxy.denied


@pytest.mark.parametrize(
    "first",
    [
        "CONNECT api.example.com HTTP/1.1",
        "CONNECT user@api.example.com:443 HTTP/1.1",
        "CONNECT api.example.com:443/x HTTP/1.1",
        "CONNECT 2130706433:443 HTTP/1.1",
        "CONNECT api.example.com:443 HTTP/2",
        "CONNECT api.example.com:443",
        "CONNECT  api.example.com:443 HTTP/1.1",
        "GET http://user:password@api.example.com/ HTTP/1.1",
        "GET http://api.example.com:0/ HTTP/1.1",
        "GET http://api.example.com/#x HTTP/1.1",
        "GET http://api.example.com\\@evil.example/ HTTP/1.1",
        "GET https://api.example.com/ HTTP/1.1",
        "GET / HTTP/1.1",
        "GET http:///x HTTP/1.1",
        "CONNECT api.example.com:443 HTTP/1.1\r\n X: folded",
        "CONNECT api.example.com:443 HTTP/1.1\r\nX : y",
        "CONNECT api.example.com:443 HTTP/1.1\r\nX: a\nProxy-Y: b",
        "GET http://api.example.com/ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2",
        "GET http://api.example.com/ HTTP/1.1\r\nContent-Length: -1",
        "CONNECT bücher.example:443 HTTP/1.1",
    ],
)
async def test_ambiguous_request_is_rejected(first: str) -> None:
    proxy = Proxy(["api.example.com"], resolve=resolver("127.0.0.1"))
    async with serving(proxy) as port:
        assert (await ask(port, f"{first}\r\n{authorized(proxy)}\r\n")).startswith("HTTP/1.1 400 Bad Request")
    assert proxy.resolve.asked == []  # type: ignore[attr-defined]


async def test_body_of_unknown_length_is_rejected() -> None:
    """Its host decides where it ends, and the rest could be another request."""
    proxy = Proxy(["api.example.com"], resolve=resolver("127.0.0.1"))
    request = f"POST http://api.example.com/ HTTP/1.1\r\n{authorized(proxy)}Transfer-Encoding: chunked\r\n\r\n"
    async with serving(proxy) as port:
        assert (await ask(port, request)).startswith("HTTP/1.1 411 Length Required")


@pytest.mark.parametrize("size", [MAX_HEAD_BYTES + 1, 40 * MAX_HEAD_BYTES])
async def test_oversized_head_is_rejected(upstream: Upstream, size: int) -> None:
    """Whether or not it is terminated."""
    proxy = Proxy([f"127.0.0.1:{upstream.port}"])
    request = f"CONNECT 127.0.0.1:{upstream.port} HTTP/1.1\r\n{authorized(proxy)}X: "
    async with serving(proxy) as port:
        answer = await ask(port, request + "x" * size + "\r\n\r\n")
    assert answer.startswith("HTTP/1.1 431 ")
    assert upstream.received == b""


async def test_incomplete_head_times_out() -> None:
    """A connection that sends nothing is closed."""
    proxy = Proxy(["api.example.com"], timeouts=ProxyTimeouts(head=0.05))
    async with serving(proxy) as port:
        for request in ("", "CONNECT api.example"):
            assert (await ask(port, request)).startswith("HTTP/1.1 408 Request Timeout")


async def test_idle_tunnel_is_closed(upstream: Upstream) -> None:
    proxy = Proxy([f"127.0.0.1:{upstream.port}"], timeouts=ProxyTimeouts(idle=0.05))
    async with serving(proxy) as port:
        assert await connect(proxy, port, f"127.0.0.1:{upstream.port}") == (
            "HTTP/1.1 200 Connection established\r\n\r\n"
        )


async def test_connections_are_limited(upstream: Upstream) -> None:
    proxy = Proxy([f"127.0.0.1:{upstream.port}"], max_connections=2)
    answered = anyio.Event()

    async def wait_for_answer(stream: anyio.abc.SocketStream) -> None:
        assert (await stream.receive()).startswith(b"HTTP/1.1 200 ")
        answered.set()

    async with serving(proxy) as port:
        first, second, third = [await anyio.connect_tcp("127.0.0.1", port) for _ in range(3)]
        for stream in (first, second, third):
            await stream.send(f"CONNECT 127.0.0.1:{upstream.port} HTTP/1.1\r\n{authorized(proxy)}\r\n".encode())
        assert (await first.receive()).startswith(b"HTTP/1.1 200 ")
        assert (await second.receive()).startswith(b"HTTP/1.1 200 ")
        async with anyio.create_task_group() as group:
            group.start_soon(wait_for_answer, third)
            for _ in range(100):  # by then the third would have been answered, too
                await first.send(b"echo")
                assert await first.receive() == b"echo"
            assert not answered.is_set()
            await first.aclose()
            await answered.wait()
        for stream in (second, third):
            await stream.aclose()


def test_variables_name_the_proxy() -> None:
    """With the token, in both cases; local addresses are in `no_proxy` unless they are listed."""
    proxy = Proxy(["localhost:8000", "api.example.com"])
    url = f"http://council:{proxy.token}@127.0.0.1:3128"
    found = proxy.variables(3128, ("localhost", "127.0.0.1"))
    both = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"), url)
    assert found == {**both, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "NODE_USE_ENV_PROXY": "1"}
    assert "NO_PROXY" not in proxy.variables(3128, ())


def test_limits_match_the_documentation() -> None:
    page = " ".join((Path(__file__).parents[3] / "docs" / "security.md").read_text().split())
    proxy = Proxy([])
    assert f"At most {proxy.max_connections} connections are open at once" in page
    assert f"request header is limited to {MAX_HEAD_BYTES >> 10} KiB and {proxy.timeouts.head:.0f} seconds" in page
    assert f"an idle connection is closed after {proxy.timeouts.idle / 60:.0f} minutes" in page
