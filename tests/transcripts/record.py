"""Record the output of real programs: `python -m tests.transcripts.record PROGRAM FOLDER [CASE…]`.

PROGRAM is a name of `PROGRAMS`; FOLDER has the installed programs (`bin` or `node_modules/.bin`). Each case runs by its
adapter against the scripted model server, in a scratch repository and an empty environment.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import anyio

from orchestrator.protocols import Adapter, ConversationStarted, SessionCommand, SessionRequest
from orchestrator.sessions.setup.adapter_homes import set_up
from orchestrator.testing.recordings import Recording
from tests.model_server import ModelServer
from tests.transcripts.programs import PROGRAMS
from tests.transcripts.programs.case import MODEL, Case, Program
from tests.waiting import wait_for

HERE: Final = Path(__file__).parent
_PROJECT: Final = HERE.parents[1]
_LONGEST: Final = 150.0  # seconds


def record(program: Program, case: Case, folder: str) -> Recording:
    """Run one case of a program installed in a folder, and return the recording."""
    path = os.pathsep.join([f"{folder}/bin", f"{folder}/node_modules/.bin", os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as scratch, ModelServer() as server:
        place = Path(scratch)
        worktree, home, prompt = place / "worktree", place / "home", place / "prompt"
        home.mkdir()
        environ = {"PATH": path, "HOME": str(home), "LC_ALL": "C.UTF-8", "GIT_CONFIG_NOSYSTEM": "1"}
        subprocess.run(["git", "init", "--quiet", str(worktree)], check=True, env=environ)
        url = "http://127.0.0.1:9" if case.is_dead else server.url
        options = json.loads(json.dumps({**program.options, **case.options}).replace(MODEL, url))
        adapter = program.adapter(program.adapter.Options.model_validate(options))
        more = {**program.environ(url, home), **case.environ}
        request = SessionRequest("run", "task", 1, case.prompt, prompt, worktree, place / "kept", **case.asked)
        if case.after is not None:
            begun = _begin(adapter, replace(request, prompt=case.after), environ, more)
            time.sleep(case.pause)
            request = replace(request, resume=begun, attempt=2)
        command, given = _prepared(adapter, request, environ, more)
        stdin = (command.stdin or Path(os.devnull)).open("rb")
        with stdin, (place / "out").open("wb") as out, (place / "err").open("wb") as err:
            child = subprocess.Popen(
                command.argv,
                cwd=worktree,
                env=given,
                stdin=stdin,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            try:
                if case.signal is not None:
                    wait_for(partial(_has_come, server, case, worktree, place / "out"), _LONGEST)
                    os.killpg(child.pid, case.signal)
                code = child.wait(_LONGEST)
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        first = adapter.programs()[0]
        name, *asked = program.version or (first.name, first.name, *first.version)
        version = subprocess.run(asked, env=environ, cwd=home, capture_output=True, text=True, check=True).stdout
        # Claude Code names a folder of its own after the worktree.
        dashed = str(worktree).replace("/", "-")
        known = {str(worktree): "/work", dashed: "-work", str(place): "/scratch", url: MODEL, folder: "/programs"}
        known |= {sys.prefix: "/python", sys.base_prefix: "/python", str(_PROJECT): "/council"}
        return Recording(
            program=f"{name} {version.strip().splitlines()[0]}",
            exit=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            stdout=_sanitized((place / "out").read_text(errors="replace"), known),
            stderr=_sanitized((place / "err").read_text(errors="replace"), known),
        )


def _prepared(
    adapter: Adapter, request: SessionRequest, environ: Mapping[str, str], more: Mapping[str, str]
) -> tuple[SessionCommand, dict[str, str]]:
    """Return the command and its variables, after preparing prompt and home."""
    request.prompt_file.write_text(request.prompt + "\n")
    command = adapter.command(request)
    if command.home is not None:
        anyio.run(set_up, request.home, command.home, environ)
    return command, {**environ, **command.env, **more}


def _begin(adapter: Adapter, request: SessionRequest, environ: Mapping[str, str], more: Mapping[str, str]) -> str:
    """Start a conversation to resume; return its id."""
    command, given = _prepared(adapter, request, environ, more)
    with (command.stdin or Path(os.devnull)).open("rb") as stdin:
        done = subprocess.run(
            command.argv, cwd=request.worktree, env=given, stdin=stdin, capture_output=True, text=True, check=True
        )
    events = (event for line in done.stdout.splitlines() for event in adapter.parse(line))
    return next(event.session for event in events if isinstance(event, ConversationStarted))


def _has_come(server: ModelServer, case: Case, worktree: Path, out: Path) -> bool:
    if case.made is not None:
        return (worktree / case.made).exists()
    if case.said is not None:
        return case.said.encode() in out.read_bytes()
    return any(one.dialect for one in server.requests)


def _sanitized(text: str, known: Mapping[str, str]) -> list[str]:
    """Return lines without data of the machine (folders, addresses, host and user) and JavaScript stack frames."""
    for found, put in known.items():
        text = text.replace(found, put)
    text = re.sub(r"127\.0\.0\.1:\d+", "model", text)
    text = re.sub(r"BaseHTTP/[\d.]+ Python/[\d.]+", "model", text)
    for name in (os.uname().nodename, os.uname().release):
        text = re.sub(rf"\b{re.escape(name)}\b", "machine", text)
    text = re.sub(r"(local|remote)Port: \d+", r"\1Port: 0", text)
    return [line for line in text.splitlines() if not re.match(r"\s+at .*[:)>\]]", line)]


def main(name: str, folder: str, *cases: str) -> None:
    """Record the named cases of a program, or all."""
    program = PROGRAMS[name]
    for case in cases or program.cases:
        record(program, program.cases[case], folder).write(HERE / name / f"{case}.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
