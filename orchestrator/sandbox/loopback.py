"""Open a port on a private loopback, pass its socket out, execute the program.

This runs in a bubblewrap with a private network, whose loopback is not reachable from outside. A socket created there
can be passed to the proxy outside, which serves it. So none of our code runs in the sandbox alongside the program, and
the proxy is the only way out.

Each session waits for this: keep imports few and within the standard library.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

_BACKLOG = 128


def main() -> None:
    """Open the port and execute the command given by the arguments.

    The arguments are: path of the proxy's socket, port, descriptor, variables to unset, command. If the command can't
    be started, writes an errno and a message to the descriptor.
    """
    socket_path, port, error_fd, unset = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    command = sys.argv[5:]
    os.closerange(3, error_fd)  # the descriptors for bubblewrap
    os.set_inheritable(error_fd, False)
    step = "the sandbox could not be created"
    try:
        send_listener(socket_path, port)
        for name in filter(None, unset.split(",")):
            os.environ.pop(name, None)
        # Python ignores these signals, which the program would inherit.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        step = command[0]
        os.execvp(step, command)  # noqa: S606  (an argv, never a shell)
    except (OSError, ValueError) as error:
        message = f"{getattr(error, 'errno', None) or 0} {step}: {getattr(error, 'strerror', None) or error}"
        os.write(error_fd, message.encode("utf-8", "replace"))
    os._exit(127)


def send_listener(socket_path: str, port: int) -> None:
    """Listen on the port, and send the listening socket to the proxy at `socket_path`."""
    folder, name = os.path.split(socket_path)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with (
            socket.create_server(("127.0.0.1", port), backlog=_BACKLOG) as listening,
            socket.socket(socket.AF_UNIX) as proxy,
        ):
            proxy.connect(f"/proc/self/fd/{descriptor}/{name}")  # short enough for a unix socket address
            socket.send_fds(proxy, [b"+"], [listening.fileno()])
    finally:
        os.close(descriptor)
