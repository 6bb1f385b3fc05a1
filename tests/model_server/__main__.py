"""Serve until stdin ends: `python -m tests.model_server [--port N]` prints the URL."""

from __future__ import annotations

import argparse
import sys

from tests.model_server.server import ModelServer


def main() -> None:
    """Print the URL and serve."""
    parser = argparse.ArgumentParser(prog="python -m tests.model_server")
    parser.add_argument("--port", type=int, default=0, help="a port of 127.0.0.1; any free one without")
    with ModelServer(parser.parse_args().port) as server:
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
