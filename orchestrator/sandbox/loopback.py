"""Open a port of a sandbox's own loopback, pass its socket on to the session's proxy, and become the session's program.

Run inside a bubblewrap that has a network of its own, whose loopback nobody outside can reach: a socket made there is,
wherever it is passed to, a way in. The proxy, which runs outside, accepts connections on it. So nothing of ours runs
in the sandbox beside the program, and no other way leads out.

Only the standard library, and little of it: each session waits for this.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

_WAITING = 128  # connections that are not accepted yet


def main() -> None:
    """Do what the arguments say: the path of the proxy's socket, the port, a descriptor, variables to unset, a command.

    Why the command could not be started is written to the descriptor: an errno, and the text.
    """
    meeting, port, complaint, unset = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    command = sys.argv[5:]
    os.closerange(3, complaint)  # what the sandbox was made with
    os.set_inheritable(complaint, False)
    what = "the sandbox could not be made"
    try:
        send_listener(meeting, port)
        for name in filter(None, unset.split(",")):
            os.environ.pop(name, None)
        # Python ignores these, and a program that is started inherits that.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        what = command[0]
        os.execvp(what, command)
    except (OSError, ValueError) as error:
        why = f"{getattr(error, 'errno', None) or 0} {what}: {getattr(error, 'strerror', None) or error}"
        os.write(complaint, why.encode("utf-8", "replace"))
    os._exit(127)


def send_listener(meeting: str, port: int) -> None:
    """Listen on the port, and send the socket to whoever accepts connections at `meeting`."""
    folder, name = os.path.split(meeting)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with (
            socket.create_server(("127.0.0.1", port), backlog=_WAITING) as listening,
            socket.socket(socket.AF_UNIX) as proxy,
        ):
            proxy.connect(f"/proc/self/fd/{descriptor}/{name}")  # short enough for the address of a socket
            socket.send_fds(proxy, [b"+"], [listening.fileno()])
    finally:
        os.close(descriptor)
