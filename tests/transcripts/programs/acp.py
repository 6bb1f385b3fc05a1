"""Agents of the Agent Client Protocol, run by our bridge (the extra `acp`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from adapters.acp import AcpAdapter
from tests.transcripts.programs.case import ASKED, CASES, Case, Program
from tests.transcripts.programs.claude_code import claude_environ
from tests.transcripts.programs.gemini import gemini_environ
from tests.transcripts.programs.opencode import opencode_environ

_RESUMED: Final = replace(ASKED["resumed"], options={"home": "own", "resumes": True})
_CASES: Final[Mapping[str, Case]] = {
    **CASES,
    **ASKED,
    "resumed": _RESUMED,
    "outside": Case("write ../beside.txt hi\nsay It is not written."),
    "limited-for-long": Case("fail 429 99 4000\nwrite hello.txt hi"),
    "too-long": Case("overflow\nwrite hello.txt hi"),
    "out-of-tokens": Case("cut\nwrite hello.txt hi"),
    "invalid": Case("fail 400\nwrite hello.txt hi"),
    "unknown-model": Case("write hello.txt hi", options={"model": "no-such-model"}),
}

#: It asks for permission only if configured to.
_ASKING: Final = {"OPENCODE_CONFIG_CONTENT": json.dumps({"permission": {"edit": "ask", "bash": "ask"}})}

ACP_GEMINI: Final = Program(
    adapter=AcpAdapter,
    options={"argv": ["gemini", "--acp", "-m", "gemini-2.5-pro"]},
    environ=gemini_environ,
    version=("gemini", "gemini", "--version"),
    cases={
        **_CASES,
        # It cannot load a conversation started within the same minute: their files have the same name.
        "resumed": replace(_RESUMED, pause=61.0),
        "overloaded": Case("fail 503\nwrite hello.txt hi"),
        "no-key": Case("write hello.txt hi", environ={"GEMINI_API_KEY": ""}),
        "not-installed": Case("write hello.txt hi", options={"argv": ["no-such-agent"]}),
    },
)
ACP_OPENCODE: Final = Program(
    adapter=AcpAdapter,
    options={"argv": ["opencode", "acp"], "model": "anthropic/claude-sonnet-4-5"},
    environ=opencode_environ,
    version=("opencode", "opencode", "--version"),
    cases={
        **_CASES,
        "overloaded": Case("fail 529\nwrite hello.txt hi"),
        "asking": Case("run echo from-the-shell\nwrite hello.txt hi", environ=_ASKING),
    },
)
#: It has no option for that.
_CLAUDE_VERSION: Final = (
    'cd "$(dirname "$(realpath "$(command -v claude-agent-acp)")")" && node -p "require(\'../package.json\').version"'
)

ACP_CLAUDE: Final = Program(
    adapter=AcpAdapter,
    options={"argv": ["claude-agent-acp"]},
    environ=claude_environ,
    version=("claude-agent-acp", "sh", "-c", _CLAUDE_VERSION),
    cases={
        **{name: case for name, case in _CASES.items() if name != "limited-for-long"},
        "overloaded": Case("fail 529\nwrite hello.txt hi"),
    },
)
