"""Qwen Code (npm `@qwen-code/qwen-code`), run by its profile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from orchestrator.plugins import load_plugins
from tests.transcripts.programs.case import ASKED, CASES, Case, Program


def _environ(url: str, _home: Path) -> Mapping[str, str]:
    return {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "no-key"}


QWEN_CODE: Final = Program(
    adapter=load_plugins({"COUNCIL_PLUGINS": ""}).adapters["qwen-code"],
    options={"model": "qwen3-coder-plus", "args": ["--auth-type", "openai"]},
    environ=_environ,
    cases={
        # It retries a rate limit for minutes.
        **{name: case for name, case in CASES.items() if name != "limited"},
        "resumed": ASKED["resumed"],
        "invalid": Case("fail 400\nwrite hello.txt hi"),
        "no-key": Case("write hello.txt hi", environ={"OPENAI_API_KEY": ""}),
    },
)
