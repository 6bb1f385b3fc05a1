"""Find a folder's log, and check that it is trusted.

A repository may contain a malicious one.

    <folder>/identity          the log's identity: 32 random hexadecimal digits
    <folder>/<identity>/       the log itself (`state.log.segments`)
    <home>/known_stores        a line per log that was created on this machine or adopted by the user

The home is outside all repositories. A file from a checkout or an archive can't become part of a log, because its
author does not know the identity. All functions block.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Final

from orchestrator.config.store import require_local_folder
from orchestrator.errors import RefusedError, to_unusable_error
from orchestrator.system.files import atomic_write, make_folder, open_private, sync_folder

IDENTITY_FILE: Final = "identity"
_IDENTITY: Final = re.compile(rb"([0-9a-f]{32})\n?")
_KNOWN: Final = "known_stores"
#: The maximum lines of that file (every other one is empty) used for sandboxes: each hidden folder slows down a
# session's start.
_MOST_HIDDEN: Final = 200


def find_log(folder: Path) -> Path | None:
    """Return the log's folder in a store's folder, or None.

    Raises RefusedError if it is damaged.
    """
    path = folder / IDENTITY_FILE
    try:
        found = _IDENTITY.fullmatch(path.read_bytes()[:64])
    except OSError as error:
        if not os.path.lexists(path):
            return None
        raise to_unusable_error(error, f"{path} can't be read", "make it a readable file") from None
    if found is None:
        remedy = f"write the name of the log's folder (see `ls {folder}`) to it"
        raise RefusedError(f"{path} does not contain a log identity", remedy)
    return folder / found[1].decode()


def require_log(folder: Path) -> Path:
    """Return the log's folder like `find_log`. Raises RefusedError if there is none."""
    if (log := find_log(folder)) is None:
        raise RefusedError(f"there is no state in {folder}", "use the folder of a store, such as .council/state")
    return log


def ensure_log(folder: Path, home: Path | None = None) -> Path:
    """Return the log's folder like `find_log`; create one for a new store.

    The home records the identity of a new store. Raises RefusedError if the log of an existing identity is missing.
    """
    if (log := find_log(folder) or _recover_identity(folder, home)) is None:
        name = token_hex(16)
        if home is not None:
            _record(home, name, str(folder))
        make_folder(folder)
        make_folder(folder / name)
        _write_identity(folder, name)
        log = find_log(folder)
        assert log is not None, "it was just written"  # noqa: S101  (for the type checker)
        if log.name != name:  # another process was faster
            (folder / name).rmdir()
    if log.is_symlink() or not log.is_dir():
        remedy = f"restore it from a backup, or remove {folder / IDENTITY_FILE} to start with an empty state"
        raise RefusedError(f"the state log in {folder} is missing: there is no {log.name}", remedy)
    return log


def _recover_identity(folder: Path, home: Path | None) -> Path | None:
    """Restore a folder's identity file if the home lists its log; return the log."""
    known = set() if home is None else _known(home)
    try:
        found = [path for path in folder.iterdir() if path.name.encode() in known and path.is_dir()]
    except OSError:
        return None
    if len(found) != 1:
        return None
    _write_identity(folder, found[0].name)
    return find_log(folder)


def _write_identity(folder: Path, name: str) -> None:
    """Set a folder's identity unless another process has set one."""
    with suppress(FileExistsError):
        atomic_write(folder / IDENTITY_FILE, f"{name}\n", durable=True, replace=False)


def check_trusted(url: str, home: Path, *, is_named: bool = True) -> None:
    """Raise RefusedError for a store neither created on this machine nor adopted.

    A folder without a store gets an identity. If only a file refers to the store, not the user or a run, its URL must
    be known.
    """
    folder = require_local_folder(url)
    if folder is None and is_named:
        return
    try:
        known = _known(home)
        if not is_named and _url_name(url).encode() not in known:
            raise _unknown(f"the store that {url.partition(':')[0]}: names", home)
        if folder is not None and ensure_log(folder, home).name.encode() not in _known(home):
            raise _unknown(f"the state in {folder}", home)
    except OSError as error:
        remedy = "set COUNCIL_HOME to a folder that you own on this machine"
        raise to_unusable_error(error, f"{error.filename or home} can't be used", remedy) from None


def find_trust_error(folder: Path, home: Path) -> RefusedError | None:
    """Return why a folder's log is not trusted; None if it is. Changes nothing."""
    try:
        log = find_log(folder)
        is_known = log is None or log.name.encode() in _known(home)
    except RefusedError as error:
        return error
    except OSError:  # an unreadable home is reported by other code
        return None
    return None if is_known else _unknown(f"the state in {folder}", home)


def _unknown(what: str, home: Path) -> RefusedError:
    return RefusedError(
        f"{what} is not listed in {home}: it was created on another machine or with another COUNCIL_HOME, "
        "and the commands of its runs would be executed",
        "run `council state adopt` if you trust its origin; otherwise move it away",
    )


def adopt_store(url: str, home: Path) -> None:
    """Record that the user trusts a store created elsewhere.

    Raises RefusedError if there is none.
    """
    if (folder := require_local_folder(url)) is not None:
        _record(home, require_log(folder).name, str(folder))
    record_store_use(url, home)


def record_store_use(url: str, home: Path) -> None:
    """Record that a run uses the store at a URL, so that files may refer to it."""
    _record(home, _url_name(url), "")


def known_store_folders(home: Path) -> list[Path]:
    """Return the store folders most recently created or adopted here. Blocks."""
    try:
        lines = (home / _KNOWN).read_text(errors="replace").splitlines()[-_MOST_HIDDEN:]
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(Path(json.loads(line.partition(" ")[2])))
    return [path for path in dict.fromkeys(found) if path.is_absolute() and path.is_dir()]


def _url_name(url: str) -> str:
    # A URL may contain a password.
    return f"url-{hashlib.sha256(url.encode(errors='surrogateescape')).hexdigest()[:32]}"


def _known(home: Path) -> set[bytes]:
    try:
        lines = (home / _KNOWN).read_bytes().split(b"\n")
    except FileNotFoundError:
        return set()
    return {line.partition(b" ")[0] for line in lines}


def _record(home: Path, name: str, folder: str) -> None:
    """Add a line; its folder is for users and sandboxes."""
    if name.encode() in _known(home):
        return
    make_folder(home)
    with open(home / _KNOWN, "ab", opener=open_private) as file:
        # The leading newline terminates a line that a crash left unfinished.
        file.write(f"\n{name} {json.dumps(folder)}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(home)
