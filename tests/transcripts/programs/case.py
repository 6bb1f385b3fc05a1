"""Programs and cases, and the cases common to all programs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from orchestrator.protocols import AdapterType

#: Placeholder of the server's URL.
MODEL: Final = "http://model"


@dataclass(frozen=True, slots=True)
class Case:
    """One run: the script in the prompt, additional options and variables, other request fields, and a signal.

    The signal is sent to the process group after the first model request, or once the program has `said` something or
    `made` a file. `is_dead`: the model's port has no listener. `after` is the script of an earlier run, whose
    conversation this one resumes `pause` seconds later.
    """

    prompt: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    signal: signal.Signals | None = None
    said: str | None = None
    made: str | None = None
    is_dead: bool = False
    after: str | None = None
    pause: float = 0.0
    asked: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Program:
    """A program: its adapter, the common options of all cases, and its variables.

    `http://model` in the options is replaced by the server's URL; the variables are computed from that URL and a home.
    `version` is the name and version command of a program whose adapter has none.
    """

    adapter: AdapterType
    options: Mapping[str, Any]
    environ: Callable[[str, Path], Mapping[str, str]]
    cases: Mapping[str, Case]
    version: tuple[str, ...] = ()


#: The cases of every program; each adds and replaces some.
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

#: More cases for programs that can resume a conversation and have a read-only mode.
ASKED: Final[Mapping[str, Case]] = {
    "resumed": Case("write b.txt two\nsay Both are there.\nusage 20 4", after="write a.txt one\nusage 120 34"),
    "read-only": Case("write hello.txt hi\nsay It is looked at.", asked={"read_only": True}),
}
