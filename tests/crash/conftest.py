"""Fixtures of the crash tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.store_kinds import SERVERS, Server


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Return a server of the test's own."""
    with SERVERS[request.param].started_server() as made:
        yield made
