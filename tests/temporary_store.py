"""Run a command with `COUNCIL_STATE` set to a new store on a temporary server: `… STORE -- COMMAND`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Final

from tests import postgres_server, redis_server

#: The context managers that start a server and return the URL of an empty store on it.
STORES: Final[Mapping[str, Callable[[], AbstractContextManager[str]]]] = {
    "postgres": postgres_server.temporary_url,
    "redis": redis_server.temporary_url,
}


def main() -> int:
    """Run the command, and return its exit code."""
    match sys.argv[1:]:
        case [name, "--", *command] if name in STORES and command:
            with STORES[name]() as url:
                return subprocess.run(command, env={**os.environ, "COUNCIL_STATE": url}, check=False).returncode
    sys.exit(f"usage: python -m tests.temporary_store {{{','.join(STORES)}}} -- COMMAND")


if __name__ == "__main__":
    sys.exit(main())
