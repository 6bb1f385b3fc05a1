"""The README's picture is a well-formed one of a real run, and can be drawn anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def check(picture: Path) -> None:
    """It is XML, shows what matters, names no path of the machine, and fetches nothing."""
    text = picture.read_text()
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = {(one.text or "").replace("\N{NO-BREAK SPACE}", " ").strip() for one in root.iter(f"{root.tag[:-3]}text")}
    assert {"landed", "build", "conflict", "checks", "2/3", "merge conflict in README.md"} <= words
    assert text.count("://") == 1
    assert not [folder for folder in ("/tmp", "/home", str(Path.home()), sys.prefix) if folder in text]


def test_the_picture_is_well_formed() -> None:
    """The one that the README shows."""
    check(DOCS / "council.svg")


@pytest.mark.slow
def test_the_picture_can_be_drawn(tmp_path: Path, environ: dict[str, str]) -> None:
    """The script catches the moment in a run of its own."""
    subprocess.run([sys.executable, str(DOCS / "picture.py"), str(tmp_path / "made.svg")], check=True, env=environ)
    check(tmp_path / "made.svg")
