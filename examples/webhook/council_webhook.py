"""A sink that posts events to a URL, as JSON.

A body is `{"events": [{"position", "time", "event", "run", …}, …]}`. Whoever receives it may get an event twice, and
tells that by `run` and `position`.
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
        raise ValueError("this is no address of a web server: begin with https://")
    if parts.password:
        raise ValueError("the URL holds a password: name a variable under `token`, it is sent as a bearer token")
    return url


class WebhookOptions(BaseModel):
    """Options of a sink with `use: webhook`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    url: Annotated[str, AfterValidator(_check_url)]
    """Where events are posted; `$NAME` for the value of a variable, where the URL itself is a secret."""
    token: str | None = None
    """The name of a variable; its value is sent as `Authorization: Bearer …`. The file holds no secret."""
    timeout: Annotated[int, Field(ge=1, le=25)] = 10
    """Seconds that the server may take for each step of an answer."""


class _NoRedirects(HTTPRedirectHandler):
    """A redirected POST would arrive as a GET without its body: an error is the better answer."""

    def redirect_request(self, *asked: object) -> None:
        """Follow nothing."""


class Webhook:
    """Posts each batch; an answer other than 2xx raises, and the batch comes again, later and later."""

    Options: ClassVar[type[BaseModel]] = WebhookOptions

    def __init__(self, options: WebhookOptions, /) -> None:
        self._options = options
        self._opener: OpenerDirector = build_opener(_NoRedirects)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *raised: object) -> None:
        pass

    async def send(self, events: Sequence[RecordedEvent]) -> None:
        """Post the events; raises HTTPError or URLError where they are not taken."""
        body = {"events": [_as_json(one) for one in events]}
        headers = {"Content-Type": "application/json", **self._authorization()}
        data = json.dumps(body).encode()
        request = Request(self._url(), data, headers, method="POST")
        # In a thread, since it blocks; one that hangs is left behind when the run's patience ends.
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
        raise RefusedError(f"the variable {name} is not set", "set it, or take it out of the sink's options")
    return value


def _as_json(one: RecordedEvent) -> dict[str, object]:
    return {"position": one.position, "time": one.time, "event": one.event.type, **one.event.data}


@hookimpl
def council_register_sinks(register: RegisterSink) -> None:
    """Register `use: webhook`."""
    register("webhook", Webhook)
