"""The example in docs/adapters.md works as written."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml

from tests.conftest import Repository
from tests.sandboxes import needs_sandbox

DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"


def section(title: str) -> str:
    """Return the section or subsection of the page with this title."""
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##)", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def block(text: str, language: str) -> str:
    """Return the first code block of a language."""
    found = re.search(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return dedent(found[1])


async def test_adapter_guide_example_runs(repository: Repository, tmp_path: Path) -> None:
    """The example keeps the whole adapter contract."""
    mini, _ = install(repository, tmp_path)
    bare = repository.council("adapters", "test", mini, "--no-live", "--json")
    assert bare.code == 0, bare


def install(repository: Repository, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """Install the guide's program and file; return the adapter's name and its entry."""
    guide = section("Another CLI in fifteen minutes")
    program = tmp_path / "bin" / "mini"
    program.parent.mkdir()
    program.write_text(block(guide, "sh"))
    program.chmod(0o755)
    repository.environ["PATH"] = f"{program.parent}{os.pathsep}{repository.environ['PATH']}"
    whole = yaml.safe_load(block(guide, "yaml"))
    (mini,) = entry = whole["adapters"]
    (repository.top / "council.yaml").write_text(yaml.safe_dump({**whole, "readable": [str(program.parent)]}))
    return mini, entry


@needs_sandbox
@pytest.mark.slow
async def test_adapter_guide_example_works_in_a_run(repository: Repository, tmp_path: Path) -> None:
    """It lands a task, continues after a failed check, and is disabled without a key."""
    mini, entry = install(repository, tmp_path)
    program, guide = tmp_path / "bin" / "mini", section("Another CLI in fifteen minutes")
    checks = {"allow_failing_base": True, "checks": ["grep -q right a.txt"], "attempts": 2}
    config = {
        "version": 1,
        "target": "main",
        "readable": [str(program.parent)],
        "adapters": entry,
        "tasks": [{"id": "t", "prompt": "write a.txt wrong", **checks}],
    }
    (repository.top.parent / "council.yaml").write_text(yaml.safe_dump({**config, "repo": str(repository.top)}))
    (repository.top / "council.yaml").write_text(yaml.safe_dump(config))
    first, *words = shlex.split(block(guide, "console").removeprefix("$ "))
    assert (first, words[:3]) == ("council", ["adapters", "test", mini])
    tried = repository.council(*words, "--json")
    assert (tried.code, tried.result["live"]["status"], tried.result["live"]["input_tokens"]) == (0, "landed", 12), (
        tried
    )
    stopped = repository.council("run", "--task", "fail", "--json").result
    assert (stopped["tasks"][0]["failure"], stopped["adapters"][0]["name"]) == ("auth", mini), stopped
    (repository.top / "council.yaml").unlink()
    ended = repository.council("run", str(repository.top.parent / "council.yaml"), "--json")
    (repaired,) = ended.result["tasks"]
    assert (repaired["failure"], repaired["attempts"]) == ("checks_failed", 2), ended
    key = f"task/{ended.result['run']}/t"
    (version, *_) = repository.council("state", "history", key, "--json").result["versions"]
    assert [one["resumed"] for one in version["new"]["attempts"]] == [False, True]
    assert len({one["session"] for one in version["new"]["attempts"]}) == 1


async def test_profile_guide_example_runs(repository: Repository, tmp_path: Path) -> None:
    """Its task lands with its tokens; without a key the adapter is disabled with the remedy, despite exit code 0."""
    guide = section("A profile in ten minutes")
    program = tmp_path / "bin" / "odd"
    program.parent.mkdir()
    program.write_text(block(guide, "sh"))
    program.chmod(0o755)
    repository.environ["PATH"] = f"{program.parent}{os.pathsep}{repository.environ['PATH']}"
    profile = Path(repository.environ["HOME"]) / ".config" / "council" / "profiles" / "odd.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text(block(guide, "yaml"))
    bare = repository.council("adapters", "test", "odd", "--no-live", "--json")
    assert bare.code == 0, bare
    readable = [str(program.parent), sys.prefix]
    tasks = [{"id": "t", "prompt": "write a.txt\nright", "adapter": "odd"}]
    ended = repository.council("run", str(repository.configure(tasks, adapters={}, readable=readable)), "--json")
    assert ended.states == {"t": "landed"}, ended
    (task,) = ended.result["tasks"]
    assert (task["input_tokens"], task["output_tokens"], task["last_message"]) == (12, 3, "Written.")
    assert (repository.top / "a.txt").read_text() == "right\n"
    tasks = [{"id": "t", "prompt": "fail", "adapter": "odd"}]
    failed = repository.council(
        "run", str(repository.configure(tasks, adapters={}, readable=readable)), "--json"
    ).result
    (adapter,) = failed["adapters"]
    assert adapter["name"] == "odd"
    assert "there is no key: set ODD_KEY" in adapter["disabled_reason"]
