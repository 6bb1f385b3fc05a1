"""A PgBouncer in transaction mode in front of a PostgreSQL server; without the program, tests are skipped."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests import postgres_server
from tests.postgres_server import ADMIN, PostgresServer
from tests.servers import start_server

_SETTINGS = """
[databases]
* = host=127.0.0.1 port={server}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = users
pool_mode = transaction
default_pool_size = 3
server_login_retry = 1
"""


class Pooler:
    """A server whose URLs lead through the pooler: all clients share three connections."""

    def __init__(self, program: str, server: PostgresServer) -> None:
        """Start the pooler."""
        self.server, self.kill, self.start = server, server.kill, server.start
        self.folder = Path(tempfile.mkdtemp(prefix="council-pooler-"))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        (self.folder / "users").write_text(f'"{ADMIN}" ""\n')
        (self.folder / "settings").write_text(_SETTINGS.format(server=server.port, port=self.port))
        if server.user is not None:
            os.chown(self.folder, server.user, server.user)
        self.process = start_server([program, "settings"], self.folder, self._is_ready, user=server.user)

    def _is_ready(self, _process: int, _output: str) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def url(self, schema: str = "", *, port: int = 0) -> str:
        """Return the URL of a store in a schema; by default in an unused one."""
        return self.server.url(schema, port=port or self.port)

    def close(self) -> None:
        """Stop the pooler."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def started_pooler(server: PostgresServer) -> Iterator[Pooler]:
    """Start a pooler in front of a server."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("no pgbouncer: install it")
    with closing(Pooler(program, server)) as pooler:
        yield pooler


@contextmanager
def started_server() -> Iterator[Pooler]:
    """Start a server of the test's own, and a pooler in front of it."""
    with postgres_server.started_server() as server, started_pooler(server) as pooler:
        yield pooler
