"""Revert files of a commit to its first parent."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator.repo.git.command import Git


async def revert_paths(git: Git, commit: str, paths: Collection[str], message: str) -> str:
    """Return a commit like `commit`, but without its changes at `paths`."""
    first, *other_parents = (await git.line("rev-parse", f"{commit}^@")).split()
    changes = [change for change in await git.changes(first, commit) if change.path in paths]
    # Removals first: a file may replace a folder.
    removals_first = sorted(changes, key=lambda change: change.old_mode)
    lines = [f"{change.old_mode} {change.old_id}\t{change.path}" for change in removals_first]
    with TemporaryDirectory(prefix="council-index-") as folder:
        env = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        await git("read-tree", commit, env=env)
        entries = "".join(f"{line}\0" for line in lines).encode(errors="surrogateescape")
        await git("update-index", "--replace", "-z", "--index-info", env=env, input_=entries)
        tree = await git.line("write-tree", env=env)
    parents = [word for parent in (first, *other_parents) for word in ("-p", parent)]
    return await git.line("commit-tree", tree, *parents, input_=message.encode())
