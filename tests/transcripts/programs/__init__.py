"""The recorded programs and their cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.transcripts.programs.acp import ACP_CLAUDE, ACP_GEMINI, ACP_OPENCODE
from tests.transcripts.programs.aider import AIDER
from tests.transcripts.programs.case import Program
from tests.transcripts.programs.claude_code import CLAUDE_CODE
from tests.transcripts.programs.codex import CODEX
from tests.transcripts.programs.gemini import GEMINI
from tests.transcripts.programs.ollama import OLLAMA
from tests.transcripts.programs.opencode import OPENCODE
from tests.transcripts.programs.profiles import CLINE, CONTINUE, COPILOT, KILO, LLM, MINI_SWE_AGENT, VIBE
from tests.transcripts.programs.qwen_code import QWEN_CODE

#: By the name of the folder with its recordings.
PROGRAMS: Final[Mapping[str, Program]] = {
    "acp-claude": ACP_CLAUDE,
    "acp-gemini": ACP_GEMINI,
    "acp-opencode": ACP_OPENCODE,
    "aider": AIDER,
    "claude-code": CLAUDE_CODE,
    "cline": CLINE,
    "codex": CODEX,
    "continue": CONTINUE,
    "copilot": COPILOT,
    "gemini": GEMINI,
    "kilo": KILO,
    "llm": LLM,
    "mini-swe-agent": MINI_SWE_AGENT,
    "ollama": OLLAMA,
    "opencode": OPENCODE,
    "qwen-code": QWEN_CODE,
    "vibe": VIBE,
}
