"""A sink that posts events to a URL, as JSON.

The body of a request is `{"events": [{"position", "time", "event", "run", …}, …]}`. A receiver may get an event twice;
it can detect duplicates by `run` and `position`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Self
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

import anyio.to_thread
import pluggy
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from orchestrator.errors import RefusedError
from orchestrator.hookspecs import ENTRY_POINT_GROUP, RegisterSink
from orchestrator.protocols import RecordedEvent

hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


def _check_url(url: str) -> str:
    if re.fullmatch(r"\$[A-Za-z_][A-Za-z0-9_]*", url):
        return url
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("not an http(s) URL: begin with https://")
    if parts.password:
        raise ValueError(
            "the URL has a password: put the name of a variable in `token`, which is sent as a bearer token"
        )
    return url


class WebhookOptions(BaseModel):
    """Options of a sink with `use: webhook`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    url: Annotated[str, AfterValidator(_check_url)]
    """The URL to post to; for a secret URL, `$NAME` reads it from a variable."""
    token: str | None = None
    """The name of a variable whose value is sent as `Authorization: Bearer …`, so that the file contains no secret."""
    timeout: Annotated[int, Field(ge=1, le=25)] = 10
    """The timeout of each network operation, in seconds."""


class _NoRedirects(HTTPRedirectHandler):
    """Reject redirects: a redirected POST would arrive as a GET without its body."""

    def redirect_request(self, *asked: object) -> None:
        """Do not follow the redirect."""


class Webhook:
    """A sink that posts each batch of events.

    Any response other than 2xx raises, and the batch is retried.
    """

    Options: ClassVar[type[BaseModel]] = WebhookOptions

    def __init__(self, options: WebhookOptions, /) -> None:
        self._options = options
        self._opener: OpenerDirector = build_opener(_NoRedirects)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *raised: object) -> None:
        pass

    async def send(self, events: Sequence[RecordedEvent]) -> None:
        """Post the events.

        Raises HTTPError or URLError if the server does not accept them.
        """
        body = {"events": [_as_json(one) for one in events]}
        headers = {"Content-Type": "application/json", **self._authorization()}
        data = json.dumps(body).encode()
        request = Request(self._url(), data, headers, method="POST")  # noqa: S310  _check_url has seen it
        # In a thread, because it blocks; a hanging one is abandoned when the run's deadline for sinks expires.
        await anyio.to_thread.run_sync(self._post, request, abandon_on_cancel=True)

    def _post(self, request: Request) -> None:
        with self._opener.open(request, timeout=self._options.timeout) as answer:
            answer.read()

    def _url(self) -> str:
        url = self._options.url
        return _check_url(_variable(url[1:])) if url.startswith("$") else url

    def _authorization(self) -> dict[str, str]:
        name = self._options.token
        return {} if name is None else {"Authorization": f"Bearer {_variable(name)}"}


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise RefusedError(f"the variable {name} is not set", "set it, or remove it from the sink's options")
    return value


def _as_json(one: RecordedEvent) -> dict[str, object]:
    return {"position": one.position, "time": one.time, "event": one.event.type, **one.event.data}


@hookimpl
def council_register_sinks(register: RegisterSink) -> None:
    """Register `use: webhook`."""
    register("webhook", Webhook)
