"""The README's example does what the README says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.conftest import Repository
from tests.fake_programs import install_fake_programs
from tests.sandboxes import needs_sandbox

README = (Path(__file__).parents[3] / "README.md").read_text()

#: A fake Claude Code for the example: a change, and the tokens and cost of the README.
_CLAUDE = """\
case "$*" in *--version*) echo "2.1.300 (Claude Code)"; exit;; esac
read -r prompt
case "$prompt" in *User*) echo 1 > models.py;; *) echo 1 > api.py;; esac
echo '%s'
"""
_RESULT = {
    "type": "result",
    "subtype": "success",
    "is_error": False,
    "result": "Done.",
    "session_id": "1",
    "total_cost_usd": 0.12,
    "usage": {"input_tokens": 1000, "output_tokens": 200},
}


@needs_sandbox
def test_example_prints_the_shown_output(repository: Repository, tmp_path: Path) -> None:
    """Line by line, except for times and ids."""
    example, shown = (re.search(rf"```{kind}\n(.*?)```", README, re.DOTALL) for kind in ("yaml", "text"))
    assert example
    assert shown
    assert len(example[1].splitlines()) == 5
    programs = install_fake_programs(tmp_path, repository)
    programs.add("claude", _CLAUDE % json.dumps(_RESULT))
    programs.add("make", 'test "$1" = test')
    (repository.top / "council.yaml").write_text(f"{example[1]}readable: [{json.dumps(str(programs.folder))}]\n")
    ended = repository.council("run")
    assert ended.code == 0, ended.stdout + ended.stderr
    printed = _without_ids(ended.stdout).splitlines()
    assert [line for line in _without_ids(shown[1]).splitlines() if line not in printed] == []


def _without_ids(text: str) -> str:
    """Replace times of day, run ids and commits."""
    text = re.sub(r"\b\d{8}-\d{6}-\w{4}\b", "RUN", text)
    return re.sub(r"\b[0-9a-f]{10}\b", "COMMIT", re.sub(r"^\d\d:\d\d:\d\d", "TIME", text, flags=re.MULTILINE))
