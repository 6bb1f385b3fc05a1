"""Run `configs/quickstart.yaml` on a clone of this repository, and check what came of it.

    python examples/demo.py

Everything happens in a temporary folder, which is removed; this repository is only read.
"""
# ruff: noqa: INP001, S607, T201 - a script for people, which runs git and council by name

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
EXPECTED = {
    "notes/glossary.md": "# Glossary\n\n- **run**: one execution of a file\n- **task**: a unit of work\n",
    "notes/checklist.md": "# Before a release\n\n1. make test\n",
    "notes/second-try.md": "It took 2 attempts.\n",
    "notes/index.txt": "checklist.md\nglossary.md\nindex.txt\nsecond-try.md\n",
}


def main() -> int:
    """Run the demonstration; 0 if all is as expected."""
    with tempfile.TemporaryDirectory(prefix="council-demo-") as scratch:
        clone = Path(scratch, "clone")
        environ = {**os.environ, "COUNCIL_HOME": str(Path(scratch, "home"))}
        subprocess.run(["git", "clone", "--quiet", "--no-local", str(HERE), str(clone)], check=True)
        subprocess.run(["git", "checkout", "--quiet", "-B", "main"], cwd=clone, check=True)
        council = [sys.executable, "-m", "orchestrator.cli.main"]
        shown = subprocess.run([*council, "run", "configs/quickstart.yaml"], cwd=clone, env=environ, check=False)
        asked = subprocess.run([*council, "status", "--json"], cwd=clone, env=environ, capture_output=True, check=False)
        result = json.loads(asked.stdout)
        wrong = check(clone, shown.returncode, result)
    print("\n".join(wrong) or f"demo: all {len(result['tasks'])} tasks landed on {result['target']}, as expected")
    return bool(wrong)


def check(clone: Path, code: int, result: dict[str, object]) -> list[str]:
    """Return a sentence for everything that is not as it should be."""
    if (code, result["exit"], result["status"]) != (0, 0, "landed"):
        return [f"exit {code}, {result}"]
    wrong = []
    for name, content in EXPECTED.items():
        shown = subprocess.run(
            ["git", "show", f"{result['target']}:{name}"], cwd=clone, capture_output=True, text=True, check=False
        )
        if shown.stdout != content:
            wrong.append(f"{name} on the target holds {shown.stdout!r}")
    clean = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    if clean.stdout:
        wrong.append(f"the clone's checkout has changed: {clean.stdout}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
