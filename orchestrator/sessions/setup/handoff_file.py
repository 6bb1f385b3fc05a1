"""Read `$COUNCIL_HANDOFF`, the file in which a session writes its handoff.

The file is untrusted: links are not followed, only a regular file is read, and its size is limited.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import EFBIG, EINVAL, ELOOP, EMLINK

import anyio.to_thread

from orchestrator.client import strict_json
from orchestrator.client.commands import MAX_HANDOFF_BYTES
from orchestrator.protocols import JsonObject
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.system import untrusted_files

#: The variable with the path of the file.
HANDOFF_VARIABLE = "COUNCIL_HANDOFF"

_OBJECT = "write one JSON object to it"


@dataclass(frozen=True, slots=True)
class HandoffData:
    """A JSON object that a session wrote, not validated; it may contain secrets."""

    data: JsonObject


@dataclass(frozen=True, slots=True)
class MalformedHandoff:
    """A handoff that is not a JSON object: the reason, and what the agent should do."""

    reason: str
    remedy: str = "write a regular file"


_NO_FILE = MalformedHandoff(f"${HANDOFF_VARIABLE} is a link or not a regular file")


async def read_handoff(worktree: Worktree) -> HandoffData | MalformedHandoff | None:
    """Return the handoff of a finished session, or None if it wrote none."""
    return await anyio.to_thread.run_sync(_read, worktree)


def _read(worktree: Worktree) -> HandoffData | MalformedHandoff | None:
    file = worktree.handoff_file
    try:
        with untrusted_files.open_folder(file.parent):
            pass
    except FileNotFoundError:
        return None
    except OSError:  # a link or a file
        return MalformedHandoff(f"the folder of ${HANDOFF_VARIABLE} was replaced", "leave the folder unchanged")
    try:
        data = untrusted_files.read_file(file.parent, file.name, MAX_HANDOFF_BYTES, sole=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        return _unread(error)
    try:
        value = strict_json.parse(data)
    except ValueError as error:
        return MalformedHandoff(f"invalid content of ${HANDOFF_VARIABLE}: {error}", _OBJECT)
    if not isinstance(value, dict):
        return MalformedHandoff(f"invalid content of ${HANDOFF_VARIABLE}: not a JSON object", _OBJECT)
    return HandoffData(value)


def _unread(error: OSError) -> MalformedHandoff:
    if error.errno in {EINVAL, ELOOP, EMLINK}:
        return _NO_FILE
    if error.errno == EFBIG:
        remedy = "include only what the next phase needs, and refer to files for the rest"
        return MalformedHandoff(f"${HANDOFF_VARIABLE} exceeds the limit of {MAX_HANDOFF_BYTES} bytes", remedy)
    return MalformedHandoff(f"can't read ${HANDOFF_VARIABLE}: {error.strerror}")
