"""A coding CLI that executes the steps of its prompt: a real program for tests and demonstrations.

    python3 fake_cli.py PROMPT_FILE

Standard library alone. Each line of the prompt is a step; other lines are ignored. Prefixes of a step are conditions:
`attempt N` runs it in that attempt only, `once` only the first time in any attempt (needs `FAKE_CLI_LEDGER`),
`without PATH` only while that file does not exist, `in PHASE` only in that phase of the task's workflow.

    write PATH TEXT…     replace a file          commit MESSAGE…   commit everything with git
    append PATH TEXT…    add a line to a file     git ARGS…         run git
    delete PATH          remove a file            print TEXT…       print a text
    discard PATH         remove a file if it exists
    exit CODE TEXT…      print a text and exit    flood BYTES       print that many bytes
    hang                 never end                stubborn          ignore SIGTERM and SIGINT from now on
    await PATH           wait until the file exists
    hold PATH            lock this file until the process ends; if it is locked, report that in PATH.broken
    keep-prompt          print the whole prompt       tick TIMES SECONDS   print and wait repeatedly
    daemon PATH          start a process in another session without an environment, which ignores
                         SIGTERM and appends to PATH forever
    print-env NAME       print a variable         write-env PATH NAME    write it to a file
    wipe PATH            remove a file, or a folder with its contents
    intrude PATH TEXT…   try to write a file, and continue if that is denied
    hand-over JSON       write the handoff file of the session     answer JSON    end the answer with a handoff
    tell JSON            submit a handoff by the session command, and print its violations
    built PATH…          submit a build of these files      share KEY JSON    share a value with other sessions
    pause SECONDS        wait
    plant PATH           put hooks and configuration that would write PATH into the session's git directory

With `FAKE_CLI_LEDGER` set, every start first appends `run task attempt` to that file.
"""

# ruff: noqa: C901, T201 - a stand-alone program with scripted misbehaviour

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
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


def _plant(trace: str) -> None:
    git = Path(Path(".git").read_text().removeprefix("gitdir: ").rstrip("\n"))
    script = f'#!/bin/sh\necho "$0" >> {shlex.quote(trace)}\n'
    names = "pre-commit post-commit post-checkout post-merge reference-transaction pre-push pre-receive update"
    for name in names.split():
        hook = git / "hooks" / name
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(script)
        hook.chmod(0o755)
    program = git / "hooks" / "pre-commit"
    with (git / "config").open("a") as config:
        config.write(f"[core]\n\tfsmonitor = {program}\n\thooksPath = {git / 'hooks'}\n")
        config.write(f'[filter "planted"]\n\tclean = {program}\n\tsmudge = {program}\n')
    (git / "info").mkdir(exist_ok=True)
    (git / "info" / "attributes").write_text("* filter=planted\n")


def _intrude(path: str, text: str) -> None:
    try:
        Path(path).write_text(text + "\n")
    except OSError as error:
        print(error, flush=True)


def _hold(path: str) -> None:
    held = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)  # open until the process ends
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with Path(f"{path}.broken").open("a") as broken:
            broken.write(f"{os.environ['COUNCIL_TASK']} {os.environ['COUNCIL_ATTEMPT']}\n")


def _wipe(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


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
        case ["discard", path]:
            Path(path).unlink(missing_ok=True)
        case ["exit", code, *said]:
            if said:
                print(rest.partition(" ")[2], flush=True)
            sys.exit(int(code))
        case ["print-env", name]:
            print(os.environ[name], flush=True)
        case ["write-env", path, name]:
            Path(path).write_text(os.environ[name] + "\n")
        case ["wipe", path]:
            _wipe(Path(path))
        case ["intrude", path, *_]:
            _intrude(path, rest.partition(" ")[2])
        case ["hand-over", *_]:
            Path(os.environ["COUNCIL_HANDOFF"]).write_text(rest)
        case ["answer", *_]:
            print(f"Here it is.\n```json\n{rest}\n```", flush=True)
        case ["tell", *_]:
            subprocess.run(["council", "submit-handoff"], input=rest, text=True, check=False, stderr=subprocess.STDOUT)
        case ["share", key, *_]:
            subprocess.run(["council", "share", "put", key, rest.partition(" ")[2]], check=True)
        case ["built", *paths]:
            sums = [{"path": path, "checksum": hashlib.sha256(Path(path).read_bytes()).hexdigest()} for path in paths]
            Path(os.environ["COUNCIL_HANDOFF"]).write_text(json.dumps({"artifacts": sums, "summary": "built"}))
        case ["plant", path]:
            _plant(path)
        case ["hold", path]:
            _hold(path)
        case ["keep-prompt"]:
            print(Path(sys.argv[1]).read_text(), flush=True)
        case ["tick", times, seconds]:
            for _ in range(int(times)):
                print("tick", flush=True)
                time.sleep(float(seconds))
        case ["pause", seconds]:
            time.sleep(float(seconds))
        case ["await", path]:
            while not Path(path).exists():
                time.sleep(0.02)
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
    """Execute the prompt."""
    attempt = os.environ.get("COUNCIL_ATTEMPT", "1")
    if ledger := os.environ.get("FAKE_CLI_LEDGER"):
        with Path(ledger).open("a") as file:
            file.write(f"{os.environ['COUNCIL_RUN']} {os.environ['COUNCIL_TASK']} {attempt}\n")
    for number, line in enumerate(Path(sys.argv[1]).read_text().splitlines()):
        step = _due(line, number, attempt)
        try:
            words = shlex.split(step)
        except ValueError:
            continue
        _step(words, step.partition(" ")[2])


def _due(line: str, number: int, attempt: str) -> str:
    """Return a line's step without its conditions; empty if it is not due."""
    match line.split(maxsplit=2):
        case ["attempt", wanted, step]:
            return _due(step, number, attempt) if wanted == attempt else ""
        case ["in", phase, step]:
            return _due(step, number, attempt) if phase == os.environ.get("COUNCIL_PHASE") else ""
        case ["without", path, step]:
            return "" if Path(path).exists() else _due(step, number, attempt)
        case ["once", *_]:
            return _due(line.split(maxsplit=1)[1], number, attempt) if _is_first(number) else ""
    return line


def _is_first(number: int) -> bool:
    try:
        Path(f"{os.environ['FAKE_CLI_LEDGER']}.{os.environ['COUNCIL_TASK']}.{number}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    main()
