"""Which session a program is in, and how it asks the orchestrator: one line of JSON there, one back.

A session is found by `COUNCIL_SESSION`, or, because CLIs keep variables from their tools, by the `.git` of the
worktree: its git directory and the mailbox are neighbours.
"""

from __future__ import annotations

import json
import os

# Not `socket`, which takes longer to import than all else here.
from _socket import AF_UNIX, SOCK_STREAM
from _socket import socket as Socket
from time import monotonic, sleep

from orchestrator.client.commands import MAX_REQUEST_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Any

SESSION_VARIABLE = "COUNCIL_SESSION"
SOCKET_NAME, SESSION_FILE = "socket", "session.json"
#: The folder of a session's mailbox, beside its git directory.
SOCKET_FOLDER = "mailbox"

#: Seconds for which an answer is waited for, beside what the request itself says.
ANSWER_TIMEOUT = 30.0
_CONNECT_INTERVAL = 0.05  # seconds between two tries to be let in
_LONGEST_ANSWER = 1 << 26
_LONGEST_NAME = 100  # of a unix socket, in bytes; 104 to 108 by system

NO_SESSION = "this is no worktree of a session that is at work"
NO_SESSION_REMEDY = "the command is for programs that `council run` starts; `council status` shows how a run stands"
_GONE_REMEDY = "go on without it: what you change is checked when it lands"


class SessionRequestError(Exception):
    """What was asked for was not done: what is wrong, and what to do.

    `is_refused` where the orchestrator says so; else it could not be asked.
    """

    def __init__(self, what: str, remedy: str, *, is_refused: bool = False) -> None:
        self.what, self.remedy, self.is_refused = what, remedy, is_refused
        super().__init__(f"{what}: {remedy}" if remedy else what)


class SessionConnection:
    """One that is at work: where its mailbox is, the word by which it is known there, and its worktree."""

    __slots__ = ("folder", "token", "tree")

    def __init__(self, folder: str, token: str, tree: str) -> None:
        self.folder, self.token, self.tree = folder, token, tree

    def within(self, path: str, cwd: str) -> str | None:
        """Return a path, as typed in `cwd`, from the worktree's top with links resolved; None if it is not in there."""
        top = os.path.realpath(self.tree)
        found = os.path.relpath(os.path.realpath(os.path.join(cwd, path)), top)
        return None if found == os.pardir or found.startswith(os.pardir + os.sep) else found

    def ask(self, command: str, arguments: Mapping[str, Any], patience: float = ANSWER_TIMEOUT) -> dict[str, Any]:
        """Ask and return the result; raises AskError. Blocks, at most `patience` seconds from one byte to the next."""
        request = {"token": self.token, "command": command, "arguments": dict(arguments)}
        # As it is: a character escaped would take up to six times its bytes of what a request may have.
        encoded = json.dumps(request, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
        if len(encoded) > MAX_REQUEST_BYTES:
            raise SessionRequestError(
                f"the request has {len(encoded)} bytes, {MAX_REQUEST_BYTES} fit",
                "ask for less at once",
                is_refused=True,
            )
        connected = Socket(AF_UNIX, SOCK_STREAM)
        try:
            connected.settimeout(patience)
            with ShortSocketPath(self.folder) as folder:
                _connect(connected, f"{folder}/{SOCKET_NAME}", monotonic() + patience)
            connected.sendall(encoded)
            line = _line(connected)
        except OSError as error:
            why = error.strerror or str(error)
            raise SessionRequestError(
                f"the orchestrator of this session does not answer ({why})", _GONE_REMEDY
            ) from None
        finally:
            connected.close()
        return _result(line)


def find_session(environ: Mapping[str, str], cwd: str) -> SessionConnection:
    """Return the session that a program in a folder is part of; raises AskError where it is part of none."""
    for folder in (environ.get(SESSION_VARIABLE), _find_socket_folder(cwd)):
        if folder:
            try:
                with open(f"{folder}/{SESSION_FILE}", encoding="utf-8") as file:
                    card = json.load(file)
                return SessionConnection(folder, card["token"], card["tree"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
    raise SessionRequestError(NO_SESSION, NO_SESSION_REMEDY)


def _find_socket_folder(folder: str) -> str | None:
    while True:
        try:
            with open(f"{folder}/.git", encoding="utf-8") as file:
                first = file.readline(8192)
        except (OSError, ValueError):
            above = os.path.dirname(folder)
            if above == folder:
                return None
            folder = above
            continue
        git_dir = first.removeprefix("gitdir: ").rstrip("\n")
        return f"{os.path.dirname(os.path.join(folder, git_dir))}/{SOCKET_FOLDER}"


def _connect(connected: Socket, address: str, deadline: float) -> None:
    while True:
        try:
            return connected.connect(address)
        except BlockingIOError:  # too many wait already, and with a time limit the system does not wait for them
            if monotonic() > deadline:
                raise
            sleep(_CONNECT_INTERVAL)


def _line(connected: Socket) -> bytes:
    parts, size = [], 0
    while size < _LONGEST_ANSWER:
        part = connected.recv(1 << 16)
        parts.append(part)
        size += len(part)
        if not part or part.endswith(b"\n"):
            break
    return b"".join(parts)


def _result(line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
        is_done = answer["ok"]
        if is_done is True:
            result: dict[str, Any] = answer["result"]
            return result
        refused = SessionRequestError(str(answer["error"]), str(answer["remedy"]), is_refused=True)
    except (ValueError, KeyError, TypeError):
        raise SessionRequestError("the orchestrator of this session broke off its answer", _GONE_REMEDY) from None
    raise refused


class ShortSocketPath:
    """A name of a folder that, with a socket's, is short enough for a socket's address; good within the block."""

    def __init__(self, folder: str, name: str = SOCKET_NAME) -> None:
        self._name = name
        self._folder, self._descriptor, self._made = folder, -1, ""

    def __enter__(self) -> str:
        """Return the name."""
        if len(os.fsencode(self._folder)) + len(os.fsencode(self._name)) < _LONGEST_NAME:
            return self._folder
        if os.path.isdir("/proc/self/fd"):
            self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            return f"/proc/self/fd/{self._descriptor}"
        import tempfile

        self._made = tempfile.mkdtemp(prefix="council-", dir="/tmp")
        os.symlink(self._folder, f"{self._made}/s")
        return f"{self._made}/s"

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Take the name away."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        if self._made:
            os.unlink(f"{self._made}/s")
            os.rmdir(self._made)
