"""The built package: its content, and that it runs on its own."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.extended
def test_wheel_runs(tmp_path: Path, environ: dict[str, str]) -> None:
    """The wheel has every imported or read file; tests, examples and benchmarks are not in it."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, env=environ, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"orchestrator", "adapters"}
    profiles = {f"adapters/profiles/{file.name}" for file in (ROOT / "adapters/profiles").iterdir()}
    assert profiles
    assert {"orchestrator/py.typed", "adapters/py.typed", *profiles} <= set(names)
    # -I: nothing from the current folder; the wheel's folder comes before the installed packages.
    start = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from orchestrator.cli.main import main; main()"
    )
    for arguments in (["--version"], ["schema"], ["adapters", "--json"]):
        done = subprocess.run(
            [sys.executable, "-I", "-c", start, *arguments], env=environ, cwd=tmp_path, capture_output=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
