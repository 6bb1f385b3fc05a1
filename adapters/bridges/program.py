"""Run a program that takes text on standard input or reports its result in a file.

    program.py [--stdin FILE] [--result FILE] [--keys PATH,…] -- PROGRAM [ARGUMENT…]

Its output and exit are those of the program; it exits with 127 if the program does not exist. After the end of the
program, the JSON in the result file is printed as one line, `{"file": …}`, with these parts only: names separated by
dots, where `*` matches all.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final

#: The maximum size of a result file in bytes.
_MAX_BYTES: Final = 64 << 20
#: The exit code if the program does not exist, as in a shell.
NOT_FOUND_EXIT: Final = 127
_Tree = dict[str, Any]
_FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: list[str]) -> int:
    """Run the program; return its exit code, or end by its signal."""
    split = arguments.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--stdin", type=Path)
    parser.add_argument("--result", type=Path)
    parser.add_argument("--keys", type=lambda text: text.split(","))
    given = parser.parse_args(arguments[:split])
    if given.result is not None:
        given.result.parent.mkdir(parents=True, exist_ok=True)
        given.result.unlink(missing_ok=True)  # of an earlier session
    try:
        code = _run(arguments[split + 1 :], given.stdin)
    except FileNotFoundError:
        sys.stderr.write(f"council: {arguments[split + 1]} was not found\n")
        return NOT_FOUND_EXIT
    except OSError as error:
        sys.stderr.write(f"{arguments[split + 1]}: {error.strerror}\n")
        return 126
    if given.result is not None:
        _print_result(given.result, given.keys)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _run(argv: list[str], stdin: Path | None) -> int:
    """Return the exit code; a negative one is a signal."""
    children: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)
        if not children:
            early.append(number)

    for stop in _FORWARDED:
        signal.signal(stop, forward)
    source = None if stdin is None else stdin.open("rb")
    children.append(subprocess.Popen(argv, stdin=source))
    for number in early:
        children[0].send_signal(number)
    return children[0].wait()


def _print_result(file: Path, keys: list[str] | None) -> None:
    value: Any = None
    # Without a file, the line is missing, which fails the session.
    with suppress(OSError, ValueError, RecursionError), file.open("rb") as source:
        value = json.loads(source.read(_MAX_BYTES))
    value = _prune(value, _as_tree(keys or ()))
    if value is not None:
        sys.stdout.write("\n" + json.dumps({"file": value}) + "\n")
        sys.stdout.flush()


def _as_tree(paths: Iterable[str]) -> _Tree:
    """Return nested mappings of the names in paths."""
    tree: _Tree = {}
    for path in paths:
        branch = tree
        for name in path.split("."):
            branch = branch.setdefault(name, {})
    return tree


def _prune(value: Any, tree: Any) -> Any:
    """Return the parts of a value in a tree; all of it if the tree is empty."""
    if not tree:
        return value
    if isinstance(value, list):
        return [_prune(part, tree["*"]) for part in value] if "*" in tree else []
    if isinstance(value, dict):
        return {
            key: _prune(part, tree.get(key, tree.get("*", {}))) for key, part in value.items() if {key, "*"} & {*tree}
        }
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
