"""opencode (npm `opencode-ai`)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from adapters.opencode import OpencodeAdapter
from tests.transcripts.programs.case import ASKED, CASES, Case, Program


def opencode_environ(url: str, home: Path) -> Mapping[str, str]:
    """Its own configuration file names the model's URL."""
    file = home / "opencode.json"
    file.write_text(json.dumps({"provider": {"anthropic": {"options": {"baseURL": f"{url}/v1"}}}}))
    return {"OPENCODE_CONFIG": str(file), "ANTHROPIC_API_KEY": "no-key"}


_DENIED: Final = {"permission": {"edit": {"*": "allow", "hello.txt": "deny"}, "bash": "deny"}}
#: A name in a private folder that nobody else can create.
_UNWRITABLE: Final = {"XDG_DATA_HOME": f"{os.devnull}/data"}

OPENCODE: Final = Program(
    adapter=OpencodeAdapter,
    options={"model": "anthropic/claude-sonnet-4-5"},
    environ=opencode_environ,
    cases={
        **CASES,
        **ASKED,
        "limited-for-long": Case("fail 429 99 4000\nwrite hello.txt hi"),
        "limited-until": Case("fail 429 99 1\nwrite hello.txt hi"),
        "refused": Case("write hello.txt hi\nsay It is not written.", options={"config": _DENIED}),
        "invalid": Case("fail 400\nwrite hello.txt hi"),
        "overloaded": Case("fail 529\nwrite hello.txt hi"),
        "unknown-model": Case("write hello.txt hi", options={"model": "anthropic/no-such-model"}),
        "unwritable": Case("write hello.txt hi", environ=_UNWRITABLE),
    },
)
