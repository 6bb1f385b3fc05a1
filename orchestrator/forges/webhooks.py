"""Receive the webhooks of forges, which only say that something has changed.

The content of a webhook is not used: a run then reads its board and its pull requests as it does regularly, so that
repeated, reordered and lost ones do no harm. Each must be signed with the secret.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, cast

import anyio
import h11
from anyio.abc import SocketAttribute, SocketListener, SocketStream

from orchestrator.errors import CouncilError

#: The largest body in bytes (GitHub sends at most 25 MB), and the time limit of a request in seconds.
_LARGEST: Final = 25 << 20
_TIMEOUT: Final = 10.0
_CHUNK: Final = 65_536
_MOST_CONNECTIONS: Final = 64


def is_signed(headers: Mapping[str, str], body: bytes, secret: str) -> bool:
    """Return True if a request has the signature of GitHub (HMAC-SHA256 of the body) or the token of GitLab.

    Names of headers are in lower case. See docs.github.com, "Validating webhook deliveries", and docs.gitlab.com,
    "Webhooks".
    """
    if (signature := headers.get("x-hub-signature-256")) is not None:
        expected = "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
        return hmac.compare_digest(signature.encode(), expected.encode())
    return hmac.compare_digest(headers.get("x-gitlab-token", "").encode(), secret.encode())


async def serve_webhooks(
    host: str,
    port: int,
    secret: str,
    on_change: Callable[[], Awaitable[None]],
    on_start: Callable[[int], None],
) -> None:
    """Receive webhooks until cancelled, and call `on_change` after each valid one.

    `on_start` gets the port, which the system chooses for `port` 0. Raises OSError if the address is in use.
    """
    async with await anyio.create_tcp_listener(local_host=host, local_port=port) as listener:
        on_start(listener.extra(SocketAttribute.local_port))  # noqa: S610  not of Django

        slots = anyio.Semaphore(_MOST_CONNECTIONS)  # others wait in the kernel: each one needs a file descriptor

        async def handle(stream: SocketStream) -> None:
            try:
                async with stream:
                    await _handle(stream, secret, on_change)
            finally:
                slots.release()

        async def accept(one: SocketListener) -> None:
            while True:
                await slots.acquire()
                group.start_soon(handle, await one.accept())

        async with anyio.create_task_group() as group:
            for one in listener.listeners:
                group.start_soon(accept, cast("SocketListener", one))


async def _handle(stream: SocketStream, secret: str, on_change: Callable[[], Awaitable[None]]) -> None:
    connection = h11.Connection(h11.SERVER)
    try:
        with anyio.fail_after(_TIMEOUT):
            status = await _answer(stream, connection, secret, on_change)
            response = h11.Response(status_code=status, headers=[("Content-Length", "0"), ("Connection", "close")])
            await stream.send(connection.send(response) or b"")
    except (TimeoutError, OSError, h11.ProtocolError, anyio.BrokenResourceError, anyio.EndOfStream):
        return  # the sender repeats it, or the next regular reading finds the change


async def _answer(
    stream: SocketStream, connection: h11.Connection, secret: str, on_change: Callable[[], Awaitable[None]]
) -> int:
    """Read a request; return the status code of its answer."""
    request = await _next_event(stream, connection)
    if not isinstance(request, h11.Request):
        return 400
    if request.method != b"POST":
        return 405
    body = b""
    while isinstance(event := await _next_event(stream, connection), h11.Data):
        body += event.data
        if len(body) > _LARGEST:
            return 413
    headers = {name.decode("ascii"): value.decode("latin-1") for name, value in request.headers}
    if not is_signed(headers, body, secret):
        return 401
    try:
        await on_change()
    except CouncilError:  # the forge sends it again, or the next regular reading finds the change
        return 503
    return 204


async def _next_event(stream: SocketStream, connection: h11.Connection) -> object:
    while (event := connection.next_event()) is h11.NEED_DATA:
        try:
            connection.receive_data(await stream.receive(_CHUNK))
        except anyio.EndOfStream:
            connection.receive_data(b"")
    return event
