"""Run `configs/quickstart.yaml` on a clone of this repository.

    python examples/demo.py

The demo verifies the results. It runs in a temporary folder, which is removed afterwards, and does not change this
repository.
"""

# ruff: noqa: S607 - git and council are run by name

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
FILES = {
    "notes/glossary.md": "# Glossary\n\n- **run**: one execution of a file\n- **task**: a unit of work\n",
    "notes/checklist.md": "# Before a release\n\n1. make test\n",
    "notes/longest.txt": "1\n",
    "notes/second-try.md": "It took 2 attempts.\n",
    "notes/index.txt": "notes/checklist.md\nnotes/glossary.md\nnotes/second-try.md\n",
}
STATES = {
    "glossary": "landed",
    "more-words": "landed",
    "sorted-words": "landed",
    "checklist": "landed",
    "longest": "landed",
    "second-try": "landed",
    "index": "landed",
    "hangs": "failed",
}
# One of these lands, and the other one conflicts.
MOTTOS = {"motto": "One merge at a time.\n", "other-motto": "Nothing is lost.\n"}


def main() -> int:
    """Run the demo; return 0 if all results are as expected."""
    with tempfile.TemporaryDirectory(prefix="council-demo-") as scratch:
        clone = Path(scratch, "clone")
        print(f"demo: cloning {HERE}, then running configs/quickstart.yaml in the clone (10 tasks, no AI)", flush=True)
        environ = {**os.environ, "COUNCIL_HOME": str(Path(scratch, "home"))}
        subprocess.run(["git", "clone", "--quiet", "--no-local", str(HERE), str(clone)], check=True)
        subprocess.run(["git", "checkout", "--quiet", "-B", "main"], cwd=clone, check=True)
        council = [sys.executable, "-m", "orchestrator.cli.main"]
        shown = subprocess.run([*council, "run", "configs/quickstart.yaml"], cwd=clone, env=environ, check=False)
        asked = subprocess.run([*council, "status", "--json"], cwd=clone, env=environ, capture_output=True, check=False)
        result = json.loads(asked.stdout)
        wrong = check(clone, shown.returncode, result)
    ended = f"demo: all {len(result['tasks'])} tasks ended as expected on {result['target']}"
    print("\n".join(wrong) or f"{ended}; the clone was removed, so the `next` commands above do not apply")
    return bool(wrong)


def check(clone: Path, code: int, result: dict[str, Any]) -> list[str]:
    """Return a message for each unexpected result."""
    if (code, result["exit"], result["status"]) != (1, 1, "incomplete"):
        return [f"exit {code}, {result}"]
    tasks = {task["id"]: task for task in result["tasks"]}
    states = {name: task["status"] for name, task in tasks.items()}
    wrong = [f"{name} is {states[name]}, not {state}" for name, state in STATES.items() if states[name] != state]
    if tasks["hangs"]["failure"] != "timeout" or tasks["hangs"]["branch"] is None:
        wrong.append(f"hangs did not time out, or its work was not preserved: {tasks['hangs']}")
    if sorted(states[name] for name in MOTTOS) != ["conflict", "landed"]:
        wrong.append(f"the mottos did not conflict: {states}")
    landed = [text for name, text in MOTTOS.items() if states[name] == "landed"]
    for name, content in [*FILES.items(), *(("MOTTO", text) for text in landed)]:
        shown = subprocess.run(
            ["git", "show", f"{result['target']}:{name}"], cwd=clone, capture_output=True, text=True, check=False
        )
        if shown.stdout != content:
            wrong.append(f"{name} on the target is {shown.stdout!r}")
    clean = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    if clean.stdout:
        wrong.append(f"the clone's checkout has changed: {clean.stdout}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
