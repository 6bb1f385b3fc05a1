"""Codex (npm `@openai/codex`)."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from adapters.codex import CodexAdapter
from tests.transcripts.programs.case import ASKED, CASES, Case, Program


def _environ(_url: str, home: Path) -> Mapping[str, str]:
    """Codex rejects a home in the folder for temporary files."""
    (home.parent / "tmp").mkdir()
    return {"OPENAI_API_KEY": "no-key", "TMPDIR": str(home.parent / "tmp")}


CODEX: Final = Program(
    adapter=CodexAdapter,
    options={
        "model": "gpt-5.5",  # newer models have a JavaScript tool only
        "provider": "model",
        "args": [
            *("--disable", "plugins"),  # the plugin list is fetched from GitHub
            *("-c", 'model_providers.model.name="model"'),
            *("-c", 'model_providers.model.base_url="http://model/v1"'),
            *("-c", 'model_providers.model.env_key="OPENAI_API_KEY"'),
        ],
    },
    environ=_environ,
    cases={
        **CASES,
        **ASKED,
        "dead-server": Case("write hello.txt hi", signal=signal.SIGTERM, said="waiting for network", is_dead=True),
        "refused": Case("write hello.txt hi\nrun echo hi > hello.txt", options={"sandbox": "read-only"}),
        "denied": Case("run touch made.txt\nsay Tried.", options={"sandbox": "read-only"}),
        "invalid": Case("fail 400\nwrite hello.txt hi"),
        "overloaded": Case("fail 503\nwrite hello.txt hi"),
        "no-key": Case("write hello.txt hi", environ={"OPENAI_API_KEY": ""}),
        "unwritable": Case("write hello.txt hi", environ={"CODEX_HOME": "/sys"}),
    },
)
