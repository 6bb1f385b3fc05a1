"""The sink fulfils the contract with a real server that is down at first."""

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError

import pytest
from council_webhook import Webhook, WebhookOptions
from pydantic import ValidationError

from orchestrator.errors import RefusedError
from orchestrator.testing.sink_contract import SinkContract, sample_events


class Server(ThreadingHTTPServer):
    """Accept events on loopback, after answering with `failures`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures: list[int] = []
        self.events: list[dict[str, object]] = []
        self.headers: list[dict[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/hook"


class Handler(BaseHTTPRequestHandler):
    """Answer one request."""

    server: Server

    def do_POST(self) -> None:
        """Answer with the next failure, or accept the events."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        code = self.server.failures.pop(0) if self.server.failures else 204
        if code == 204:
            self.server.events += json.loads(body)["events"]
            self.server.headers.append(dict(self.headers))
        self.send_response(code)
        if code == 302:
            self.send_header("Location", self.server.url)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *said: object) -> None:
        """Print no request log."""


@pytest.fixture
def server() -> Iterator[Server]:
    """Run the server for the duration of a test."""
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


class TestWebhook(SinkContract):
    """The sink contract, with a server whose first three responses are failures."""

    sink_type = Webhook

    @pytest.fixture(autouse=True)
    def listen(self, server: Server) -> None:
        """Start a server for each test."""
        self.server = server
        server.failures = [503, 500, 302]

    def make_options(self, folder: Path) -> dict[str, object]:
        """Return the options with the server's URL."""
        return {"url": self.server.url}

    def delivered_positions(self, folder: Path) -> Sequence[int]:
        """Return the positions of the events that the server accepted."""
        return [int(str(event["position"])) for event in self.server.events]


async def test_send_posts_the_whole_event_with_the_token(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The body has all fields of the event, and the header has the token."""
    monkeypatch.setenv("HOOK_TOKEN", "not-a-real-one")
    monkeypatch.setenv("HOOK_URL", server.url)
    (event, *_) = events = sample_events()
    async with Webhook(WebhookOptions(url="$HOOK_URL", token="HOOK_TOKEN")) as sink:
        await sink.send(events)
    assert server.events[0] == {
        "position": event.position, "time": event.time, "event": "run.created", **event.event.data,
    }  # fmt: skip
    assert server.headers[0]["Authorization"] == "Bearer not-a-real-one"
    monkeypatch.delenv("HOOK_TOKEN")
    async with Webhook(WebhookOptions(url=server.url, token="HOOK_TOKEN")) as sink:
        with pytest.raises(RefusedError, match="HOOK_TOKEN is not set"):
            await sink.send(events)


async def test_send_with_a_failed_response_raises(server: Server) -> None:
    """A redirect is a failure too."""
    server.failures = [302, 404]
    for _ in range(2):
        async with Webhook(WebhookOptions(url=server.url)) as sink:
            with pytest.raises(HTTPError):
                await sink.send(sample_events())
    assert server.events == []


@pytest.mark.parametrize("url", ["ftp://example.org", "example.org", "https://me:secret@example.org/"])
def test_options_with_an_invalid_url_are_rejected(url: str) -> None:
    """Only http(s) URLs without a password are valid."""
    with pytest.raises(ValidationError):
        WebhookOptions(url=url)
