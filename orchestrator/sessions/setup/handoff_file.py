"""What a session leaves for whoever goes on: the file that `$COUNCIL_HANDOFF` names, read once the session is over.

An agent wrote it, or whatever it likes: no link is followed, only a file is read, and no more of it than fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import EFBIG, EINVAL, ELOOP, EMLINK

import anyio.to_thread

from orchestrator.client import strict_json
from orchestrator.client.commands import LARGEST_HANDOFF
from orchestrator.protocols import JsonObject
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.system import untrusted_files

#: Names the file to a session.
VARIABLE = "COUNCIL_HANDOFF"

_OBJECT = "write one JSON object there"


@dataclass(frozen=True, slots=True)
class Delivered:
    """A session wrote a JSON object, which may hold secrets; whether it is what was wanted is for others to say."""

    data: JsonObject


@dataclass(frozen=True, slots=True)
class Malformed:
    """A session wrote what can't be read as a JSON object: why, and what the agent is to do."""

    why: str
    remedy: str = "write a plain file there"


_NO_FILE = Malformed(f"${VARIABLE} is a link or no file")


async def read_handed_over(worktree: Worktree) -> Delivered | Malformed | None:
    """Return what a session wrote that is over; None where it wrote nothing."""
    return await anyio.to_thread.run_sync(_read, worktree)


def _read(worktree: Worktree) -> Delivered | Malformed | None:
    file = worktree.handoff_file
    try:
        with untrusted_files.open_folder(file.parent):
            pass
    except FileNotFoundError:
        return None
    except OSError:  # a link, or no folder
        return Malformed(f"the folder of ${VARIABLE} was replaced", "leave it as it is")
    try:
        data = untrusted_files.read_file(file.parent, file.name, LARGEST_HANDOFF, sole=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        return _unread(error)
    try:
        value = strict_json.parse(data)
    except ValueError as error:
        return Malformed(f"${VARIABLE} can't be taken, {error}", _OBJECT)
    if not isinstance(value, dict):
        return Malformed(f"${VARIABLE} holds no object", _OBJECT)
    return Delivered(value)


def _unread(error: OSError) -> Malformed:
    if error.errno in {EINVAL, ELOOP, EMLINK}:
        return _NO_FILE
    if error.errno == EFBIG:
        remedy = "hand over what the next phase needs, and name files for the rest"
        return Malformed(f"${VARIABLE} has more than {LARGEST_HANDOFF} bytes", remedy)
    return Malformed(f"${VARIABLE} can't be read ({error.strerror})")
