"""A preserved worktree is safe: no git command of the user there runs a program of the agent."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from orchestrator.repo.worktrees.preserved import disable_repositories, is_preserved, preserve
from orchestrator.repo.worktrees.worktrees import Worktree
from tests.conftest import Repository
from tests.hub_fixture import HubFixture

COMMANDS = ("status", "diff", "log", "fetch", "branch", "stash", "st", "add --all", "commit --all -m x", "gc")


def run_git(folder: Path, environ: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git as a user does, with the output of a pager."""
    return subprocess.run(
        ["git", "--paginate", *arguments], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )


class Agent:
    """The actions of an agent in its worktree, with a program that leaves a trace."""

    def __init__(self, tree: Path, trace: Path, environ: Mapping[str, str]) -> None:
        self.tree, self.trace, self.environ = tree, trace, environ
        self.program = tree / "evil"
        self.program.write_text(f'#!/bin/sh\necho "$0 $*" >> "{trace}"\ncat\n')
        self.program.chmod(0o755)

    def git(self, folder: Path, *arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=folder, env=self.environ, check=True, capture_output=True)

    def arm(self, git_dir: Path, **core: str) -> None:
        """Configure a repository to run the program on every git command."""
        for name in ("post-commit", "pre-commit", "post-index-change", "reference-transaction", "pre-auto-gc"):
            hook = git_dir / "hooks" / name
            hook.parent.mkdir(exist_ok=True)
            hook.write_text(self.program.read_text())
            hook.chmod(0o755)
        settings = {"fsmonitor": self.program, "pager": self.program, "sshCommand": self.program, **core}
        lines = "".join(f"\t{name} = {value}\n" for name, value in settings.items())
        more = f'[filter "x"]\n\tclean = {self.program}\n\tsmudge = {self.program}\n[alias]\n\tst = !{self.program}\n'
        more += f'[diff]\n\texternal = {self.program}\n[remote "origin"]\n\turl = x@localhost:y\n\tfetch = +*:*\n'
        with (git_dir / "config").open("a") as config:
            config.write(f"[core]\n{lines}{more}")

    def repository(self, folder: Path, *options: str) -> Path:
        """Create a repository with a commit and a modified file."""
        folder.mkdir(parents=True, exist_ok=True)
        self.git(folder, "init", "--quiet", *options)
        (folder / "a.txt").write_text("a\n")
        (folder / ".gitattributes").write_text("* filter=x diff=x\n")
        self.git(folder, "add", "--all")
        self.git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "nested")
        (folder / "a.txt").write_text("changed\n")
        return folder


def own(agent: Agent, worktree: Worktree) -> list[Path]:
    """Arm the configuration of the session's own git directory."""
    agent.arm(worktree.git_dir)
    (agent.tree / "sub").mkdir()
    return [agent.tree, agent.tree / "sub"]


def replaced(agent: Agent, worktree: Worktree) -> list[Path]:
    """Replace the file `.git` with a repository."""
    (agent.tree / ".git").unlink()
    agent.repository(agent.tree)
    agent.arm(agent.tree / ".git")
    return [agent.tree, agent.tree / ".git", agent.tree / f".git{'.disabled-by-council'}"]


def nested(agent: Agent, worktree: Worktree) -> list[Path]:
    """Add nested repositories, one with a newline in its name, in a folder without permissions."""
    folders = [agent.repository(agent.tree / name) for name in ("lib", "a\nb/c")]
    for folder in folders:
        agent.arm(folder / ".git")
    (agent.tree / "a\nb").chmod(0)
    return [agent.tree, *folders, *(folder / ".git" for folder in folders), folders[0] / ".git/refs"]


def by_file(agent: Agent, worktree: Worktree) -> list[Path]:
    """Let the file `.git` name a repository outside of the worktree."""
    outside = agent.repository(agent.trace.parent / "outside")
    agent.arm(outside / ".git", worktree=str(agent.tree / "module"))
    (agent.tree / "module").mkdir()
    (agent.tree / "module/.git").write_text(f"gitdir: {outside}/.git\n")
    (agent.tree / ".gitmodules").write_text('[submodule "m"]\n\tpath = module\n\turl = ./module\n\tupdate = !evil\n')
    return [agent.tree, agent.tree / "module"]


def by_link(agent: Agent, worktree: Worktree) -> list[Path]:
    """Replace `.git` with a link to a repository with another name."""
    real = agent.repository(agent.tree / "real")
    agent.arm(real / ".git")
    (real / ".git").rename(agent.tree / "real/data")
    (agent.tree / "linked").mkdir()
    (agent.tree / "linked/.git").symlink_to("../real/data")
    return [agent.tree, agent.tree / "linked", agent.tree / "real/data"]


def bare(agent: Agent, worktree: Worktree) -> list[Path]:
    """Add a folder that git recognizes as a bare repository with a work tree."""
    source = agent.repository(agent.tree / "source")
    (source / ".git").rename(agent.tree / "innocent")
    agent.arm(agent.tree / "innocent", bare="false", worktree=str(agent.tree))
    return [agent.tree, agent.tree / "innocent", agent.tree / "innocent/objects"]


def of_worktree(agent: Agent, worktree: Worktree) -> list[Path]:
    """Add the git directory of a linked worktree, which has no objects or refs but names their location."""
    source = agent.repository(agent.tree / "source")
    agent.git(source, "worktree", "add", "--quiet", str(agent.tree / "other"))
    agent.arm(source / ".git")
    (source / ".git").rename(agent.trace.parent / "elsewhere")
    entry = agent.tree / "entry"
    (agent.trace.parent / "elsewhere/worktrees/other").rename(entry)
    (entry / "commondir").write_text(f"{agent.trace.parent}/elsewhere\n")
    return [agent.tree, entry, agent.tree / "other"]


@pytest.mark.extended_variants
@pytest.mark.parametrize("attack", [own, replaced, nested, by_file, by_link, bare, of_worktree])
async def test_git_in_a_preserved_worktree_runs_no_program_of_the_agent(
    repository: Repository, tmp_path: Path, attack: Callable[[Agent, Worktree], list[Path]]
) -> None:
    """Neither at the top nor in any subfolder; all content is kept."""
    hub_fixture = await HubFixture.of(repository.top, tmp_path / "hubs", repository.environ)
    base, trace = await hub_fixture.fetch(), tmp_path / "trace"
    async with hub_fixture.open() as pool:
        worktree, checkout = await hub_fixture.begin(pool, "t", base)
        agent = Agent(worktree.tree, trace, repository.environ)
        folders = attack(agent, worktree)
        trace.unlink(missing_ok=True)
        assert not is_preserved(worktree)
        await preserve(hub_fixture.git, worktree, base)
        assert is_preserved(worktree)
        assert not trace.exists()
        for folder in folders:
            for command in COMMANDS if folder == worktree.tree else COMMANDS[:5]:
                if folder.is_dir():
                    run_git(folder, repository.environ, *command.split())
                    assert not trace.exists(), (folder, command, trace.read_text())
        await pool.slots.detach(checkout)


async def test_git_in_a_preserved_worktree_shows_the_changes_of_the_session(
    repository: Repository, tmp_path: Path
) -> None:
    """HEAD is its commit, with changed, added and deleted files; disabled configuration is named."""
    hub_fixture = await HubFixture.of(repository.top, tmp_path / "hubs", repository.environ)
    base = await hub_fixture.fetch()
    async with hub_fixture.open() as pool:
        worktree, checkout = await hub_fixture.begin(pool, "t", base)
        (worktree.tree / "README.md").write_text("changed\n")
        (worktree.tree / "src/app.py").unlink()
        (worktree.tree / "new.txt").write_text("new\n")
        agent = Agent(worktree.tree, tmp_path / "trace", repository.environ)
        agent.repository(worktree.tree / "lib")
        reported = await preserve(hub_fixture.git, worktree, base)
        assert await preserve(hub_fixture.git, worktree, base) is None  # another process follows a killed one
        status = run_git(worktree.tree, repository.environ, "status", "--porcelain").stdout.splitlines()
        assert {" M README.md", " D src/app.py", "?? new.txt", "?? lib/"} <= set(status)
        assert "+changed" in run_git(worktree.tree, repository.environ, "diff").stdout
        assert run_git(worktree.tree, repository.environ, "rev-parse", "HEAD").stdout.strip() == base
        assert (worktree.tree / "lib/.git/HEAD.disabled-by-council").read_text().startswith("ref: ")
        assert reported is not None
        assert reported.endswith("by renaming them to lib/.git/HEAD.disabled-by-council")
        await pool.slots.detach(checkout)


async def test_disabled_configuration_is_reported(repository: Repository, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    agent_of = tree / "lib"
    agent_of.mkdir(parents=True)
    (agent_of / ".git").write_text("gitdir: /x\n")
    (agent_of / ".git.disabled-by-council").write_text("taken\n")
    assert disable_repositories(tree) == ["lib/.git.disabled-by-council1"]
    assert disable_repositories(tree) == []
    assert (agent_of / ".git.disabled-by-council").read_text() == "taken\n"


def test_worktree_deeper_than_path_max_is_disarmed(tmp_path: Path) -> None:
    """A link to a folder outside is not followed."""
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    tree.mkdir()
    outside.mkdir()
    (outside / ".git").write_text("gitdir: /x\n")
    (tree / "link").symlink_to(outside)
    at = os.open(tree, os.O_RDONLY)
    for _ in range(60):
        os.mkdir("d" * 100, dir_fd=at)
        below = os.open("d" * 100, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.symlink("/x", ".git", dir_fd=at)
    assert len(disable_repositories(tree)) == 1
    assert os.readlink(".git.disabled-by-council", dir_fd=at) == "/x"
    os.close(at)
    assert (outside / ".git").exists()
