"""Names with a meaning to git, a shell or a file system: rejected if they are ours, harmless elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.load import load_config
from orchestrator.errors import ConfigError
from orchestrator.plugins import load_plugins
from tests.conftest import Repository

pytestmark = pytest.mark.extended

BAD_BRANCHES = ("-b", "--upload-pack=touch x", "@", "HEAD", "refs/heads/x", "x.lock", "a/x.lock/b", "a/.b", "a..b",
                "a@{1}", "a//b", "/a", "a/", "a.", "a\nb", "a\n", "a b", "a\tb", "a\x7f", "a:b", "a~1", "a^", "a*",
                "a[b", "a\\b", "+a:b", "")  # fmt: skip
BAD_TASKS = ("../x", "..", ".", "a/b", "/etc", "x\n", "a\nb", "-x", "a..b", "x.lock", "x.", "a b", "a\0", "\u00e9",
             "x" * 65, "", "~", "a:b", "@{1}", "$HOME", "*")  # fmt: skip


@pytest.mark.parametrize("key", ["base", "target"])
@pytest.mark.parametrize("name", BAD_BRANCHES)
def test_branch_that_git_would_misread_is_rejected(repository: Repository, key: str, name: str) -> None:
    """At its position in the file, before git sees it."""
    path = repository.configure([{"id": "one", "prompt": "x"}], **{key: name})
    with pytest.raises(ConfigError) as refused:
        load_config(path, load_plugins().adapters)
    assert refused.value.problems[0].remedy


async def test_task_name_that_leaves_its_folder_is_rejected(repository: Repository) -> None:
    """Each in the file, and each on the command line, where only a task id finds anything."""
    tasks = [{"id": name, "prompt": "write x.txt x"} for name in BAD_TASKS]
    ended = repository.council("run", str(repository.configure(tasks)), "--json")
    assert (ended.code, ended.result["status"]) == (2, "invalid"), ended
    assert len(ended.result["errors"]) == len(BAD_TASKS)
    assert not repository.spawns.exists()
    assert repository.council("run", str(repository.configure([{"id": "x", "prompt": "write x x"}]))).code == 0
    logs = next((repository.top / ".council/logs").iterdir())
    (logs.parent / "outside.1.stdout").write_text("canary-out")
    (logs.parent / "outside.1.stdout").chmod(0o600)
    for arguments in (("logs", "../outside"), ("logs", "x\n"), ("diff", "../x"), ("cancel", "."),
                      ("salvage", "drop", "../../x"), ("resume", f"{logs.name}\n"),
                      ("logs", "x", "--run", f"../logs/{logs.name}")):  # fmt: skip
        refused = repository.council(*arguments)
        assert (refused.code, refused.stdout) == (2, ""), (arguments, refused)
        assert "Traceback" not in refused.stderr
    await repository.assert_invariants()


async def test_unusual_branches_of_the_user_do_no_harm(repository: Repository) -> None:
    """Names that only plumbing can create exist, and the run uses only its own base and target."""
    for name in ("HEAD", "-b", "@", "refs/heads/main", "main;id", "$(id)", "\u00fc/\u2603"):
        (repository.top / ".git/refs/heads" / name).parent.mkdir(parents=True, exist_ok=True)
        (repository.top / ".git/refs/heads" / name).write_text(repository.git("rev-parse", "main") + "\n")
    repository.git("pack-refs", "--all")
    repository.remember()
    for base, target in (("\u00fc/\u2603", "$(touch${IFS}x)'\"&|<>"), ("$(id)", "--x/\u00e9@y")):
        tasks: list[dict[str, Any]] = [
            {"id": "1", "prompt": "write x.txt x"},
            {"id": "2.a_B-c", "prompt": "append x.txt y", "needs": ["1"]},
        ]
        if target.startswith("-"):
            target = f"x{target}"  # noqa: PLW2901  a dash may be anywhere but first
        config = repository.configure(tasks, base=base, target=target)
        ended = repository.council("run", str(config), "--json")
        assert ended.code == 0, ended
        assert ended.states == {"1": "landed", "2.a_B-c": "landed"}, ended
        assert repository.git("show", f"refs/heads/{target}:x.txt") == "x\ny"
    assert not list(repository.top.glob("x*"))
    assert repository.git("symbolic-ref", "HEAD") == "refs/heads/main"


def installed(repository: Repository, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed script: unlike `python -m` it does not import from the current folder."""
    council = str(Path(sys.executable).with_name("council"))
    return subprocess.run(
        [council, *arguments], cwd=repository.top, env=repository.environ, capture_output=True, text=True, check=False
    )


async def test_plugin_in_the_repository_is_not_loaded(repository: Repository, tmp_path: Path) -> None:
    """To the installed command, files of the repository and of the current folder are data."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'a').write(__name__ + ' ')\n"
    planted = {
        "adapters/__init__.py": code, "adapters/command/adapter.py": code, "adapters/evil.py": code,
        "orchestrator/__init__.py": code,
        "sitecustomize.py": code, "usercustomize.py": code, "evil.py": code, "click.py": code, "json.py": code,
        "evil-1.dist-info/entry_points.txt": "[cli_council]\nevil = evil\n[pytest11]\nevil = evil\n",
        "evil-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: evil\nVersion: 1\n",
        "evil.egg-info/entry_points.txt": "[cli_council]\nevil = evil\n", "pyvenv.cfg": "home = .\n",
    }  # fmt: skip
    repository.commit(planted, "plugins")
    repository.remember()
    config = repository.configure([{"id": "one", "prompt": "write one.txt 1"}])
    done = installed(repository, "run", str(config))
    assert done.returncode == 0, done
    text = json.loads(config.read_text())
    text["adapters"]["fake"]["use"] = "evil"
    config.write_text(json.dumps(text))
    refused = installed(repository, "run", str(config))
    assert refused.returncode == 2, refused
    assert "there is no adapter type 'evil'" in refused.stderr
    assert not ran.exists()
    await repository.assert_invariants()


async def test_state_that_came_with_a_repository_is_not_used(repository: Repository) -> None:
    """Every command rejects a `.council` that git tracks, before anything in it is read."""
    config = repository.configure([{"id": "t", "prompt": "write a.txt a"}])
    assert repository.council("run", str(config)).code == 0
    repository.git("add", "--force", ".council/state")
    for command in (["status"], ["resume"], ["run", str(config)]):
        refused = repository.council(*command)
        assert refused.code == 2, refused
        assert "git tracks files in .council" in refused.stderr
