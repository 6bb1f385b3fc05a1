"""A fake Ollama server on loopback, with the part of the API that sessions need.

The answer of the model is the task's text unchanged; a line `fail STATUS` gives that HTTP status instead,
`fail drop` closes the connection, `fail error` puts an error into the stream, `fail length` ends it at the token limit.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Handle one connection; `server.asked` has all requests."""

    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        if asked["model"] not in self.server.models:
            return self.refuse(404, f"model '{asked['model']}' not found")
        if self.path == "/api/show":
            return self.send(200, json.dumps({"details": {}, "model_info": {}, "capabilities": ["completion"]}))
        task = asked["messages"][-1]["content"].partition("The task:\n\n")[2]
        fails = [line.split()[1] for line in task.splitlines() if line.startswith("fail ")]
        if fails and fails[0].isdigit():
            return self.refuse(int(fails[0]), "stub says no")
        return self.answer(task, fails)

    def answer(self, task: str, fails: list[str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(task), 7):
            self.chunk({"message": {"role": "assistant", "content": task[start : start + 7]}, "done": False})
        if fails == ["drop"]:
            self.close_connection = True
            return
        if fails == ["error"]:
            self.chunk({"error": "an error was encountered while running the model"})
        else:
            reason = "length" if fails == ["length"] else "stop"
            end = {"done": True, "done_reason": reason, "prompt_eval_count": 26, "eval_count": 259}
            self.chunk({"message": {"role": "assistant", "content": ""}, **end})
        self.wfile.write(b"0\r\n\r\n")

    def chunk(self, part: dict[str, Any]) -> None:
        data = json.dumps({"model": "stub", "created_at": "2026-11-01T00:00:00Z", **part}).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def refuse(self, status: int, why: str) -> None:
        self.send(status, json.dumps({"error": why}))

    def send(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log nothing."""


class Server(ThreadingHTTPServer):
    """The server with its models and received requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = {"stub"}
        self.asked: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        """Return the base URL."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def run_server() -> Iterator[Server]:
    """Run a server for the body of a `with`."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
