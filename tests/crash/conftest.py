"""Fixtures of the crash tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Repository
from tests.machines import Cluster, open_cluster
from tests.store_kinds import SERVERS, Server


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Return a server of the test's own."""
    with SERVERS[request.param].started_server() as made:
        yield made


@pytest.fixture
def cluster(repository: Repository, server: Server) -> Iterator[Cluster]:
    """Yield a remote with one commit on `main`, and machines that use the server."""
    with open_cluster(repository, server.url()) as made:
        yield made
