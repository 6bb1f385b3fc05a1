"""Output of the installed CLIs is parsed like the recordings of earlier versions."""

from __future__ import annotations

from typing import Final

import pytest

from orchestrator.testing.adapter_contract import AdapterContract, interpret_end
from tests.clis.conftest import SELECTED
from tests.clis.programs import CLIS
from tests.contract.test_adapters import TestClaudeCode as ClaudeCodeContract
from tests.contract.test_codex_adapter import TestCodex as CodexContract
from tests.contract.test_gemini_adapter import TestGemini as GeminiContract
from tests.contract.test_opencode_adapter import TestOpencode as OpencodeContract
from tests.transcripts.programs import PROGRAMS
from tests.transcripts.record import record

pytestmark = [pytest.mark.clis, pytest.mark.timeout(300)]

CONTRACTS: Final[dict[str, type[AdapterContract]]] = {
    "claude-code": ClaudeCodeContract,
    "codex": CodexContract,
    "gemini": GeminiContract,
    "opencode": OpencodeContract,
}
#: Scenarios with several sessions, an edit, a command, a limit, a missing login, a denial.
CASES: Final = ("resumed", "edit", "tool", "limited", "no-login", "server-error", "refused", "denied")


@pytest.mark.parametrize(
    ("program", "case"),
    [
        (program, case)
        for program in CONTRACTS
        if program in SELECTED
        for case in CASES
        if case in PROGRAMS[program].cases
    ],
)
def test_installed_version_is_parsed_like_the_recorded_one(program: str, case: str) -> None:
    """The conclusion, text, tokens and files are equal; ids differ."""
    contract = CONTRACTS[program]()
    adapter = contract.adapter_type(contract.validated())
    wanted = contract.recorded[case]
    found = interpret_end(adapter, record(PROGRAMS[program], PROGRAMS[program].cases[case], str(CLIS)).end(), wanted)
    assert (found.failure, found.text, found.tokens) == (wanted.failure, wanted.text, wanted.tokens)
    assert {path.removeprefix("/work/") for path in found.paths or ()} == {
        path.removeprefix("/work/") for path in wanted.paths or ()
    }
