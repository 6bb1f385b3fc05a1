"""The HTTP server: API detection, failures, and transmission of answers."""

from __future__ import annotations

import gzip
import json
import selectors
import socket
import socketserver
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

from tests.model_server import anthropic, gemini, lookups, ollama, openai_chat, openai_responses
from tests.model_server.conversation import ApiDialect, ApiFault, DialectName, Json, ModelRequest, TokenUsage
from tests.model_server.script import (
    AnswerTruncation,
    ConnectionDrop,
    Script,
    find_script_position,
    next_answer,
)

_SECRETS: Final = frozenset(
    {"authorization", "x-api-key", "x-goog-api-key", "api-key", "cookie", "proxy-authorization"}
)
_BY_ENDING: Final = {
    "/messages": anthropic.DIALECT,
    "/responses": openai_responses.DIALECT,
    "/chat/completions": openai_chat.DIALECT,
    "/api/chat": ollama.CHAT,
    "/api/generate": ollama.GENERATE,
    ":generateContent": gemini.DIALECT,
    ":streamGenerateContent": gemini.DIALECT,
}


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """A received request; `dialect` is None for requests other than model requests, such as model lists.

    `path` has the query without a key, `headers` have lower-case names and no credentials. `body` is {} without one.
    """

    dialect: DialectName | None
    path: str
    model: str
    stream: bool
    body: Mapping[str, Any]
    headers: Mapping[str, str]


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.lock = threading.Lock()
        self.requests: list[RecordedRequest] = []
        self.answers: list[tuple[str, TokenUsage]] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.connections: set[socket.socket] = set()

    def server_bind(self) -> None:
        # HTTPServer resolves this machine's name, which can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.lock:
            self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore disconnecting clients."""

    def stop(self) -> None:
        self.shutdown()
        with self.lock:
            # A thread in a delay notices its connection end, as if the client had disconnected.
            for connection in self.connections:
                with suppress(OSError):  # the client may have disconnected
                    connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def count(self, dialect: ApiDialect, script: Script) -> int:
        """Return the number of earlier requests of this conversation, and count this one."""
        with self.lock:
            key = dialect.name, script.prompt
            self.counts[key] += 1
            return self.counts[key] - 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class' name
        """Log nothing: `requests` has everything."""

    def do_HEAD(self) -> None:
        self._record(None, {}, None)
        self._send_json(200, {})

    def do_GET(self) -> None:
        self._record(None, {}, None)
        found = lookups.answer_lookup(self._path, {}, anthropic="anthropic-version" in self.headers)
        self._send_json(404 if found is None else 200, found if found is not None else {"error": "not found"})

    def do_POST(self) -> None:
        dialect = next((each for ending, each in _BY_ENDING.items() if self._path.endswith(ending)), None)
        try:
            body = self._body()
            asked = dialect.read(self._path, body) if dialect else None
        except (ValueError, KeyError, TypeError, AttributeError, OSError, zlib.error):
            self._record(dialect, {}, None)
            self._send_fault(dialect or anthropic.DIALECT, ApiFault(400))
            return
        self._record(dialect, body, asked)
        if dialect is None or asked is None:
            found = lookups.answer_lookup(self._path, body, anthropic="anthropic-version" in self.headers)
            self._send_json(404 if found is None else 200, found if found is not None else {"error": "not found"})
        else:
            self._answer(dialect, asked)

    def _answer(self, dialect: ApiDialect, asked: ModelRequest) -> None:
        place = find_script_position(asked)
        disturbance = None
        if place is not None:
            disturbance = place.script.failure_for(self.server.count(dialect, place.script))
            if not self._wait(place.script.delay):
                self.close_connection = True
                return
        if isinstance(disturbance, ApiFault):
            self._send_fault(dialect, disturbance)
            return
        answer = next_answer(asked, place)
        if isinstance(disturbance, AnswerTruncation):
            answer = answer.cut()
        is_dropped = isinstance(disturbance, ConnectionDrop)
        if place is not None and not is_dropped:
            with self.server.lock:
                self.server.answers.append((asked.model, answer.usage))
        if not asked.stream:
            self._send_json(200, dialect.whole(asked, answer), cut=is_dropped)
            return
        parts = list(dialect.stream(asked, answer))
        self._send_stream(dialect.stream_type, parts, cut=is_dropped)

    def _wait(self, seconds: float) -> bool:
        """Wait; return False if the client disconnects or the server stops before the end."""
        if not seconds:
            return True
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            return not selector.select(seconds)

    @property
    def _path(self) -> str:
        return urlsplit(self.path).path.rstrip("/")

    def _body(self) -> Json:
        raw = self._chunks() if "chunked" in self.headers.get("transfer-encoding", "") else self._sized()
        if self.headers.get("content-encoding") == "gzip":
            raw = gzip.decompress(raw)
        body = json.loads(raw or b"{}")
        if not isinstance(body, dict):
            raise TypeError(body)
        return body

    def _sized(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _chunks(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _record(self, dialect: ApiDialect | None, body: Json, asked: ModelRequest | None) -> None:
        split = urlsplit(self.path)
        query = urlencode([(name, value) for name, value in parse_qsl(split.query) if name != "key"])
        headers = {name.lower(): value for name, value in self.headers.items() if name.lower() not in _SECRETS}
        model = asked.model if asked else str(body.get("model", ""))
        path = f"{split.path}?{query}" if query else split.path
        request = RecordedRequest(
            dialect.name if dialect else None, path, model, bool(asked and asked.stream), body, headers
        )
        with self.server.lock:
            self.server.requests.append(request)

    def _head(self, status: int, kind: str, more: Iterable[tuple[str, str]]) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        for name, value in more:
            self.send_header(name, value)
        self.end_headers()

    def _send_json(
        self, status: int, data: Json, headers: Iterable[tuple[str, str]] = (), *, cut: bool = False
    ) -> None:
        raw = json.dumps(data, ensure_ascii=False).encode()
        self._head(status, "application/json", [("content-length", str(len(raw))), *headers])
        if self.command != "HEAD":
            self.wfile.write(raw[: len(raw) // 2] if cut else raw)
        self.close_connection = self.close_connection or cut

    def _send_fault(self, dialect: ApiDialect, fault: ApiFault) -> None:
        after = [] if fault.retry_after is None else [("retry-after", str(fault.retry_after))]
        self._send_json(fault.status, dialect.fault(fault), after)

    def _send_stream(self, kind: str, parts: list[bytes], *, cut: bool) -> None:
        self._head(200, kind, [("cache-control", "no-cache"), ("transfer-encoding", "chunked")])
        if cut:
            sent = b"".join(parts)
            parts = [sent[: len(sent) // 2]]
        for part in parts:
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        if cut:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")


class ModelServer:
    """A loopback server that answers by the script in each prompt; a context manager.

    `port` 0 takes any free one. Raises OSError if the port is taken.
    """

    def __init__(self, port: int = 0) -> None:
        self._listener = _Listener(port)
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """Return the base URL for Anthropic, Gemini and Ollama; OpenAI's has `/v1` appended."""
        return f"http://127.0.0.1:{self._listener.server_port}"

    @property
    def requests(self) -> list[RecordedRequest]:
        """Return the received requests in order."""
        with self._listener.lock:
            return list(self._listener.requests)

    @property
    def answers(self) -> list[tuple[str, TokenUsage]]:
        """Return the model and the reported usage of each complete answer to a script, in order."""
        with self._listener.lock:
            return list(self._listener.answers)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.stop()
        self._thread.join()
