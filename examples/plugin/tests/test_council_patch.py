"""The adapter fulfils the contract and applies patches."""

from council_patch import PatchAdapter

from orchestrator.protocols import CliWarning, FailureClass, SessionEnd, ToolCall
from orchestrator.testing.adapter_contract import AdapterContract

FAILED = "patching file app.py\nHunk #1 FAILED at 1.\n1 out of 1 hunk FAILED\n"


class TestPatch(AdapterContract):
    """The adapter contract, with real lines and exit codes."""

    adapter_type = PatchAdapter
    options = {"strip": 0}
    lines = [
        ("patching file src/app.py", [ToolCall("patch", "src/app.py", ["src/app.py"])]),
        ("patching file 'a name.txt'", [ToolCall("patch", "a name.txt", ["a name.txt"])]),
        ("Hunk #1 succeeded at 3 (offset 1 line).", [CliWarning("Hunk #1 succeeded at 3 (offset 1 line).")]),
        ("1 out of 1 hunk FAILED", []),
    ]
    ends = [
        (SessionEnd(exit=1, signal=None, time=0.0, stdout=FAILED, stderr=""), FailureClass.REFUSED),
        (SessionEnd(exit=2, signal=None, time=0.0, stdout="", stderr="patch: **** Only garbage\n"), None),
    ]
