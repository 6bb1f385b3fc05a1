"""A server that refuses a run, or whose disk is full: the run waits with the fix in its message, and loses nothing."""

from __future__ import annotations

import re
import secrets
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import psycopg
import pytest
from redis import ConnectionError, Redis  # noqa: A004

from orchestrator.errors import StoreUnavailable
from orchestrator.protocols import Commit, Event
from tests import postgres_server, redis_server
from tests.command_server import StartedCommand
from tests.conftest import Repository
from tests.integration.runs.test_shared_runs import states
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer, type_commands
from tests.small_disk import fill, mounted
from tests.stores import open_store
from tests.waiting import wait_for

USER = "council"
Repair = Callable[[str], object]
"""Repairs a server by typing the commands of a message."""
pytestmark = pytest.mark.extended


@contextmanager
def postgres() -> Iterator[PostgresServer]:
    """Start a server with a user of the store who is no superuser, and the user of another program."""
    with postgres_server.started_server(max_connections="20") as server:
        with server.connect() as database:
            database.execute(f"CREATE ROLE {USER} LOGIN")
            database.execute(f"GRANT CREATE ON DATABASE postgres TO {USER}")
            database.execute("CREATE ROLE other LOGIN")
        yield server


def end_sessions(database: psycopg.Connection[Any]) -> int:
    """End all connections of the store's user; return their number."""
    found = database.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", (USER,))
    return len(found.fetchall())


def typing_statement(database: psycopg.Connection[Any]) -> Repair:
    """Return a repair that executes the statement of a message."""
    return lambda message: database.execute(message.split("`")[1])


def statement(text: str) -> Callable[[PostgresServer], AbstractContextManager[Repair]]:
    """Return a fault: a statement after which the sessions of the store's user are ended."""

    @contextmanager
    def fault(server: PostgresServer) -> Iterator[Repair]:
        with server.connect() as database:
            ((schema,),) = database.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'test_%'").fetchall()
            database.execute(text.format(user=USER, schema=schema))
            end_sessions(database)
            yield typing_statement(database)

    return fault


@contextmanager
def all_connections_used(server: PostgresServer) -> Iterator[Repair]:
    """Let another program use all connections, those of the store's user among them."""
    others = list[psycopg.Connection[Any]]()

    def end_others(_message: str) -> None:
        while others:
            others.pop().close()

    with server.connect() as database:
        while end_sessions(database):
            with suppress(psycopg.OperationalError):
                while True:
                    others.append(server.connect("other"))
        yield end_others
        end_others("")


@contextmanager
def redis() -> Iterator[RedisServer]:
    """Start a server with a user of the store."""
    with redis_server.started_server() as server:
        with Redis(port=server.port) as client:
            client.execute_command("ACL", "SETUSER", USER, "on", "nopass", "~*", "&*", "+@all")
        yield server


def redis_command(*command: str) -> Callable[[RedisServer], AbstractContextManager[Repair]]:
    """Return a fault: a command after which all other connections are ended."""

    @contextmanager
    def fault(server: RedisServer) -> Iterator[Repair]:
        with Redis(port=server.port, single_connection_client=True) as client:
            client.execute_command(*command)
            client.client_kill_filter(_type="normal", skipme=True)
            yield type_commands

    return fault


@contextmanager
def all_clients_connected(server: RedisServer) -> Iterator[Repair]:
    """Let another program use all connections, those of the store's user among them."""
    others = list[Redis]()

    def end_others(_message: str) -> None:
        while others:
            others.pop().close()

    with Redis(port=server.port, single_connection_client=True) as client:
        client.config_set("maxclients", 20)
        while client.client_kill_filter(user=USER):
            with suppress(ConnectionError):
                while True:
                    others.append(Redis(port=server.port, single_connection_client=True))
        yield end_others
        end_others("")


Server = PostgresServer | RedisServer
SERVERS: dict[str, Callable[[], AbstractContextManager[Server]]] = {"postgres": postgres, "redis": redis}
TABLES = 'ALL ON ALL TABLES IN SCHEMA "{schema}"'


def gated_tasks(repository: Repository, *, more: int = 1) -> tuple[list[dict[str, Any]], Path]:
    """Return a task that waits for a file, with `more` tasks after it, and that file."""
    gate = repository.spawns.parent / "gate"
    names = [f"t{number}" for number in range(more)]
    tasks = [{"id": name, "prompt": f"write {name}.txt 1", "needs": ["gated"]} for name in names]
    return [{"id": "gated", "prompt": f"await {gate}\nwrite gated.txt 1"}, *tasks], gate


def read_notice(run: StartedCommand) -> str:
    """Return the line in which a run reports that it waits for its store."""
    assert run.stderr is not None
    lines = list[str]()
    for line in run.stderr:
        lines.append(line)
        if "cannot be read or written" in line:
            return line
    raise AssertionError(lines)


@contextmanager
def gated_run(repository: Repository, kind: str) -> Iterator[tuple[Any, StartedCommand, Path]]:
    """Return a server, a run that uses it and has begun a session, and the file that lets the session end."""
    with SERVERS[kind]() as server:
        repository.environ["COUNCIL_STATE"] = server.url(user=USER)
        tasks, gate = gated_tasks(repository)
        run = repository.start("run", str(repository.configure(tasks)))
        wait_for(repository.spawns.exists)
        yield server, run, gate


@pytest.mark.parametrize(
    ("kind", "fault", "what"),
    [
        pytest.param("postgres", all_connections_used, "maximum of connections: close other", id="max_connections"),
        pytest.param("postgres", statement("ALTER ROLE {user} CONNECTION LIMIT 0"), "for role", id="role limit"),
        pytest.param("postgres", statement("ALTER ROLE {user} NOLOGIN"), "not permitted to log in", id="no login"),
        pytest.param("postgres", statement(f"REVOKE {TABLES} FROM {{user}}"), "denied for table", id="tables"),
        pytest.param("redis", all_clients_connected, "maximum of connections: close other", id="maxclients"),
        pytest.param("redis", redis_command("ACL", "SETUSER", USER, "-xadd"), "lacks a privilege", id="command"),
        pytest.param("redis", redis_command("ACL", "SETUSER", USER, "off"), "user is disabled", id="disabled user"),
    ],
)
def test_run_waits_until_the_command_in_its_message_repairs_the_server(
    repository: Repository, kind: str, fault: Callable[[Any], AbstractContextManager[Repair]], what: str
) -> None:
    """Other commands end with exit code 1 and the same message in one line."""
    with gated_run(repository, kind) as (server, run, gate):
        with fault(server) as repair:
            gate.touch()
            assert what in read_notice(run)
            shown = repository.council("checkpoint", "create", "--json")
            assert (shown.code, shown.stderr) == (1, ""), shown
            assert what in f"{shown.result['error']}: {shown.result['remedy']}"
            assert run.poll() is None
            repair(shown.result["remedy"])
            stdout, stderr = run.communicate(timeout=60)
        assert (run.returncode, "Traceback" in stderr) == (0, False), (stdout, stderr)
        assert set(states(repository).values()) == {"landed"}


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        pytest.param("postgres", statement("ALTER ROLE {user} NOLOGIN"), id="postgres"),
        pytest.param("redis", redis_command("ACL", "SETUSER", USER, "off"), id="redis"),
    ],
)
def test_run_that_was_ended_while_its_server_refused_it_is_resumed(
    repository: Repository, kind: str, fault: Callable[[Any], AbstractContextManager[Repair]]
) -> None:
    """Until the repair, `resume` ends with exit code 1 and one line."""
    with gated_run(repository, kind) as (server, run, gate):
        with fault(server) as repair:
            gate.touch()
            message = read_notice(run)
            run.send_signal(signal.SIGINT)
            stdout, stderr = run.communicate(timeout=60)
            assert (run.returncode, "Traceback" in stderr) == (1, False), (stdout, stderr)
            assert "no recorded work is lost" in stderr
            refused = repository.council("resume")
            assert (refused.code, len(refused.stderr.splitlines())) == (1, 1), refused
            assert refused.stderr.split(": ", 1)[1].split("; no recorded work is lost")[0] in message
            repair(message)
        resumed = repository.council("resume", "--json")
        assert (resumed.code, set(resumed.states.values())) == (0, {"landed"}), resumed


@contextmanager
def disk(size: str) -> Iterator[Path]:
    """Mount a small disk that any user can write to."""
    with tempfile.TemporaryDirectory(prefix="council-disk-") as folder:
        Path(folder).chmod(0o755)
        with mounted(Path(folder) / "disk", size) as mount:
            yield mount


async def fill_store(url: str, filler: Path) -> None:
    """Fill the disk of a server, and commit until it refuses a commit."""
    async with open_store(url) as store:
        await store.commit(Commit([], [Event("filler")]))
        fill(filler)
        with suppress(StoreUnavailable):
            while True:
                await store.commit(Commit([], [Event("filler", {"text": secrets.token_hex(5_000)})]))


@pytest.mark.parametrize(
    ("kind", "what", "more"),
    [
        pytest.param("data", "the server's disk is full", 6, id="postgres data"),
        pytest.param("wal", "start the server|see the server's log", 6, id="postgres wal"),
        pytest.param("always", "start the server", 1, id="redis always"),
        pytest.param("everysec", "the server's disk is full", 1, id="redis everysec"),
    ],
)
def test_run_waits_while_the_disk_of_its_server_is_full(
    repository: Repository, kind: str, what: str, more: int
) -> None:
    """A server that ends because of it is started again by the user; nothing is lost."""
    with disk("96m") as folder, server_on_disk(kind, folder) as server:
        repository.environ["COUNCIL_STATE"] = server.url()
        tasks, gate = gated_tasks(repository, more=more)
        run = repository.start("run", str(repository.configure(tasks)))
        wait_for(repository.spawns.exists, 60)  # with `everysec`, a commit takes a second
        anyio.run(fill_store, server.url(), folder / "filler")
        gate.touch()
        notice = read_notice(run)
        assert re.search(what, notice), notice
        assert run.poll() is None
        (folder / "filler").unlink()
        if "start the server" in what:
            server.kill()
            server.start()
        stdout, stderr = run.communicate(timeout=60)
        assert (run.returncode, "Traceback" in stderr) == (0, False), (stdout, stderr)
        assert set(states(repository).values()) == {"landed"}


@contextmanager
def server_on_disk(kind: str, folder: Path) -> Iterator[Server]:
    """Start a server whose files, or write-ahead log, are in a folder."""
    starting: AbstractContextManager[Server]
    if kind == "data":
        starting = postgres_server.started_server(disk=folder)
    elif kind == "wal":
        starting = postgres_server.started_server(wal=folder)
    else:
        starting = redis_server.started_server(disk=folder, appendfsync=kind)
    with starting as server:
        yield server
