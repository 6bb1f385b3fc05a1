"""What a session leaves for whoever goes on: the file that `$COUNCIL_HANDOFF` names, read once the session is over.

An agent wrote it, or whatever it likes: no link is followed, only a file is read, and no more of it than fits.
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

#: Names the file to a session.
HANDOFF_VARIABLE = "COUNCIL_HANDOFF"

_OBJECT = "write one JSON object there"


@dataclass(frozen=True, slots=True)
class HandoffData:
    """A session wrote a JSON object, which may hold secrets; whether it is what was wanted is for others to say."""

    data: JsonObject


@dataclass(frozen=True, slots=True)
class MalformedHandoff:
    """A session wrote what can't be read as a JSON object: why, and what the agent is to do."""

    why: str
    remedy: str = "write a plain file there"


_NO_FILE = MalformedHandoff(f"${HANDOFF_VARIABLE} is a link or no file")


async def read_handoff(worktree: Worktree) -> HandoffData | MalformedHandoff | None:
    """Return what a session wrote that is over; None where it wrote nothing."""
    return await anyio.to_thread.run_sync(_read, worktree)


def _read(worktree: Worktree) -> HandoffData | MalformedHandoff | None:
    file = worktree.handoff_file
    try:
        with untrusted_files.open_folder(file.parent):
            pass
    except FileNotFoundError:
        return None
    except OSError:  # a link, or no folder
        return MalformedHandoff(f"the folder of ${HANDOFF_VARIABLE} was replaced", "leave it as it is")
    try:
        data = untrusted_files.read_file(file.parent, file.name, MAX_HANDOFF_BYTES, sole=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        return _unread(error)
    try:
        value = strict_json.parse(data)
    except ValueError as error:
        return MalformedHandoff(f"${HANDOFF_VARIABLE} can't be taken, {error}", _OBJECT)
    if not isinstance(value, dict):
        return MalformedHandoff(f"${HANDOFF_VARIABLE} holds no object", _OBJECT)
    return HandoffData(value)


def _unread(error: OSError) -> MalformedHandoff:
    if error.errno in {EINVAL, ELOOP, EMLINK}:
        return _NO_FILE
    if error.errno == EFBIG:
        remedy = "hand over what the next phase needs, and name files for the rest"
        return MalformedHandoff(f"${HANDOFF_VARIABLE} has more than {MAX_HANDOFF_BYTES} bytes", remedy)
    return MalformedHandoff(f"${HANDOFF_VARIABLE} can't be read ({error.strerror})")
