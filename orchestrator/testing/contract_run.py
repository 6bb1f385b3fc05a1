"""Run the adapter contract for a configured adapter.

`python -m orchestrator.testing.contract_run` reads a JSON object from standard input, `{"use", "options",
"plugin_folders"}`: the adapter type, its options as in the YAML file, and the folders of local plugins. It prints one
JSON object, `{"results": [{"test", "rule", "passed", "output"}]}`, or `{"error"}` if the contract can't be run.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.plugins import load_plugins

if TYPE_CHECKING:
    import pytest

    from orchestrator.testing.adapter_contract import AdapterContract

_SPEC = "COUNCIL_TESTED_ADAPTER"
_MODULE = """
from orchestrator.testing.adapter_contract import AdapterContract
from orchestrator.testing.contract_run import contract_suite

TestAdapter = contract_suite(AdapterContract)
"""
_LONGEST = 2_000  # characters of a failed test's output to keep
INSTALL_COMMAND = "pip install 'cli-council[testing]'"


def contract_suite(contract: type[AdapterContract]) -> type[AdapterContract]:
    """Return the suite for the adapter selected by this process's environment."""
    spec = json.loads(os.environ[_SPEC])
    types = load_plugins(os.environ, [Path(folder) for folder in spec["plugin_folders"]]).adapters
    body = {"adapter_type": types[spec["use"]], "options": spec["options"]}
    return type("TestAdapter", (contract,), body)


@dataclass(slots=True)
class _Recorder:
    """A pytest plugin that records the result of each test."""

    results: list[dict[str, Any]] = field(default_factory=list)
    _rules: dict[str, str] = field(default_factory=dict)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            rule = getattr(getattr(item, "function", None), "__doc__", None) or item.name
            self._rules[item.nodeid] = " ".join(rule.split())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            output = report.longreprtext[-_LONGEST:] if report.failed else ""
            name = report.nodeid.rpartition("::")[2]
            rule = self._rules.get(report.nodeid, name)
            self.results.append({"test": name, "rule": rule, "passed": report.passed, "output": output})


def main() -> dict[str, Any]:
    """Run the suite and return the object to print."""
    os.environ[_SPEC] = sys.stdin.read()
    try:
        import pytest  # noqa: PLC0415  (an extra)
    except ImportError:
        return {"error": f"the contract needs pytest, which is not installed: {INSTALL_COMMAND}"}
    recorder = _Recorder()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()) as printed:
        module = Path(folder) / "test_adapter.py"
        module.write_text(_MODULE)
        # Without `--confcutdir` pytest would run a `conftest.py` of another user in the folder for temporary files.
        pytest_options = [
            "--confcutdir",
            folder,
            "-c",
            os.devnull,
            "--rootdir",
            folder,
            f"--basetemp={folder}/temporary",
        ]
        options = ["-q", "-p", "no:cacheprovider", *pytest_options, str(module)]
        pytest.main(options, plugins=[recorder])
    if not recorder.results:
        return {"error": f"the contract could not be run: {printed.getvalue().strip()[-_LONGEST:]}"}
    return {"results": recorder.results}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main()) + "\n")
