"""Changes of a session to the user's repository are detected; user changes and landings are not reported."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.repo.git.command import Git
from orchestrator.repo.source.snapshot import RepositorySnapshot, describe_changes, is_user_git_running, take_snapshot
from orchestrator.repo.source.user_checkouts import LocalRepository, find_repository
from tests.conftest import Repository
from tests.fingerprint import Fingerprint
from tests.sandboxes import needs_sandbox

pytestmark = [pytest.mark.extended, pytest.mark.sandbox]


@pytest.fixture
def git(environ: dict[str, str]) -> Git:
    """Return git on the user's side."""
    return Git(None, as_user=True, environ=environ)


async def sealed(repository: Repository, git: Git, previous: RepositorySnapshot | None = None) -> RepositorySnapshot:
    """Seal the state of the fixture's repository."""
    return await take_snapshot(await find_repository(repository.top, git), git, previous)


def write(path: str, content: str, mode: int = 0o644) -> Callable[[Repository], object]:
    """Return an action that writes a file in the git directory."""

    def act(repository: Repository) -> None:
        file = repository.top / ".git" / path
        file.write_text(content)
        file.chmod(mode)

    return act


def does(*arguments: str) -> Callable[[Repository], object]:
    """Return an action that runs git."""
    return lambda repository: repository.git(*arguments)


def refresh(repository: Repository) -> None:
    """Make git refresh the file times in the index."""
    index = (repository.top / ".git" / "index").read_bytes()
    os.utime(repository.top / "README.md", (1, 1))
    repository.git("status")
    assert (repository.top / ".git" / "index").read_bytes() != index


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (does("branch", "other"), "refs/heads/other was created at "),
        (does("tag", "v1"), "refs/tags/v1 was created at "),
        (does("branch", "-D", "side"), "refs/heads/side was deleted (was at "),
        (does("update-ref", "refs/heads/side", "HEAD^"), "refs/heads/side moved from "),
        (does("pack-refs", "--all"), None),
        (does("config", "user.name", "Someone"), ".git/config was changed"),
        (does("switch", "--quiet", "side"), ".git/HEAD moved from refs/heads/main to refs/heads/side"),
        (does("rm", "--quiet", "--cached", "README.md"), ".git/index has different staged entries"),
        (does("update-index", "--assume-unchanged", "README.md"), ".git/index has different staged entries"),
        (does("-C", "../linked", "rm", "--quiet", "f"), ".git/worktrees/linked/index has different staged entries"),
        (does("-C", "../linked", "switch", "--quiet", "--detach"), ".git/worktrees/linked/HEAD moved from refs/heads/"),
        (write("hooks/post-commit", "#!/bin/sh\n", 0o755), ".git/hooks/post-commit was created"),
        (write("hooks/old", "#!/bin/sh\n", 0o755), ".git/hooks/old was changed"),
        (write("info/attributes", "* filter=x\n"), ".git/info/attributes was created"),
        (write("config.worktree", "[core]\n"), ".git/config.worktree was created"),
        (does("status"), None),
        (refresh, None),
        (lambda repository: (repository.top / "README.md").write_text("mine"), None),
    ],
)
async def test_external_change_is_detected(
    repository: Repository, git: Git, act: Callable[[Repository], object], sentence: str | None
) -> None:
    """One message per change; files and `git status` refreshes are the user's."""
    repository.commit({"f": "1"})
    repository.git("branch", "side")
    repository.git("worktree", "add", "--quiet", "-b", "linked", "../linked")
    write("hooks/old", "#!/bin/sh\n")(repository)
    before = await sealed(repository, git)
    act(repository)
    fingerprint = Fingerprint.of(repository.top)
    found = describe_changes(before, await sealed(repository, git, before), ours={})
    assert Fingerprint.of(repository.top) == fingerprint
    if sentence is None:
        assert found == []
    else:
        assert len(found) == 1
        assert found[0].startswith(sentence)


async def test_own_landing_is_recognized(repository: Repository, git: Git) -> None:
    """Of the target and the staged entries of its checkout; any other move is reported."""
    before = await sealed(repository, git)
    commit = repository.commit({"f": "1"})
    after = await sealed(repository, git, before)
    assert describe_changes(before, after, ours={"refs/heads/main": commit}) == []
    old = before.content("refs")["refs/heads/main"]
    assert describe_changes(before, after, ours={"refs/heads/other": commit}) == [
        ".git/index has different staged entries",
        f"refs/heads/main moved from {old[:10]} to {commit[:10]}",
    ]
    assert describe_changes(before, after, ours={"refs/heads/main": old}) == [
        f"refs/heads/main moved from {old[:10]} to {commit[:10]}"
    ]


async def test_unchanged_files_are_not_read_again(repository: Repository, git: Git) -> None:
    """Parts with old enough times are reused; only a changed one is read."""
    young = seal = await sealed(repository, git)
    assert young.parts["refs"].fingerprint is None
    with anyio.fail_after(30):
        while None in {part.fingerprint for part in seal.parts.values()}:
            await anyio.sleep(0.1)
            seal = await sealed(repository, git)
    again = await sealed(repository, git, seal)
    assert all(again.parts[name] is part for name, part in seal.parts.items())
    repository.git("branch", "x")
    changed = await sealed(repository, git, again)
    assert [name for name, part in seal.parts.items() if changed.parts[name] is not part] == ["refs"]
    assert [sentence.split(" at ")[0] for sentence in describe_changes(seal, changed, ours={})] == [
        "refs/heads/x was created"
    ]


async def test_bare_repository_is_guarded(tmp_path: Path, repository: Repository, git: Git) -> None:
    """It has refs and configuration, but no staged entries."""
    repository.git("clone", "--quiet", "--bare", ".", "../bare.git")
    bare = await find_repository(tmp_path / "bare.git", git)
    before = await take_snapshot(bare, git)
    subprocess.run(["git", "branch", "x", "main"], cwd=bare.git_dir, check=True, env=repository.environ)
    found = describe_changes(before, await take_snapshot(bare, git, before), ours={})
    assert [sentence.split(" at ")[0] for sentence in found] == ["refs/heads/x was created"]


async def test_git_of_the_user_is_distinguished_from_ours(repository: Repository, git: Git) -> None:
    """A descendant of this process is ours; one whose parents have ended is not."""
    local: LocalRepository = await find_repository(repository.top, git)
    assert not await is_user_git_running(local)
    waits = ["git", "cat-file", "--batch"]
    with subprocess.Popen(waits, cwd=repository.top, stdin=subprocess.PIPE, env=repository.environ) as own:
        assert not await is_user_git_running(local)
        own.communicate(b"")
    # The shell ends at once, so that init (or a subreaper above us) is the parent.
    reader, writer = os.pipe()
    subprocess.run(
        ["sh", "-c", "git cat-file --batch <&3 >/dev/null &"],
        cwd=repository.top, stdin=subprocess.DEVNULL, pass_fds=(), env=repository.environ, check=True,
        preexec_fn=lambda: os.dup2(reader, 3), close_fds=False,
    )  # fmt: skip
    os.close(reader)
    try:
        with anyio.fail_after(30):
            while not await is_user_git_running(local):
                await anyio.sleep(0.02)
    finally:
        os.close(writer)


@pytest.mark.parametrize("sandbox", ["off", pytest.param("auto", marks=needs_sandbox)])
async def test_session_that_changes_the_users_repository_is_reported(repository: Repository, sandbox: str) -> None:
    """Without a sandbox its hook, branch and setting are reported with its name; with one nothing changes."""
    top = repository.top
    steps = (
        f"cd {top} && git branch planted && git config core.pager evil && echo x > .git/hooks/post-commit;"
        " cd $OLDPWD; echo x > x.txt"
    )
    shell = {"use": "command", "argv": ["sh", "{prompt_file}"]}
    tasks: list[dict[str, Any]] = [
        {"id": "reaches-out", "prompt": steps},
        {"id": "next", "prompt": "echo y > y.txt", "needs": ["reaches-out"]},
    ]
    ended = repository.council(
        "run", str(repository.configure(tasks, adapters={"sh": shell}, sandbox=sandbox)), "--json"
    )
    assert set(ended.states.values()) == {"landed"}, ended
    reported = [line for line in ended.lines if line.get("event") == "repository.changed"]
    if sandbox == "auto":
        assert reported == []
        await repository.assert_invariants()
        return
    assert [line["sessions"] for line in reported] == [["reaches-out"]]
    changed = " ".join(reported[0]["changes"])
    assert "refs/heads/planted" in changed
    assert ".git/config was changed" in changed
    assert "hooks/post-commit was created" in changed


async def test_landings_are_not_reported(repository: Repository) -> None:
    """Neither those of this run nor those of another one, into a checked-out branch."""
    tasks = [{"id": f"t{n}", "prompt": f"write {{}}{n}.txt x"} for n in range(4)]
    children = []
    for name in ("left", "right"):
        config = repository.configure([{**task, "prompt": task["prompt"].format(name)} for task in tasks])
        children.append(repository.start("run", str(config.rename(config.with_name(f"{name}.yaml"))), "--json"))
    for child in children:
        stdout, _ = child.communicate(timeout=90)
        assert child.returncode == 0
        assert "repository.changed" not in stdout
    await repository.assert_invariants()


async def test_unusual_files_are_no_error(repository: Repository, git: Git) -> None:
    """A branch with a Unicode line end in its name, and a file among the worktree folders."""
    repository.git("branch", "one\u2028two")
    (repository.top / ".git" / "worktrees").mkdir()
    (repository.top / ".git" / "worktrees" / ".DS_Store").write_text("x")
    before = await sealed(repository, git)
    repository.git("branch", "three\u0085four")
    found = describe_changes(before, await sealed(repository, git, before), ours={})
    assert [one.partition(" at ")[0] for one in found] == ["refs/heads/three\u0085four was created"]
