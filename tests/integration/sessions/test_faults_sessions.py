"""Agents that misuse git: each kind on its own, sandboxed and not."""

from __future__ import annotations

import pytest

from tests.conftest import Repository
from tests.faults import SHELL_ADAPTER
from tests.sandboxes import needs_sandbox

pytestmark = [pytest.mark.extended, pytest.mark.sandbox]

#: The agent's commands, and the files that land.
KINDS = {
    "commits": ("echo x > commits; git add -A; git commit -qm one; echo y >> commits; git commit -qam two", "x\ny"),
    "switches": ("git switch -qc elsewhere; echo x > switches; git add -A; git commit -qm away", "x"),
    "detaches": ("git checkout -q --detach; echo x > detaches; git add -A; git commit -qm loose", "x"),
    "moves-main": ("echo x > moves-main; git branch -f main; git update-ref refs/heads/out HEAD", "x"),
    "deletes-git": ("rm -rf \"$(sed 's/gitdir: //' .git)\" .git; echo x > deletes-git", "x"),
    "inits-again": ("rm .git; git init -q .; git add -A; git commit -qm mine; echo x > inits-again", "x"),
    "rewrites": ("git checkout -q --orphan new; git commit -qm root; echo x > rewrites", "x"),
    "stashes": ("echo kept > README.md; git stash -q; echo x > stashes", "x"),
    "locks": ('cd "$(git rev-parse --git-dir)"; touch index.lock HEAD.lock config.lock; echo x > "$OLDPWD/locks"', "x"),
    "configures": ("git config core.worktree /; git config core.bare true; echo x > configures", "x"),
    "garbage": ('d="$(git rev-parse --git-dir)"; echo junk > "$d/HEAD"; echo junk > "$d/index"; echo x > garbage', "x"),
}  # fmt: skip


@pytest.mark.parametrize("sandbox", [pytest.param("auto", marks=[needs_sandbox, pytest.mark.slow]), "off"])
async def test_git_changes_of_an_agent_stay_in_its_session(repository: Repository, sandbox: str) -> None:
    """Only the files of its own checkout land, once each, on the target; no other branch or setting changes."""
    tasks = [{"id": name, "prompt": script} for name, (script, _) in KINDS.items()]
    config = repository.configure(tasks, adapters={"sh": SHELL_ADAPTER}, sandbox=sandbox, capacity=6)
    ended = repository.council("run", str(config), "--json")
    assert ended.states == dict.fromkeys(KINDS, "landed"), [task["reason"] for task in ended.result["tasks"]]
    for name, (_, content) in KINDS.items():
        assert repository.git("show", f"main:{name}") == content
    assert repository.git("for-each-ref", "--format=%(refname)") == "refs/heads/main"
    assert (repository.top / "README.md").read_text() == "# Project\n"
    assert "repository.changed" not in {line.get("event") for line in ended.lines}
    await repository.assert_invariants()


@pytest.mark.parametrize("sandbox", [pytest.param("auto", marks=needs_sandbox), "off"])
async def test_agent_that_reaches_for_the_users_repository_is_contained(repository: Repository, sandbox: str) -> None:
    """Sandboxed it has no effect; without a sandbox the moved branch is reported. Its own work lands."""
    repository.git("branch", "side")
    repository.remember()
    script = f"""
echo x > own
git --git-dir={repository.top}/.git update-ref -d refs/heads/side
git --git-dir={repository.top}/.git config alias.x '!touch {repository.top}/ran'
git --git-dir={repository.top}/.git branch planted
echo x > {repository.top}/untracked
rm -rf {repository.top}/.council/state
true
"""
    task = {"id": "reaches", "prompt": script}
    if sandbox == "off":
        task["prompt"] = "\n".join(script.splitlines()[:5])  # the others would do harm
    config = repository.configure([task], adapters={"sh": SHELL_ADAPTER}, sandbox=sandbox)
    ended = repository.council("run", str(config), "--json")
    assert ended.states == {"reaches": "landed"}, ended
    changed = [line for line in ended.lines if line.get("event") == "repository.changed"]
    if sandbox == "auto":
        assert changed == []
        await repository.assert_invariants()
    else:
        changes = "; ".join(sentence for line in changed for sentence in line["changes"])
        assert "refs/heads/planted was created" in changes
        assert "refs/heads/side was deleted" in changes
        assert ".git/config was changed" in changes
        assert changed[0]["sessions"] == ["reaches"]


#: Commands after which a folder of the session can't be opened; each session has also written a file.
DENIALS = {
    "top": "chmod 0 .",
    "listed": "chmod 0444 .",
    "tracked": "echo changed > src/app.py; chmod 0444 src",
    "git": 'chmod 0 "$(git rev-parse --git-dir)"',
    "handoff": 'chmod 0 "$(dirname "$COUNCIL_PROMPT_FILE")/handoff"',
    "temporary": 'chmod 0 "$(dirname "$COUNCIL_PROMPT_FILE")/tmp"',
}


@pytest.mark.parametrize("sandbox", [pytest.param("auto", marks=needs_sandbox), "off"])
async def test_agent_that_denies_access_to_its_folders_lands(repository: Repository, sandbox: str) -> None:
    """Its work lands completely, and no other task is affected."""
    tasks = [{"id": name, "prompt": f"echo x > {name}; {denial}"} for name, denial in DENIALS.items()]
    tasks.append({"id": "other", "prompt": "echo x > other"})
    config = repository.configure(tasks, adapters={"sh": SHELL_ADAPTER}, sandbox=sandbox, capacity=3)
    ended = repository.council("run", str(config), "--json")
    assert ended.states == dict.fromkeys([*DENIALS, "other"], "landed"), ended
    for name in (*DENIALS, "other"):
        assert repository.git("show", f"main:{name}") == "x"
    assert repository.git("show", "main:src/app.py") == "changed"
    await repository.assert_invariants()
