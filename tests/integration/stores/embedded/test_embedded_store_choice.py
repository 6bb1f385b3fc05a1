"""Why the embedded store is a log and not SQLite: what one changed byte costs after a killed process."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

from orchestrator.protocols import Key
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock

DOCUMENTS = 20

LOG_WRITER = textwrap.dedent("""
    import anyio, os, signal, sys
    from pathlib import Path
    from orchestrator.protocols import Commit, Key, Write
    from orchestrator.state.stores.file import FileStore
    from orchestrator.system.clock import SystemClock

    async def main():
        async with FileStore.open(Path(sys.argv[1]), SystemClock()) as store:
            for number in range(int(sys.argv[2])):
                await store.commit(Commit([Write(Key("task", f"{number:02}"), 0, {"text": "needle"})]))
            os.kill(os.getpid(), signal.SIGKILL)

    anyio.run(main)
""")

SQLITE_WRITER = textwrap.dedent("""
    import os, signal, sqlite3, sys
    database = sqlite3.connect(sys.argv[1], isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE task (id INTEGER PRIMARY KEY, text TEXT)")
    for number in range(int(sys.argv[2])):
        database.execute("INSERT INTO task VALUES (?, 'needle')", (number,))
    os.kill(os.getpid(), signal.SIGKILL)
""")


def commit_until_killed(script: str, path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", script, str(path), str(DOCUMENTS)], check=False)
    assert done.returncode == -signal.SIGKILL


def change_byte(path: Path) -> None:
    """Change a byte of the first committed document."""
    content = bytearray(path.read_bytes())
    content[content.index(b"needle")] ^= 1
    path.write_bytes(content)


async def test_log_with_a_changed_byte_loses_one_document_and_reports_it(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    commit_until_killed(LOG_WRITER, folder)
    change_byte(max(folder.glob("*.jsonl")))
    async with FileStore.open(folder, SystemClock()) as store:
        found = [await store.get(Key("task", f"{number:02}")) for number in range(DOCUMENTS)]
        assert len([one for one in found if one is None or one.damaged]) == 1
        assert len(store.damage) == 1


def test_sqlite_with_a_changed_byte_loses_all_documents_and_reports_nothing(tmp_path: Path) -> None:
    """At the first invalid frame SQLite drops the rest of its write-ahead log (https://sqlite.org/walformat.html)."""
    path = tmp_path / "state.db"
    commit_until_killed(SQLITE_WRITER, path)
    change_byte(path.with_name("state.db-wal"))
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM task").fetchone() == (0,)
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
