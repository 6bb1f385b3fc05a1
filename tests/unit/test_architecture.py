"""The package layout and docs/architecture.md."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
#: Modules per folder, so that a listing can be taken in at a glance.
MOST_MODULES = 15


def test_diagrams_match_the_code() -> None:
    """`python docs/diagrams.py` regenerates them."""
    command = [sys.executable, str(ROOT / "docs" / "diagrams.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, (
        "docs/architecture.md: run `python docs/diagrams.py`; "
        "if a trigger only clutters the diagram, as those of people do, add it to EVERYWHERE there first"
    )


def test_page_is_short() -> None:
    """Details belong in the packages and in docs/internals.md."""
    lines = len(PAGE.read_text().splitlines())
    assert lines <= 150, (
        f"docs/architecture.md has {lines} lines: shorten its text, or move details to docs/internals.md"
    )


def test_folder_has_at_most_fifteen_modules() -> None:
    """Split a larger folder into packages by nouns."""
    files = (path for top in ("orchestrator", "adapters") for path in (ROOT / top).rglob("*.py"))
    counts = Counter(path.parent.relative_to(ROOT) for path in files if path.name not in {"__init__.py", "__main__.py"})
    assert {str(folder): count for folder, count in counts.items() if count > MOST_MODULES} == {}


def test_package_has_a_docstring() -> None:
    """`__init__.py` names the entry point and the allowed imports."""
    packages = list((ROOT / "orchestrator").rglob("__init__.py"))
    assert [str(path) for path in packages if not path.read_text().lstrip().startswith('"""')] == []
