"""The recording shown in the README."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

DOCS = Path(__file__).parents[3] / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def check(recording: Path) -> None:
    """Check the frames: each is visible, the last shows the results, nothing is fetched or private."""
    text = recording.read_text()
    root = ET.fromstring(text)
    frames = [group for group in root.iter(f"{SVG}g") if group.get("visibility")]
    assert len(frames) >= 10
    assert [frame.get("visibility") for frame in frames] == ["hidden"] * (len(frames) - 1) + ["visible"]
    times = [frame[0].get("keyTimes", "").split(";") for frame in frames]
    assert [frame_times[-1] for frame_times in times[:-1]] == [frame_times[1] for frame_times in times[1:]]
    assert {"landed", "conflict", "2/3", "merge conflict in README.md"} <= words(frames[-1])
    assert {"build", "waiting", "checks"} <= set().union(*map(words, frames))
    assert text.count("://") == 1
    assert not [folder for folder in ("/tmp", "/home", str(Path.home()), sys.prefix) if folder in text]


def words(frame: ET.Element) -> set[str]:
    """Return the cells of a frame."""
    return {(cell.text or "").replace("\N{NO-BREAK SPACE}", " ").strip() for cell in frame.iter(f"{SVG}text")}


def test_recording_of_the_readme_is_well_formed() -> None:
    check(DOCS / "recording.svg")


@pytest.mark.slow
def test_recording_is_reproducible(tmp_path: Path, environ: dict[str, str]) -> None:
    made = tmp_path / "made.svg"
    subprocess.run([sys.executable, str(DOCS / "recording.py"), str(made)], check=True, env=environ)
    check(made)
