"""Our bridge to an Ollama server (the extra `ollama`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from adapters.ollama import OllamaAdapter
from tests.transcripts.programs.case import ASKED, CASES, MODEL, Case, Program


def _environ(_url: str, _home: Path) -> Mapping[str, str]:
    return {}


def _said(*lines: str) -> str:
    return "\n".join(f"say {line}" for line in lines)


OLLAMA: Final = Program(
    adapter=OllamaAdapter,
    options={"model": "scripted", "host": MODEL},
    environ=_environ,
    version=("ollama-python", sys.executable, "-c", "import importlib.metadata as m; print(m.version('ollama'))"),
    cases={
        **CASES,
        "read-only": ASKED["read-only"],
        "overloaded": Case("fail 503\nwrite hello.txt hi"),
        "invalid": Case("fail 400\nwrite hello.txt hi"),
        "unknown-model": Case("fail 404\nwrite hello.txt hi"),
        "unfit": Case(_said("```diff", "--- a/no.txt", "+++ b/no.txt", "@@ -1 +1 @@", "-old", "+new", "```")),
        "too-long": Case("overflow\nwrite hello.txt hi"),
        "out-of-tokens": Case("cut\nwrite hello.txt hi"),
        "cut-off": Case(_said("```file hello.txt", "hi")),
        "outside": Case("write ../beside.txt hi"),
    },
)
