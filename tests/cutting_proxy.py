"""A proxy in front of a server that delays replies, cuts connections, or accepts everything and answers nothing."""

from __future__ import annotations

import asyncio
import atexit
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path


class CuttingProxy:
    """Forwards bytes, and closes all connections once a budget of bytes is used up."""

    def __init__(self, port: int) -> None:
        self.target, self.port = port, 0
        self.budget: dict[str, int | None] = {"request": None, "reply": None}
        self.passed = {"request": 0, "reply": 0}
        self.refuses = False
        self.silent = frozenset[str]()
        """The directions in which bytes are lost. A connection that has lost some stays silent."""
        self.delay = 0.0
        """Seconds by which replies are delayed."""
        self.outage = 0.0
        """Seconds to refuse connections after a cut."""
        self.requests_left = -1
        """The number of requests to forward before a cut; negative: no limit."""
        self.cuts = 0
        self._tasks = set[asyncio.Task[None]]()
        self._writers = set[asyncio.StreamWriter]()

    def arm(self, direction: str, size: int) -> None:
        """Cut all connections after `size` more bytes in a direction; later connections are not cut."""
        self.budget = {"request": None, "reply": None, direction: size}

    def reset(self) -> None:
        """Count from zero, and cut nothing."""
        self.passed, self.budget = {"request": 0, "reply": 0}, {"request": None, "reply": None}

    def blackhole(self) -> None:
        """Accept connections and requests, and answer nothing, until `silent` is empty."""
        self.silent = frozenset({"request", "reply"})

    def accept(self) -> None:
        """Accept connections again."""
        self.refuses = False

    @asynccontextmanager
    async def serve(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[CuttingProxy]:
        """Listen on a free port; with `tls` for encrypted connections."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in self._writers:
                writer.transport.abort()
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        if self.refuses:
            writer.transport.abort()
            return
        with suppress(OSError):
            their_reader, their_writer = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers |= {writer, their_writer}
            await asyncio.gather(self._pass("request", reader, their_writer), self._pass("reply", their_reader, writer))

    async def _pass(self, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_silent = False
        with suppress(OSError):
            while data := await reader.read(65_536):
                is_silent = is_silent or direction in self.silent
                if is_silent:
                    continue
                if direction == "request" and self.requests_left >= 0:
                    self.requests_left -= 1
                    if self.requests_left < 0:
                        self.cut()
                        return
                if direction == "reply":
                    await asyncio.sleep(self.delay)
                left = self.budget[direction]
                part = data if left is None else data[:left]
                is_last = left is not None and left <= len(data)
                if left is not None:
                    self.budget[direction] = None if is_last else left - len(part)
                self.passed[direction] += len(part)
                writer.write(part)
                await writer.drain()
                if is_last:
                    self.cut()
                    return
            writer.close()

    def cut(self) -> None:
        """Close all connections after delivering the forwarded bytes."""
        self.cuts += 1
        self.reset()
        if self.outage:
            self.refuses = True
            asyncio.get_running_loop().call_later(self.outage, self.accept)
        for writer in self._writers:
            writer.close()
        self._writers = set()


@cache
def create_certificate() -> Path:
    """Return a file with a new certificate of 127.0.0.1 and its key."""
    folder = Path(tempfile.mkdtemp(prefix="council-tls-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", path, "-out", path, "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    certificate = path.read_text()
    path.with_name("authority.pem").write_text(certificate[certificate.index("-----BEGIN CERTIFICATE") :])
    return path


def server_tls() -> ssl.SSLContext:
    """Return the TLS settings of a server with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(create_certificate())
    return context
