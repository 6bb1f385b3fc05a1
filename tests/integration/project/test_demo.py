"""`make demo` prints each long step before it starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import Repository

TOP = Path(__file__).resolve().parents[3]


def test_demo_prints_before_it_clones(repository: Repository, tmp_path: Path) -> None:
    """The line is printed although the clone, the first step, fails."""
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text("#!/bin/sh\nexit 1\n")
    git.chmod(0o755)
    environ = {**repository.environ, "PATH": f"{git.parent}{os.pathsep}{repository.environ['PATH']}"}
    demo = [sys.executable, str(TOP / "examples" / "demo.py")]
    ended = subprocess.run(demo, env=environ, check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stdout.startswith("demo: cloning ")


def test_make_prints_before_it_installs(repository: Repository, tmp_path: Path) -> None:
    """The line is printed although `python -m venv`, the first step, fails."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(TOP / name, tmp_path)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ntest "$1" != -m\n')
    python.chmod(0o755)
    make = ["make", f"PYTHON={python}", "demo"]
    ended = subprocess.run(make, cwd=tmp_path, env=repository.environ, check=False, capture_output=True, text=True)
    assert ended.returncode != 0
    assert ended.stderr.startswith("installing council and its dependencies into .venv")
