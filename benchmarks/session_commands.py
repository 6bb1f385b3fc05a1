"""The duration of a session command and of the hook before an edit.

    python benchmarks/session_commands.py [--quick]

The result is the 95th percentile of wall time, alternating with a Python that does nothing; the requests are answered
by a real session socket whose service responds immediately.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

from anyio.from_thread import start_blocking_portal

from benchmarks.measure import (
    QUICK_ROUNDS,
    BenchmarkRow,
    Cost,
    argument_parser,
    measure_cost,
    measure_pairs,
    print_table,
    scratch_folder,
    user_environment,
)
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.protocols import JsonObject
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.slots import WorktreeSlot
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.socket.listener import SessionSocket, open_session_socket

_ROUNDS: Final = 100
_LIMIT: Final = 0.05
_EDIT: Final = {"hook_event_name": "PreToolUse", "tool_name": "Write", "tool_input": {"file_path": "src/a.py"}}


class _FakeSessionService:
    @asynccontextmanager
    async def hold_slot(self, _session: SessionName) -> AsyncIterator[None]:
        yield

    async def handle(self, _session: SessionName, command: str, _arguments: JsonObject) -> JsonObject:
        reported = {"allowed": True, "owner": None, "since": None, "reason": None}
        return reported if command == "check_edit" else {"peers": []}


def measure(*, quick: bool, folder: Path | None = None) -> list[BenchmarkRow]:
    """Return the rows of this benchmark."""
    rounds = QUICK_ROUNDS if quick else _ROUNDS
    with scratch_folder(folder) as scratch, _session(scratch) as (worktree, session_socket):
        return [
            _row("council peers, in a session", worktree, [session_socket.command, "peers"], b"", rounds),
            _row(
                "the hook before an edit",
                worktree,
                list(session_socket.hook("pre-edit")),
                json.dumps(_EDIT).encode(),
                rounds,
            ),
        ]


def _row(what: str, worktree: Worktree, argv: list[str], given: bytes, rounds: int) -> BenchmarkRow:
    bare = [sys.executable, "-c", "pass"]
    env = user_environment()
    pairs = measure_pairs(
        lambda: _cost(argv, env, worktree.tree, given), lambda: _cost(bare, env, worktree.tree, b""), rounds
    )
    took, base = (_percentile_95([pair[side].wall for pair in pairs]) for side in (0, 1))
    return BenchmarkRow(f"{what}: 95 of 100 within", took, "s", f"python -c pass: {base:.3g} s", took / base, _LIMIT)


def _percentile_95(seconds: list[float]) -> float:
    return sorted(seconds)[max(0, -(-len(seconds) * 95 // 100) - 1)]


def _cost(argv: list[str], env: dict[str, str], cwd: Path, given: bytes) -> Cost:
    with measure_cost() as cost:
        subprocess.run(argv, env=env, cwd=cwd, input=given, stdout=subprocess.DEVNULL, check=True)
    return cost()


@contextmanager
def _session(folder: Path) -> Iterator[tuple[Worktree, SessionSocket]]:
    """Serve a session socket from a thread, like an orchestrator from another process."""
    hub = Hub(folder / "hub")
    slot = WorktreeSlot(hub, 1)
    worktree = Worktree(hub, "run-1", "task", 1, held_slot=slot)
    for made in (worktree.git_dir, slot.tree / "src"):
        made.mkdir(parents=True)
    (slot.tree / ".git").write_text(f"gitdir: {worktree.git_dir}\n")
    with (
        worktree.lock.open("w") as lock,
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(open_session_socket(worktree, _FakeSessionService())) as session_socket,
    ):
        # Like a supervisor: only its descendants are answered.
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps({"pid": os.getpid()}))
        lock.flush()
        yield worktree, session_socket


if __name__ == "__main__":
    options = argument_parser(__doc__).parse_args()
    print_table(measure(quick=options.quick, folder=options.folder))
