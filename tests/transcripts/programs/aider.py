"""Aider (PyPI `aider-chat`)."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from orchestrator.plugins import load_plugins
from tests.transcripts.programs.case import CASES, Case, Program


def _environ(url: str, home: Path) -> Mapping[str, str]:
    """Use the model prices bundled with LiteLLM instead of downloading them."""
    prices = home / ".aider/caches/model_prices_and_context_window.json"
    prices.parent.mkdir(parents=True)
    prices.write_text(json.dumps({"none": {}}))
    return {"OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": "no-key", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


AIDER: Final = Program(
    adapter=load_plugins({"COUNCIL_PLUGINS": ""}).adapters["aider"],
    options={"model": "openai/gpt-4o"},
    environ=_environ,
    cases={
        **CASES,
        "invalid": Case("fail 400\nwrite hello.txt hi"),
        "overloaded": Case("fail 503\nwrite hello.txt hi"),
        "too-long": Case("overflow\nwrite hello.txt hi"),
        "out-of-tokens": Case("cut\nwrite hello.txt hi"),
        "no-such-model": Case("fail 404\nwrite hello.txt hi"),
        "no-key": Case("write hello.txt hi", options={"model": "anthropic/claude-sonnet-4-5"}),
        # It waits for a login by the browser.
        "no-model": Case("write hello.txt hi", {"model": None}, {"OPENAI_API_KEY": ""}, signal.SIGTERM, "No LLM model"),
        "unknown-model": Case("write hello.txt hi", options={"model": "no-such-model"}),
    },
)
