"""A coding CLI that does exactly what its prompt says: a real program for tests and demonstrations.

    python3 fake_cli.py PROMPT_FILE

Standard library alone. Each line of the prompt is a step; lines that are none are ignored, as a person's words
would be. `attempt N` before a step makes it happen in that attempt only.

    write PATH TEXT…     replace a file          commit MESSAGE…   commit everything, with git
    append PATH TEXT…    add a line to a file     git ARGS…         run git
    delete PATH          remove a file            print TEXT…       say something
    exit CODE            end at once              flood BYTES       print that many bytes
    hang                 never end                stubborn          ignore SIGTERM and SIGINT from here on
    daemon PATH          leave a process behind that has a session of its own and no environment, ignores
                         SIGTERM, and appends to PATH for ever

With `FAKE_CLI_LEDGER` set, every start appends `run task attempt` to that file first.
"""
# ruff: noqa: C901, PLR0912, S606, S607, T201 - a stand-alone program that behaves as badly as it is told to

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path


def _daemon(path: str) -> None:
    target = Path(path).absolute()
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    code = "import sys, time\nwhile True:\n  open(sys.argv[1], 'a').write('x')\n  time.sleep(0.005)"
    os.execve(sys.executable, [sys.executable, "-S", "-c", code, str(target)], {})


def _step(words: list[str], rest: str) -> None:
    match words:
        case ["write", path, *_]:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(rest.partition(" ")[2] + "\n")
        case ["append", path, *_]:
            with Path(path).open("a") as file:
                file.write(rest.partition(" ")[2] + "\n")
        case ["delete", path]:
            Path(path).unlink()
        case ["exit", code]:
            sys.exit(int(code))
        case ["hang"]:
            while True:
                time.sleep(3600)
        case ["stubborn"]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        case ["daemon", path]:
            _daemon(path)
        case ["commit", *_]:
            subprocess.run(["git", "add", "--all"], check=True)
            subprocess.run(["git", "commit", "--quiet", "--message", rest], check=True)
        case ["git", *arguments]:
            subprocess.run(["git", *arguments], check=True)
        case ["print", *_]:
            print(rest, flush=True)
        case ["flood", count]:
            block = b"." * 65536
            for _ in range(int(count) // len(block)):
                sys.stdout.buffer.write(block)


def main() -> None:
    """Follow the prompt."""
    attempt = os.environ.get("COUNCIL_ATTEMPT", "1")
    if ledger := os.environ.get("FAKE_CLI_LEDGER"):
        with Path(ledger).open("a") as file:
            file.write(f"{os.environ['COUNCIL_RUN']} {os.environ['COUNCIL_TASK']} {attempt}\n")
    for line in Path(sys.argv[1]).read_text().splitlines():
        words = line.split(maxsplit=2)
        if words[:1] == ["attempt"] and len(words) == 3:
            if words[1] != attempt:
                continue
            line = words[2]  # noqa: PLW2901  the step that the condition was for
        try:
            parts = shlex.split(line)
        except ValueError:
            continue
        _step(parts, line.partition(" ")[2])


if __name__ == "__main__":
    main()
