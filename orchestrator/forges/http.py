"""Send requests to the API of a forge.

Unchanged answers cost nothing: an `ETag` (RFC 9110 §8.8.3) is sent with the next request of the same page. Requests are
repeated after errors of the network or the server, except those that would create a second object.
"""

from __future__ import annotations

import json
import re
import ssl
import time
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import anyio
import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_exponential
from tenacity.wait import wait_base

from orchestrator.errors import RefusedError

_TIMEOUT: Final = 15.0
_MAX_TRIES: Final = 4
_WAIT: Final[wait_base] = wait_exponential(multiplier=0.5, max=5.0)
#: The longest wait for a rate limit within a call, in seconds; a longer one fails the synchronization until later.
_LONGEST_WAIT: Final = 10.0
#: The longest wait in seconds that is reported: a day. And a number of seconds, as servers should send it.
_FURTHEST_WAIT: Final = 86_400.0
_SECONDS: Final = re.compile(r"[0-9]+")
_MAX_PAGES: Final = 100
_PER_PAGE: Final = 100
_NO_FILTERS: Final[Mapping[str, str]] = MappingProxyType({})
#: The status codes of objects that are hidden, missing, deleted or moved elsewhere. Redirects are not followed: another
#: server would receive the token, and a transferred issue has another number in another repository.
_MISSING: Final = frozenset({301, 302, 303, 307, 308, 403, 404, 410})
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})


class _Repeatable(Exception):
    """A request failed, and may be repeated after `wait` seconds (None: soon)."""

    def __init__(self, reason: RefusedError, wait: float | None = None) -> None:
        self.reason, self.wait = reason, wait


class ForgeHttp:
    """A connection to the API of a forge; `remedies` explain the status codes 401, 403 and 404."""

    def __init__(self, base: str, headers: Mapping[str, str], remedies: Mapping[int, str]) -> None:
        """Raises RefusedError for a URL that would send the token in clear text."""
        url = urlsplit(base)
        if url.scheme not in {"http", "https"} or not url.hostname:
            raise RefusedError(f"{base!r} is not the URL of an API", "write one such as https://git.example.com/api/v4")
        if url.scheme == "http" and url.hostname not in _LOOPBACK:
            raise RefusedError(f"{base} would receive the token unencrypted", "use a URL that begins with https://")
        self._base, self._host, self._remedies = base.rstrip("/"), url.hostname, remedies
        self._client = httpx.AsyncClient(
            headers={"User-Agent": "cli-council", **headers}, timeout=_TIMEOUT, verify=_ssl_context()
        )
        self._pages: dict[str, tuple[str, Any, str | None]] = {}
        """The ETag, the content and the next page of each page read."""

    async def __aenter__(self) -> Self:
        """Open nothing: each request opens its connection, or uses an open one."""
        return self

    async def __aexit__(self, *raised: object) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def get(self, path: str) -> Any:
        """Return an answer as JSON; None if it does not exist or is not visible."""
        found, _ = await self._page(self._url(path, _NO_FILTERS), allow_missing=True)
        return found

    async def pages(
        self, path: str, filters: Mapping[str, str] = _NO_FILTERS, *, field: str | None = None
    ) -> list[Any]:
        """Return the items of all pages: each page, or a field of it, is a list."""
        url: str | None = self._url(path, {"per_page": str(_PER_PAGE), **filters})
        items: list[Any] = []
        for _ in range(_MAX_PAGES):
            if url is None:
                return items
            found, url = await self._page(url, allow_missing=False)
            items += found if field is None else found[field]
        raise RefusedError(f"{self._host} lists more than {_MAX_PAGES * _PER_PAGE} issues", "select fewer, by a label")

    async def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Change something; return the answer as JSON, None if it has no content.

        `POST` is sent once, other methods are repeated. DELETE may find nothing. `path` may also be a URL of the same
        server.
        """
        allowed = frozenset({404}) if method == "DELETE" else frozenset[int]()
        url = self._url(path, _NO_FILTERS)
        answer = await self._send(method, url, body, may_repeat=method != "POST", allowed=allowed)
        return self._json(answer) if answer.content else None

    async def read_text(self, path: str) -> str:
        """Return an answer as text; empty if it does not exist or is not visible."""
        url = self._url(path, _NO_FILTERS)
        answer = await self._send("GET", url, None, may_repeat=True, allowed=_MISSING)
        return answer.text if answer.is_success else ""

    def _json(self, answer: httpx.Response) -> Any:
        try:
            found = answer.json()
        except ValueError:
            raise RefusedError(f"{self._host} did not answer with JSON", "check the URL of the API") from None
        if "\\ud" in answer.text.lower():  # perhaps half of a surrogate pair, which no store accepts
            found = json.loads(json.dumps(found, ensure_ascii=False).encode(errors="replace"))
        return found

    def _url(self, path: str, filters: Mapping[str, str]) -> str:
        if urlsplit(path).netloc:
            return path
        return str(httpx.URL(f"{self._base}/{path}", params=dict(filters) or None))

    async def _page(self, url: str, *, allow_missing: bool) -> tuple[Any, str | None]:
        known = self._pages.get(url)
        headers = {} if known is None else {"If-None-Match": known[0]}
        allowed = _MISSING | {304} if allow_missing else frozenset({304})
        answer = await self._send("GET", url, None, may_repeat=True, allowed=allowed, headers=headers)
        if answer.status_code == 304 and known is not None:
            return known[1], known[2]
        if answer.status_code in _MISSING:
            return None, None
        following = answer.links.get("next", {}).get("url")
        if following is not None and _origin(following) != _origin(self._base):  # it would receive the token
            raise RefusedError(f"{self._host} refers to another server for the next page", "check the URL of the API")
        content = self._json(answer)
        if (tag := answer.headers.get("etag")) is not None:
            self._pages[url] = tag, content, following
        return content, following

    async def _send(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | None,
        *,
        may_repeat: bool,
        allowed: frozenset[int],
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Repeatable),
            stop=stop_after_attempt(_MAX_TRIES if may_repeat else 1),
            wait=_choose_wait,
            sleep=anyio.sleep,
            reraise=True,
        )
        try:
            return await retrying(self._try, method, url, body, allowed, headers or {})
        except _Repeatable as failed:
            raise failed.reason from failed

    async def _try(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | None,
        allowed: frozenset[int],
        headers: Mapping[str, str],
    ) -> httpx.Response:
        try:
            answer = await self._client.request(method, url, json=body, headers=dict(headers))
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise _Repeatable(RefusedError(f"{self._host} can't be reached: {reason}", "check the network")) from error
        if (wait := rate_limit_wait(answer.status_code, answer.headers, time.time())) is not None:
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + wait))
            limited = RefusedError(f"{self._host} accepts no more requests until {until}", "wait, or sync less often")
            raise _Repeatable(limited, wait) if wait <= _LONGEST_WAIT else limited
        if answer.is_success or answer.status_code in allowed:
            return answer
        if answer.is_redirect:
            moved = f"{self._host} says that {urlsplit(url).path} has moved"
            raise RefusedError(moved, "check the URL of the API and the name of the repository")
        message = f"{self._host} answered {answer.status_code} to {method} {urlsplit(url).path}{_describe(answer)}"
        failed = RefusedError(message, self._remedies.get(answer.status_code, "try again later"))
        raise _Repeatable(failed) if answer.status_code >= 500 else failed


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


@cache
def _ssl_context() -> ssl.SSLContext:
    """Return the certificates to trust, which take a tenth of a second to read."""
    return httpx.create_ssl_context()


def _choose_wait(state: RetryCallState) -> float:
    failed = None if state.outcome is None else state.outcome.exception()
    asked = failed.wait if isinstance(failed, _Repeatable) else None
    return _WAIT(state) if asked is None else asked


def rate_limit_wait(status: int, headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds until the next request is accepted; None if no limit is exceeded.

    GitHub answers 403 or 429, with `retry-after` for a secondary limit, else with the time of the reset
    (docs.github.com, "Rate limits for the REST API"); GitLab answers 429 with `retry-after`.
    """
    if status not in {403, 429}:
        return None
    after, left, reset = (
        headers.get("retry-after"),
        headers.get("x-ratelimit-remaining"),
        headers.get("x-ratelimit-reset"),
    )
    if after is not None and _SECONDS.fullmatch(after):
        return min(float(after), _FURTHEST_WAIT)
    if left == "0" and reset is not None and _SECONDS.fullmatch(reset):
        return min(max(float(reset) - now, 0.0) + 1.0, _FURTHEST_WAIT)
    return 60.0 if status == 429 else None


def _describe(answer: httpx.Response) -> str:
    """Return the message of an answer as a part of a sentence."""
    try:
        found = answer.json()
    except ValueError:
        return ""
    message = found.get("message") if isinstance(found, dict) else None
    return f": {str(message)[:200]}" if message else ""
