"""Session contexts: an update and a listing, compared with renamed JSON files.

python benchmarks/contexts.py [--quick] [--folder PATH]
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Final

import anyio

from benchmarks.measure import (
    QUICK_ROUNDS,
    ROUNDS,
    BenchmarkRow,
    Cost,
    argument_parser,
    measure_cost,
    median,
    print_table,
    scratch_folder,
)
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.sessions.contexts import SessionContext
from orchestrator.engine.session_api.contexts import SessionContexts
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock

SESSIONS: Final = 100
WRITE_LIMIT, READ_LIMIT = 1.0, 5.0  # ms
#: The maximum number of secrets of an environment, all of which are searched for in every text.
_SECRETS: Final = tuple(f"a-secret-of-this-machine-{number}" for number in range(20))


def measure(*, quick: bool, folder: Path | None = None) -> list[BenchmarkRow]:
    """Return the rows of this benchmark."""
    with scratch_folder(folder) as scratch:
        return anyio.run(_measure, scratch, QUICK_ROUNDS if quick else ROUNDS)


async def _measure(scratch: Path, rounds: int) -> list[BenchmarkRow]:
    sessions = [SessionName("20260102-030405-ab12", f"task-{number}", 1) for number in range(SESSIONS)]
    files = scratch / "files"
    files.mkdir()
    async with FileStore.open(scratch / "state", SystemClock()) as store:
        contexts = SessionContexts(store, SystemClock(), "0123456789abcdef", Redactor(_SECRETS), orchestrator="bench")
        for session in sessions:
            await contexts.begin(session, "claude-code")
        writes, reads = list[tuple[Cost, Cost]](), list[tuple[Cost, Cost]]()
        for number in range(rounds + 1):
            message = f"step {number} of adding the endpoint for what was ordered"
            with measure_cost() as ours:
                for session in sessions:
                    await contexts.update(session, file=f"src/{session.task}.py", message=message, progress="50%")
            with measure_cost() as theirs:
                for session in sessions:
                    _write(files, session, message)
            with measure_cost() as our_look:
                found = await contexts.all()
            with measure_cost() as their_look:
                read = [json.loads(path.read_bytes()) for path in files.glob("*.json")]
            assert len(found) == len(read) == SESSIONS  # noqa: S101  else something else was measured
            if number:  # the first run loads files into memory
                writes.append((ours(), theirs()))
                reads.append((our_look(), their_look()))
    return [
        _row("a status update", writes, SESSIONS, WRITE_LIMIT),
        _row(f"a list of {SESSIONS} sessions", reads, 1, READ_LIMIT),
    ]


def _row(what: str, pairs: list[tuple[Cost, Cost]], each: int, limit: float) -> BenchmarkRow:
    ours, theirs = (median([pair[side].wall for pair in pairs]) / each * 1e3 for side in (0, 1))
    ratio = median([ours.wall / other.wall for ours, other in pairs])
    return BenchmarkRow(what, ours, "ms", f"JSON files, renamed: {theirs:.3g} ms", ratio, limit)


def _write(folder: Path, session: SessionName, message: str) -> None:
    context = SessionContext(
        **session._asdict(),
        adapter="claude-code",
        orchestrator="bench",
        scope="0123456789abcdef",
        file=f"src/{session.task}.py",
        message=message,
        progress="50%",
        started=time.time(),
        updated=time.time(),
    )
    staged = folder / f"{session.task}.new"
    staged.write_bytes(json.dumps(context.to_json()).encode())
    staged.replace(folder / f"{session.task}.json")


if __name__ == "__main__":
    options = argument_parser(__doc__).parse_args()
    print_table(measure(quick=options.quick, folder=options.folder))
