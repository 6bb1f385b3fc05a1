"""What a program and its cases are, and the cases that every program is put through."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from orchestrator.protocols import AdapterType

#: Stands for the server's URL.
MODEL: Final = "http://model"


@dataclass(frozen=True, slots=True)
class Case:
    """One run: the script in the prompt, options and variables beside the program's own, what else is asked for, and a
    signal for its process group once the model has been asked, or once it has `said` something or `made` a file.
    `is_dead`: nothing listens where the model should be. `after` is the script of a run before, in whose conversation
    this one goes on, `pause` seconds later.
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
    """How a program is run: its adapter, the options of all cases, in which `http://model` stands for the server's URL,
    and its variables, given that URL and its own home. `version` is its name and the command that prints its version,
    where the adapter knows none.
    """

    adapter: AdapterType
    options: Mapping[str, Any]
    environ: Callable[[str, Path], Mapping[str, str]]
    cases: Mapping[str, Case]
    version: tuple[str, ...] = ()


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

#: What those are put through, too, that can go on with a conversation, and look without changing anything.
ASKED: Final[Mapping[str, Case]] = {
    "resumed": Case("write b.txt two\nsay Both are there.\nusage 20 4", after="write a.txt one\nusage 120 34"),
    "read-only": Case("write hello.txt hi\nsay It is looked at.", asked={"read_only": True}),
}
