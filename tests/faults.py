"""Helpers of the fault tests: adapters with arbitrary programs, and searches everywhere for a text."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import Repository

#: The prompt is a shell script.
SHELL_ADAPTER: dict[str, Any] = {"use": "command", "argv": ["sh", "{prompt_file}"]}
#: The prompt is a Python program.
PYTHON_ADAPTER: dict[str, Any] = {"use": "command", "argv": [sys.executable, "-S", "{prompt_file}"]}


def read_objects(repository: Path) -> bytes:
    """Return the content of every object in a repository, reachable or not."""
    arguments = ["git", "cat-file", "--batch-all-objects", "--unordered", "--batch"]
    return subprocess.run(arguments, cwd=repository, capture_output=True, check=True).stdout


def files_with(folder: Path, needle: bytes) -> list[str]:
    """Return the files below a folder with a text in their content or path."""
    found = [path for path in folder.rglob("*") if needle in bytes(path.relative_to(folder))]
    found += [path for path in folder.rglob("*") if path.is_file() and needle in path.read_bytes()]
    return sorted({str(path) for path in found})


def processes_with(needle: bytes) -> list[str]:
    """Return the processes with a text in their arguments, environment or folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            facts = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            facts += bytes((process / "cwd").readlink())
            if needle in facts and (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(f"{process.name}: {facts[:200]!r}")
        except OSError:  # the process ended
            continue
    return found


def drop_kept_worktrees(repository: Repository) -> None:
    """Delete the preserved worktrees with rejected content, as a person would."""
    kept = repository.council("salvage", "list", "--json").result["preserved"]
    names = [one["name"] for one in kept if one["name"].endswith("/worktree")]
    assert repository.council("salvage", "drop", "--yes", *names).code == 0


def strace_fails(tmp_path: Path) -> str | None:
    """Return why strace cannot inject faults here, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    probe = ["strace", "-o", str(tmp_path / "probe"), "-e", "inject=fdatasync:error=EIO", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else None
