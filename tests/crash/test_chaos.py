"""Trials of random work under random faults: CHAOS_TRIALS of them, with seeds from CHAOS_SEED."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FIRST, TRIALS = (int(os.environ.get(f"CHAOS_{name}", usual)) for name, usual in (("SEED", "1"), ("TRIALS", "20")))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(FIRST, FIRST + TRIALS))
def test_chaos_loses_repeats_and_leaves_nothing(seed: int, tmp_path: Path) -> None:
    """Each trial is a process, so that it can have a file system of its own."""
    command = [sys.executable, "-m", "tests.crash.chaos", str(seed)]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environ, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
