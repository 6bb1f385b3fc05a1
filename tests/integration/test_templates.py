"""Worktrees that are copied from a checkout are as git would have made them, and nothing is left of it."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path

import anyio
import pytest

from orchestrator.repo import worktrees
from orchestrator.repo.git import Git
from orchestrator.repo.hub import Hub, create_hub, hub_of, internal_ref
from orchestrator.repo.source import Source
from orchestrator.repo.stamps import Stamps
from orchestrator.repo.templates import Templates
from orchestrator.repo.worktrees import Worktree
from tests.conftest import Repository

_MANY = 6


@pytest.fixture
async def hub(repository: Repository, tmp_path: Path, environ: dict[str, str]) -> Hub:
    """Our repositories for one with a program, links, a name that is no text and a folder of folders."""
    (repository.top / "run").write_text("#!/bin/sh\n")
    (repository.top / "run").chmod(0o755)
    (repository.top / "link").symlink_to("run")
    (repository.top / "nowhere").symlink_to("/no/such/file")
    repository.commit({"a/b/c/d.txt": "d\n", "-dash": "x\n", "new\nline": "y\n", ".hidden/x": "z\n"}, "more")
    made = hub_of(str(repository.top), tmp_path / "council-home")
    await create_hub(made, "sha1", environ)
    return made


async def _fetch(hub: Hub, repository: Repository) -> tuple[Git, str]:
    git = Git(hub.trusted, environ=repository.environ)
    source = Source.of(str(repository.top), is_local=True, git=git)
    return git, await source.fetch("main", internal_ref("run1", "base"))


def _files(tree: Path) -> dict[str, tuple[int, bytes | str]]:
    found = {}
    for path in tree.rglob("*"):
        content = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        found[str(path.relative_to(tree))] = path.lstat().st_mode, content
    return {name: facts for name, facts in found.items() if name != ".git"}


async def test_a_copy_is_what_git_checks_out(hub: Hub, repository: Repository) -> None:
    """Modes, links and strange names are the same, git finds no difference, and the stamps find nothing changed."""
    git, base = await _fetch(hub, repository)
    templates = Templates()
    made = [Worktree(hub, "run1", f"task{one}", 1) for one in range(_MANY)]
    async with anyio.create_task_group() as group:
        for one in made:
            group.start_soon(partial(worktrees.create, git, one, base, "", templates.check_out))
    plain = Worktree(hub, "run1", "plain", 1)
    await worktrees.create(git, plain, base, "")
    assert templates.place is not None
    for one in made:
        assert _files(one.tree) == _files(plain.tree)
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=one.tree, env=repository.environ, check=True, capture_output=True
        )
        assert not status.stdout
        stamps = Stamps.take(one.tree)
        assert stamps is not None
        found = stamps.candidates(0)
        assert found is not None
        assert not found.count


async def test_a_template_follows_what_is_asked_for(hub: Hub, repository: Repository) -> None:
    """Another commit is checked out by git at first, then it is what the template has; removed, it leaves nothing."""
    git, base = await _fetch(hub, repository)
    templates = Templates()
    made = [Worktree(hub, "run1", f"task{one}", 1) for one in range(_MANY)]
    for one in made[:3]:
        await worktrees.create(git, one, base, "", templates.check_out)
    repository.commit({"newer.txt": "1\n"}, "newer")
    _, newer = await _fetch(hub, repository)
    for one in made[3:]:
        await worktrees.create(git, one, newer, "", templates.check_out)
    assert [(one.tree / "newer.txt").exists() for one in made] == [False] * 3 + [True] * 3
    place = templates.place
    assert place is not None
    assert (place.tree / "newer.txt").exists()
    left = worktrees.left_over(hub, "run1", None)
    assert [one for one in left if one.is_check] == [place]
    for one in left:
        await worktrees.remove(git, one)
    assert not list((hub.trusted / "indexes").iterdir())
    assert not list(hub.sessions.iterdir())
