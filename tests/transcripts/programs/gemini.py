"""Gemini CLI (npm `@google/gemini-cli`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from adapters.gemini import GeminiAdapter
from tests.transcripts.programs.case import ASKED, CASES, Case, Program


def gemini_environ(url: str, home: Path) -> Mapping[str, str]:
    """Settings may contain variables. Two of ten retries are kept, which take minutes; crash reports stay at home."""
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


GEMINI: Final = Program(
    adapter=GeminiAdapter,
    options={"model": "gemini-2.5-pro", "approval_mode": "yolo"},
    environ=gemini_environ,
    cases={
        **CASES,
        **ASKED,
        "refused": Case("write ../beside.txt hi"),
        "denied": Case("run echo $(pwd)\nsay Tried."),
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
)
