"""Claude Code (npm `@anthropic-ai/claude-code`)."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from adapters.claude_code import ClaudeCodeAdapter
from tests.transcripts.programs.case import ASKED, CASES, Case, Program


def claude_environ(url: str, _home: Path) -> Mapping[str, str]:
    """Return the model's URL and a dummy key."""
    return {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "no-key"}


CLAUDE_CODE: Final = Program(
    adapter=ClaudeCodeAdapter,
    options={"model": "opus", "permission_mode": "bypassPermissions"},
    environ=claude_environ,
    cases={
        **CASES,
        "limited-until": Case("fail 429 99 1\nwrite hello.txt hi"),
        **ASKED,
        "resumed-total-cost": ASKED["resumed"],  # 2.1.280 to about 2.1.310: reports the cost of the conversation
        "resumed-both-costs": ASKED["resumed"],  # later versions
        "denied": Case(
            "run python3 -c 'print(1)'\nwrite out.txt hi\nsay Tried.", options={"permission_mode": "acceptEdits"}
        ),
        "interrupted-tool": Case("run touch began; sleep 60\nusage 120 34", signal=signal.SIGINT, made="began"),
        "refused": Case("write .git/hooks/x hi\nsay It is not written.", options={"permission_mode": "acceptEdits"}),
        "turns": Case("write a.txt a\nwrite b.txt b", options={"max_turns": 1}),
        "invalid": Case("fail 400\nwrite hello.txt hi"),
        "overloaded": Case("fail 529\nwrite hello.txt hi"),
    },
)
