"""Record what real programs print: `python -m tests.transcripts.record PROGRAM FOLDER [CASE…]`.

PROGRAM is a name of `PROGRAMS`; FOLDER holds the installed programs (`bin` or `node_modules/.bin`). Each case is run as
its adapter says, against the scripted model server, in a scratch repository and an environment made from nothing.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from adapters.codex import CodexAdapter
from adapters.gemini import GeminiAdapter
from orchestrator.protocols import AdapterType, SessionRequest
from orchestrator.testing.model_server import ModelServer
from orchestrator.testing.recordings import Recording
from tests.waiting import wait_for

HERE: Final = Path(__file__).parent
_MODEL: Final = "http://model"
_LONGEST: Final = 150.0  # seconds


@dataclass(frozen=True, slots=True)
class Case:
    """One run: the script in the prompt, options and variables beside the program's own, and a signal for its process
    group once the model has been asked, or once it has `said` something. `is_dead`: nothing listens where the model
    should be.
    """

    prompt: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    signal: signal.Signals | None = None
    said: str | None = None
    is_dead: bool = False


@dataclass(frozen=True, slots=True)
class Program:
    """How a program is run: its adapter, the options of all cases, in which `http://model` stands for the server's URL,
    and its variables, given that URL and its own home.
    """

    adapter: AdapterType
    options: Mapping[str, Any]
    environ: Callable[[str, Path], Mapping[str, str]]
    cases: Mapping[str, Case]


def _codex_environ(_url: str, home: Path) -> Mapping[str, str]:
    """Its home may not be where temporary files are."""
    (home.parent / "tmp").mkdir()
    return {"OPENAI_API_KEY": "no-key", "TMPDIR": str(home.parent / "tmp")}


#: What every program is put through; each adds and replaces what is its own.
CASES: Final[Mapping[str, Case]] = {
    "edit": Case("write hello.txt hi\nsay It is written.\nusage 120 34"),
    "tool": Case("run echo from-the-shell\nwrite out/b.txt two\nsay Both done."),
    "limited": Case("fail 429\nwrite hello.txt hi"),
    "limited-then-well": Case("fail 429 1 1\nwrite hello.txt hi"),
    "no-login": Case("fail 401\nwrite hello.txt hi"),
    "server-error": Case("fail 500\nwrite hello.txt hi"),
    "dead-server": Case("write hello.txt hi", is_dead=True),
    "broken-stream": Case("drop\nwrite hello.txt hi"),
    "interrupted": Case("delay 60\nwrite hello.txt hi", signal=signal.SIGINT),
    "terminated": Case("delay 60\nwrite hello.txt hi", signal=signal.SIGTERM),
}


def _gemini(url: str, home: Path) -> Mapping[str, str]:
    """Settings take variables. Of its ten attempts, which take minutes, two are left; its reports stay at home."""
    settings = {
        "security": {"auth": {"selectedType": "${AUTH_TYPE}"}},
        "privacy": {"usageStatisticsEnabled": False},
        "general": {"maxAttempts": 2},
        "model": {"maxSessionTurns": "${MAX_TURNS}"},
    }
    (home / ".gemini").mkdir(exist_ok=True)
    (home / ".gemini/settings.json").write_text(json.dumps(settings))
    own = {"AUTH_TYPE": "gemini-api-key", "MAX_TURNS": "-1", "TMPDIR": str(home)}
    return {"GOOGLE_GEMINI_BASE_URL": url, "GEMINI_API_KEY": "a-key-for-nothing", **own}


PROGRAMS: Final[Mapping[str, Program]] = {
    "gemini": Program(
        GeminiAdapter,
        {"model": "gemini-2.5-pro", "approval_mode": "yolo"},
        _gemini,
        {
            **CASES,
            "refused": Case("write ../beside.txt hi"),
            "no-shell": Case("write hello.txt hi\nrun echo from-the-shell", {"approval_mode": "auto_edit"}),
            "limited-for-long": Case("fail 429 9 4000\nwrite hello.txt hi"),
            "overloaded": Case("fail 503\nwrite hello.txt hi"),
            "wrong-request": Case("fail 400\nwrite hello.txt hi"),
            "no-such-model": Case("fail 404\nwrite hello.txt hi"),
            "turns": Case("write a.txt a\nwrite b.txt b", environ={"MAX_TURNS": "1"}),
            "no-key": Case("write hello.txt hi", environ={"GEMINI_API_KEY": ""}),
            "gateway": Case("write hello.txt hi", environ={"AUTH_TYPE": ""}),
            "untrusted": Case("write hello.txt hi", environ={"GEMINI_CLI_TRUST_WORKSPACE": "false"}),
        },
    ),
    "codex": Program(
        adapter=CodexAdapter,
        options={
            "model": "gpt-5.5",  # its newer ones have no tools but a program of JavaScript
            "provider": "model",
            "args": [
                *("--disable", "plugins"),  # a list of them is fetched from GitHub
                *("-c", 'model_providers.model.name="model"'),
                *("-c", 'model_providers.model.base_url="http://model/v1"'),
                *("-c", 'model_providers.model.env_key="OPENAI_API_KEY"'),
            ],
        },
        environ=_codex_environ,
        cases={
            **CASES,
            "dead-server": Case("write hello.txt hi", signal=signal.SIGTERM, said="waiting for network", is_dead=True),
            "refused": Case("write hello.txt hi\nrun echo hi > hello.txt", options={"sandbox": "read-only"}),
            "invalid": Case("fail 400\nwrite hello.txt hi"),
            "overloaded": Case("fail 503\nwrite hello.txt hi"),
            "no-key": Case("write hello.txt hi", environ={"OPENAI_API_KEY": ""}),
            "unwritable": Case("write hello.txt hi", environ={"CODEX_HOME": "/sys"}),
        },
    ),
}


def record(program: Program, case: Case, folder: str) -> Recording:
    """Run one case of a program that is installed in a folder, and return what came of it."""
    path = os.pathsep.join([f"{folder}/bin", f"{folder}/node_modules/.bin", os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as scratch, ModelServer() as server:
        place = Path(scratch)
        worktree, home, prompt = place / "worktree", place / "home", place / "prompt"
        home.mkdir()
        environ = {"PATH": path, "HOME": str(home), "LC_ALL": "C.UTF-8", "GIT_CONFIG_NOSYSTEM": "1"}
        subprocess.run(["git", "init", "--quiet", str(worktree)], check=True, env=environ)
        prompt.write_text(case.prompt + "\n")
        url = "http://127.0.0.1:9" if case.is_dead else server.url
        options = json.loads(json.dumps({**program.options, **case.options}).replace(_MODEL, url))
        adapter = program.adapter(program.adapter.Options.model_validate(options))
        request = SessionRequest("run", "task", 1, case.prompt, prompt, worktree)
        command = adapter.command(request)
        given = {**environ, **command.env, **program.environ(url, home), **case.environ}
        with (place / "out").open("wb") as out, (place / "err").open("wb") as err:
            child = subprocess.Popen(
                command.argv,
                cwd=worktree,
                env=given,
                stdin=(command.stdin or Path(os.devnull)).open("rb"),
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            try:
                if case.signal is not None:
                    said = None if case.said is None else case.said.encode()
                    wait_for(partial(_has_come, server, said, place / "out"), _LONGEST)
                    os.killpg(child.pid, case.signal)
                code = child.wait(_LONGEST)
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        asked = adapter.programs()[0]
        version = subprocess.run(
            [asked.name, *asked.version], env=given, cwd=home, capture_output=True, text=True, check=False
        )
        known = {str(worktree): "/work", str(place): "/scratch", url: _MODEL, folder: "/programs"}
        return Recording(
            program=f"{asked.name} {(version.stdout.strip().splitlines() or ['?'])[0]}",
            exit=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            stdout=_sanitized((place / "out").read_text(errors="replace"), known),
            stderr=_sanitized((place / "err").read_text(errors="replace"), known),
        )


def _has_come(server: ModelServer, said: bytes | None, out: Path) -> bool:
    return bool(server.requests) if said is None else said in out.read_bytes()


def _sanitized(text: str, known: Mapping[str, str]) -> list[str]:
    """Return lines without anything of the machine (folders, addresses, host and user), nor frames of JavaScript."""
    for found, put in known.items():
        text = text.replace(found, put)
    text = re.sub(r"127\.0\.0\.1:\d+", "model", text)
    for name in (os.uname().nodename, os.uname().release):
        text = text.replace(name, "machine")
    text = re.sub(r"(local|remote)Port: \d+", r"\1Port: 0", text)
    return [line for line in text.splitlines() if not re.match(r"\s+at .*[:)>\]]", line)]


def main(name: str, folder: str, *cases: str) -> None:
    """Record some cases of a program, or all."""
    program = PROGRAMS[name]
    for case in cases or program.cases:
        record(program, program.cases[case], folder).write(HERE / name / f"{case}.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
