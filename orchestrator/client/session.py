"""The connection to a session's socket: one line of JSON per request and answer.

The session is found through `COUNCIL_SESSION`. Some CLIs hide variables from their tools; then it is found through the
`.git` file of the worktree, because the session socket is next to the git directory.
"""

from __future__ import annotations

import json
import os

# `socket` takes longer to import than everything else here.
from _socket import AF_UNIX, SOCK_STREAM
from _socket import socket as Socket  # noqa: N812  a class despite its name
from time import monotonic, sleep

from orchestrator.client.commands import MAX_REQUEST_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Any

SESSION_VARIABLE = "COUNCIL_SESSION"
SOCKET_NAME, SESSION_FILE = "socket", "session.json"
#: The folder of the session socket, next to the session's git directory.
SOCKET_FOLDER = "socket"

#: Seconds to wait for an answer, in addition to the wait in the request.
ANSWER_TIMEOUT = 30.0
_CONNECT_INTERVAL = 0.05  # seconds between two attempts to connect
_MAX_ANSWER_BYTES = 1 << 26
_MAX_ADDRESS_BYTES = 100  # of a unix socket; systems allow 104 to 108

NO_SESSION = "not in the worktree of an active session"
NO_SESSION_REMEDY = (
    "this command is for programs that `council run` starts; for the state of a run use `council status`"
)
_GONE_REMEDY = "continue without it: changes are checked when they land"


class SessionRequestError(Exception):
    """A failed request, with a message and a remedy.

    `is_refused` means that the orchestrator rejected the request; otherwise it could not be reached.
    """

    def __init__(self, message: str, remedy: str, *, is_refused: bool = False) -> None:
        self.message, self.remedy, self.is_refused = message, remedy, is_refused
        super().__init__(f"{message}: {remedy}" if remedy else message)


class SessionConnection:
    """An active session: the folder of its socket, its token and its worktree."""

    __slots__ = ("folder", "token", "tree")

    def __init__(self, folder: str, token: str, tree: str) -> None:
        self.folder, self.token, self.tree = folder, token, tree

    def relative_path(self, path: str, cwd: str) -> str | None:
        """Return a path in `cwd` relative to the worktree, with links resolved.

        Returns None if it is outside.
        """
        top = os.path.realpath(self.tree)
        relative = os.path.relpath(os.path.realpath(os.path.join(cwd, path)), top)  # noqa: PTH118  pathlib takes 10 ms
        return None if relative == os.pardir or relative.startswith(os.pardir + os.sep) else relative

    def ask(self, command: str, arguments: Mapping[str, Any], timeout: float = ANSWER_TIMEOUT) -> dict[str, Any]:
        """Send a request and return its result. Blocks.

        Waits at most `timeout` seconds between two bytes. Raises SessionRequestError.
        """
        connected, result = self.hold(command, arguments, timeout)
        connected.close()
        return result

    def hold(self, command: str, arguments: Mapping[str, Any], timeout: float | None) -> tuple[Socket, dict[str, Any]]:
        """Send a request like `ask`, and return the open connection with the result; None waits without limit."""
        request = {"token": self.token, "command": command, "arguments": dict(arguments)}
        # Unescaped: an escaped character takes up to six times its bytes of the size limit.
        encoded = json.dumps(request, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
        if len(encoded) > MAX_REQUEST_BYTES:
            raise SessionRequestError(
                f"request of {len(encoded)} bytes exceeds the limit of {MAX_REQUEST_BYTES}",
                "send a smaller request",
                is_refused=True,
            )
        connected = Socket(AF_UNIX, SOCK_STREAM)
        try:
            connected.settimeout(ANSWER_TIMEOUT)
            with ShortSocketPath(self.folder) as folder:
                _connect(connected, f"{folder}/{SOCKET_NAME}", monotonic() + ANSWER_TIMEOUT)
            connected.sendall(encoded)
            connected.settimeout(timeout)
            return connected, _parse_result(_read_line(connected))
        except OSError as error:
            connected.close()
            reason = error.strerror or str(error)
            raise SessionRequestError(f"the session's orchestrator does not answer: {reason}", _GONE_REMEDY) from None
        except SessionRequestError:
            connected.close()
            raise


def find_session(environ: Mapping[str, str], cwd: str) -> SessionConnection:
    """Return the session of a program that runs in `cwd`.

    Raises SessionRequestError if it has none.
    """
    for folder in (environ.get(SESSION_VARIABLE), _find_socket_folder(cwd)):
        if folder:
            try:
                with open(f"{folder}/{SESSION_FILE}", encoding="utf-8") as file:  # noqa: PTH123  pathlib takes 10 ms
                    card = json.load(file)
                return SessionConnection(folder, card["token"], card["tree"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
    raise SessionRequestError(NO_SESSION, NO_SESSION_REMEDY)


def _find_socket_folder(folder: str) -> str | None:
    while True:
        try:
            with open(f"{folder}/.git", encoding="utf-8") as file:  # noqa: PTH123
                first = file.readline(8192)
        except (OSError, ValueError):
            above = os.path.dirname(folder)  # noqa: PTH120
            if above == folder:
                return None
            folder = above
            continue
        git_dir = first.removeprefix("gitdir: ").rstrip("\n")
        return f"{os.path.dirname(os.path.join(folder, git_dir))}/{SOCKET_FOLDER}"  # noqa: PTH118, PTH120


def _connect(connected: Socket, address: str, deadline: float) -> None:
    while True:
        try:
            return connected.connect(address)
        except BlockingIOError:  # the backlog is full; a socket with a timeout does not wait for space
            if monotonic() > deadline:
                raise
            sleep(_CONNECT_INTERVAL)


def _read_line(connected: Socket) -> bytes:
    parts, size = [], 0
    while size < _MAX_ANSWER_BYTES:
        part = connected.recv(1 << 16)
        parts.append(part)
        size += len(part)
        if not part or part.endswith(b"\n"):
            break
    return b"".join(parts)


def _parse_result(line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
        is_done = answer["ok"]
        if is_done is True:
            result: dict[str, Any] = answer["result"]
            return result
        refused = SessionRequestError(str(answer["error"]), str(answer["remedy"]), is_refused=True)
    except (ValueError, KeyError, TypeError):
        raise SessionRequestError("the session's orchestrator sent an incomplete answer", _GONE_REMEDY) from None
    raise refused


class ShortSocketPath:
    """A path to a folder that fits a socket address; valid during the block.

    Sockets have short address limits; the path leaves room for the socket's name.
    """

    def __init__(self, folder: str, name: str = SOCKET_NAME) -> None:
        self._name = name
        self._folder, self._descriptor, self._made = folder, -1, ""

    def __enter__(self) -> str:
        """Return the path."""
        if len(os.fsencode(self._folder)) + len(os.fsencode(self._name)) < _MAX_ADDRESS_BYTES:
            return self._folder
        if os.path.isdir("/proc/self/fd"):  # noqa: PTH112
            self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            return f"/proc/self/fd/{self._descriptor}"
        import tempfile  # noqa: PLC0415  seldom needed, and slow

        self._made = tempfile.mkdtemp(prefix="council-", dir="/tmp")
        os.symlink(self._folder, f"{self._made}/s")  # noqa: PTH211
        return f"{self._made}/s"

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Remove the path."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        if self._made:
            os.unlink(f"{self._made}/s")  # noqa: PTH108
            os.rmdir(self._made)  # noqa: PTH106
