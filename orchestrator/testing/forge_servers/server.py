"""The parts that scripted forges share: the issues of one repository, and an HTTP server for them."""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

_EPOCH: Final = 1_767_225_600
_DEFAULT_PAGE: Final = 30


@dataclass
class ForgeUser:
    """A user, with their access to the repository: `read`, `write` or `admin`."""

    id: int
    login: str
    permission: str
    is_bot: bool = False


@dataclass
class ForgeComment:
    """A comment on an issue."""

    id: int
    author: str
    body: str
    time: str


@dataclass
class IssueEvent:
    """A change of an issue: its kind, who made it, and the label, if any."""

    id: int
    kind: str
    actor: str
    time: str
    label: str | None = None


@dataclass
class ForgeIssue:
    """An issue."""

    number: int
    title: str
    body: str
    author: str
    created: str
    updated: str
    is_open: bool = True
    closed: str | None = None
    labels: list[str] = field(default_factory=list)
    assignees: list[str] = field(default_factory=list)
    milestone: str | None = None
    comments: list[ForgeComment] = field(default_factory=list)
    events: list[IssueEvent] = field(default_factory=list)
    blocked_by: list[int] = field(default_factory=list)
    sub_issues: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """The answer to a request; `total` is the number of items if `content` is one page of them."""

    status: int
    content: Any
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A request to the API: its path below the base, its query, its JSON, and the user of its token."""

    method: str
    parts: Sequence[str]
    query: Mapping[str, str]
    body: Mapping[str, Any]
    user: ForgeUser


class ForgeServer(ABC):
    """A server with one repository. Its methods act as a person, and are safe during requests."""

    def __init__(self, repository: str = "acme/shop", certificate: Path | None = None) -> None:
        """Create a server; with a certificate and its key in one file, it uses TLS."""
        self.repository, self.is_encrypted = repository, certificate is not None
        self.requests: list[tuple[str, str, int]] = []
        """The method, path and status of each request."""
        self._lock = threading.RLock()
        self._ids = 0
        self._issues: dict[int, ForgeIssue] = {}
        self._users: dict[str, ForgeUser] = {}
        self._tokens: dict[str, str] = {}
        self._faults: list[Answer] = []
        self._lost_answers = 0
        self._redirects: dict[str, Answer] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.add_user("council-bot", token="t0ken", permission="write")  # noqa: S106  of this server only
        self.add_user("person", permission="write")

    def __enter__(self) -> Self:
        """Start the server."""
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL of the API."""

    @property
    def origin(self) -> str:
        """The URL of the server."""
        return f"http{'s' * self.is_encrypted}://127.0.0.1:{self._server.server_address[1]}"

    @abstractmethod
    def answer(self, request: Request) -> Answer:
        """Return the answer to an authenticated request."""

    def add_user(self, login: str, token: str | None = None, permission: str = "read", *, is_bot: bool = False) -> None:
        """Add a user, with a token if given."""
        with self._lock:
            self._users[login] = ForgeUser(len(self._users) + 100, login, permission, is_bot)
            if token is not None:
                self._tokens[token] = login

    def add_issue(
        self,
        title: str,
        body: str = "",
        labels: Iterable[str] = (),
        author: str = "person",
        assignees: Iterable[str] = (),
        milestone: str | None = None,
    ) -> int:
        """Open an issue; return its number."""
        with self._lock:
            number, now = len(self._issues) + 1, self._now()
            issue = ForgeIssue(number, title, body, author, now, now, assignees=[*assignees], milestone=milestone)
            self._issues[number] = issue
            for label in labels:
                self.label(number, label, author)
            return number

    def issue(self, number: int) -> ForgeIssue:
        """Return an issue."""
        return self._issues[number]

    def comment(self, number: int, body: str, author: str = "person") -> int:
        """Add a comment; return its id."""
        with self._lock:
            comment = ForgeComment(self._next_id(), author, body, self._touch(number))
            self._issues[number].comments.append(comment)
            return comment.id

    def edit_comment(self, id_: int, body: str | None) -> ForgeComment | None:
        """Change a comment, or delete it (None); return it, or None if it does not exist."""
        with self._lock:
            for issue in self._issues.values():
                for comment in issue.comments:
                    if comment.id == id_:
                        comment.body = body or comment.body
                        if body is None:
                            issue.comments.remove(comment)
                        self._touch(issue.number)
                        return comment
            return None

    def edit(self, number: int, *, title: str | None = None, body: str | None = None) -> None:
        """Change the title or body of an issue."""
        with self._lock:
            issue = self._issues[number]
            issue.title, issue.body = title or issue.title, issue.body if body is None else body
            self._touch(number)

    def close(self, number: int, by: str = "person") -> None:
        """Close an issue."""
        self._set_open(number, by, is_open=False)

    def reopen(self, number: int, by: str = "person") -> None:
        """Open an issue again."""
        self._set_open(number, by, is_open=True)

    def label(self, number: int, label: str, by: str = "person") -> None:
        """Add a label to an issue."""
        with self._lock:
            if label not in self._issues[number].labels:
                self._issues[number].labels.append(label)
                self._record(number, "labeled", by, label)

    def unlabel(self, number: int, label: str, by: str = "person") -> None:
        """Remove a label from an issue."""
        with self._lock:
            if label in self._issues[number].labels:
                self._issues[number].labels.remove(label)
                self._record(number, "unlabeled", by, label)

    def block(self, number: int, by_number: int) -> None:
        """Record that an issue is blocked by another one."""
        with self._lock:
            self._issues[number].blocked_by.append(by_number)
            self._touch(number)

    def add_sub_issue(self, parent: int, child: int) -> None:
        """Make an issue a part of another one."""
        with self._lock:
            self._issues[parent].sub_issues.append(child)
            self._touch(parent)

    def fail_next(self, count: int, status: int, headers: Mapping[str, str] | None = None) -> None:
        """Answer the next requests with an error, before they have an effect."""
        answer = Answer(status, {"message": "scripted failure"}, headers or {})
        with self._lock:
            self._faults += [answer] * count

    def redirect(self, path: str, answer: Answer) -> None:
        """Answer GET requests whose paths end with `path` in another way from now on."""
        with self._lock:
            self._redirects[path] = answer

    def recover(self) -> None:
        """Fail no more requests, and lose no more answers."""
        with self._lock:
            self._faults.clear()
            self._lost_answers = 0

    def lose_answers(self, count: int) -> None:
        """Perform the next writes by the API, and close their connections instead of answering."""
        with self._lock:
            self._lost_answers += count

    def select(
        self, *, is_open: bool | None, labels: Collection[str] = (), assignee: str = "", milestone: str = ""
    ) -> list[ForgeIssue]:
        """Return the matching issues in order."""
        return [
            issue
            for issue in self._issues.values()
            if is_open in (None, issue.is_open)
            and set(labels) <= set(issue.labels)
            and (not assignee or assignee in issue.assignees)
            and (not milestone or milestone == issue.milestone)
        ]

    def handle(self, method: str, target: str, headers: Mapping[str, str], data: bytes) -> tuple[Answer, bool]:
        """Return the answer to a request, and whether it is lost on its way."""
        with self._lock:
            answer = self._faults.pop(0) if self._faults else self._answer(method, target, headers, data)
            self.requests.append((method, urlsplit(target).path, answer.status))
            is_write = method != "GET" and not isinstance(answer.content, bytes)  # git reads with POST, too
            is_lost = is_write and answer.status < 300 and self._lost_answers > 0
            self._lost_answers -= is_lost
            return answer, is_lost

    def _answer(self, method: str, target: str, headers: Mapping[str, str], data: bytes) -> Answer:
        url, base = urlsplit(target), urlsplit(self.url).path
        for path, answer in self._redirects.items():
            if method == "GET" and url.path.endswith(f"/{path}"):
                return answer
        token = headers.get("PRIVATE-TOKEN") or headers.get("Authorization", "").partition(" ")[2]
        if token not in self._tokens:
            return Answer(401, {"message": "Bad credentials"})
        parts = [part for part in url.path.removeprefix(base).split("/") if part]
        query = dict(parse_qsl(url.query))
        request = Request(method, parts, query, json.loads(data or b"{}"), self._users[self._tokens[token]])
        answer = self.answer(request)
        if method == "GET" and answer.status == 200 and not isinstance(answer.content, str):
            answer = self._one_page(answer, url.path, query)
            tag = f'W/"{hashlib.sha256(json.dumps(answer.content).encode()).hexdigest()[:20]}"'
            if headers.get("If-None-Match") == tag:
                return Answer(304, None, {"ETag": tag})
            return Answer(200, answer.content, {**answer.headers, "ETag": tag})
        return answer

    def _one_page(self, answer: Answer, path: str, query: Mapping[str, str]) -> Answer:
        items = answer.content if isinstance(answer.content, list) else answer.content.get("items")
        if items is None:
            return answer
        size, page = int(query.get("per_page", _DEFAULT_PAGE)), int(query.get("page", 1))
        shown = items[(page - 1) * size : page * size]
        links = {}
        if page * size < len(items):
            following = urlencode({**query, "page": page + 1})
            links = {"Link": f'<{self.origin}{path}?{following}>; rel="next"'}
        content = shown if isinstance(answer.content, list) else {**answer.content, "items": shown}
        return Answer(200, content, links)

    def _set_open(self, number: int, by: str, *, is_open: bool) -> None:
        with self._lock:
            issue = self._issues[number]
            if issue.is_open != is_open:
                issue.is_open = is_open
                self._record(number, "reopened" if is_open else "closed", by)
                issue.closed = None if is_open else issue.updated

    def _record(self, number: int, kind: str, by: str, label: str | None = None) -> None:
        self._issues[number].events.append(IssueEvent(self._next_id(), kind, by, self._touch(number), label))

    def _touch(self, number: int) -> str:
        self._issues[number].updated = self._now()
        return self._issues[number].updated

    def _now(self) -> str:
        """Return a time that is different for each change."""
        seconds = _EPOCH + self._next_id()
        day, rest = divmod(seconds - _EPOCH, 86_400)
        hour, rest = divmod(rest, 3600)
        return f"2026-01-{day + 1:02}T{hour:02}:{rest // 60:02}:{rest % 60:02}Z"

    def _next_id(self) -> int:
        self._ids += 1
        return self._ids

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # one packet: the second would wait for an acknowledgement of the first

            def _handle(self) -> None:
                answer, is_lost = server.handle(self.command, self.path, dict(self.headers), self._read_body())
                if is_lost:
                    self.close_connection = True
                    return
                content = _encode(answer.content)
                self.send_response(answer.status)
                for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _read_body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                chunks = []
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _handle  # noqa: N815  names of the library

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        return Handler


def _encode(content: Any) -> bytes:
    if content is None or isinstance(content, bytes):
        return content or b""
    return (content if isinstance(content, str) else json.dumps(content)).encode()
