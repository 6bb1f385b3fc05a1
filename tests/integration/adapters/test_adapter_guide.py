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

DOCS = Path(__file__).parents[3] / "docs" / "adapters.md"


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


@pytest.mark.extended
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


#: Claude Code, Codex and Qwen Code in one: each account but the last meets a limit or has no login.
ACCOUNTS_CLI = """
import json, os, sys
from pathlib import Path
program, seen = Path(sys.argv[0]).name, Path({seen!r})
folder = os.environ.get({{"claude": "CLAUDE_CONFIG_DIR", "codex": "CODEX_HOME"}}.get(program, "-"), "")
login = Path(folder, {{"claude": ".credentials.json", "codex": "auth.json"}}.get(program, "-"))
names = {{"claude": ("ANTHROPIC_API_KEY",), "qwen": ("OPENAI_API_KEY", "OPENAI_BASE_URL")}}.get(program, ())
keys = (os.environ.get(name, "") for name in names)
account = " ".join(filter(None, (login.read_text() if login.is_file() else "", *keys)))
seen.open("a").write(f"{{program}} {{account}}\\n")
said = {{
    "login of claude-work": {{"type": "result", "is_error": True, "api_error_status": 429, "result": "hit your limit"}},
    "spare": {{"type": "result", "is_error": True, "api_error_status": 401, "result": "Invalid API key"}},
    "login of codex-work": {{"type": "turn.failed", "error": {{"message": "You've hit your usage limit."}}}},
    "login of codex-private": {{"type": "turn.failed", "error": {{"message": "unexpected status 401 Unauthorized"}}}},
    "first": {{"type": "result", "result": "x", "error": {{"message": "429 try again in 900 s"}}}},
}}
if account in said:
    print(json.dumps(said[account]))
    sys.exit(1)
Path("a.txt").write_text("done\\n")
print(json.dumps({{"type": "result", "result": "Done.", "usage": {{"input_tokens": 5, "output_tokens": 7}}}}))
"""


@pytest.mark.extended
async def test_accounts_example_runs(repository: Repository, tmp_path: Path) -> None:
    """Every account is tried with its own login and no other, and the last one does the work."""
    guide, home = section("Accounts"), Path(repository.environ["HOME"])
    whole, commands = yaml.safe_load(block(guide, "yaml")), block(guide, "console")
    seen = tmp_path / "seen" / "accounts"
    seen.parent.mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("claude", "codex", "qwen"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!{sys.executable} -S\n{ACCOUNTS_CLI.format(seen=str(seen))}")
        program.chmod(0o755)
    for folder in re.findall(r"~/\.([\w-]+)", commands.splitlines()[0]):
        (home / f".{folder}").mkdir()
        login = "auth.json" if "codex" in folder else ".credentials.json"
        (home / f".{folder}" / login).write_text(f"login of {folder}")
    exported = dict.fromkeys(re.findall(r"(\w+)=…", commands), "")
    assert exported.keys() == set(re.findall(r"\$(\w+)", block(guide, "yaml")))
    values = {name: name.partition("_")[0].lower() for name in exported} | {"SECOND_QWEN_URL": "http://127.0.0.1:9"}
    path = f"{tmp_path / 'bin'}{os.pathsep}{repository.environ['PATH']}"
    repository.environ.update(values, ANTHROPIC_API_KEY="wrong", OPENAI_API_KEY="wrong", PATH=path)
    tasks = [one for one in whole["tasks"] if one["id"] == "api"]
    shared = {"readable": [str(tmp_path / "bin"), sys.prefix], "writable": [str(seen.parent)]}
    ended = repository.council("run", str(repository.configure(tasks, adapters=whole["adapters"], **shared)), "--json")
    assert ended.states == {"api": "landed"}, ended
    assert seen.read_text().splitlines() == [
        "claude login of claude-work",
        "claude spare",
        "codex login of codex-work",
        "codex login of codex-private",
        "qwen first",
        "qwen second http://127.0.0.1:9",
    ]
    used = repository.council("usage", "--json").result["adapters"]
    assert (used["qwen@second"]["input_tokens"], used["qwen@second"]["output_tokens"]) == (5, 7)
    reasons = {one["name"]: one["disabled_reason"] for one in ended.result["adapters"]}
    assert [*reasons] == ["claude@spare", "claude@work", "codex@private", "codex@work", "qwen@first"]
    assert str(reasons["codex@private"]).endswith(f"(account 'private', with CODEX_HOME={home / '.codex-private'})")
