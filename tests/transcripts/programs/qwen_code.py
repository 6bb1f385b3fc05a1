"""Qwen Code (npm `@qwen-code/qwen-code`), which has no adapter: it runs as configured in configs/any-cli.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from adapters.command import CommandAdapter
from tests.transcripts.programs.case import ASKED, CASES, Case, Program

_FILE: Final = Path(__file__).parents[3] / "configs/any-cli.yaml"


def _environ(url: str, _home: Path) -> Mapping[str, str]:
    return {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "no-key"}


def _options() -> Mapping[str, Any]:
    options = yaml.safe_load(_FILE.read_text())["adapters"]["qwen"]
    return {key: value for key, value in options.items() if key != "use"}


QWEN_CODE: Final = Program(
    adapter=CommandAdapter,
    options=_options(),
    environ=_environ,
    version=("qwen", "qwen", "--version"),
    cases={
        # It retries a rate limit for minutes.
        **{name: case for name, case in CASES.items() if name != "limited"},
        **ASKED,
        "invalid": Case("fail 400\nwrite hello.txt hi"),
        "no-key": Case("write hello.txt hi", environ={"OPENAI_API_KEY": ""}),
    },
)
