"""Some files of a commit as they were in its first parent, the others as they are."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator.repo.git.command import Git


async def revert_paths(git: Git, commit: str, paths: Collection[str], message: str) -> str:
    """Return a commit like `commit`, with its parents, in which what it changes at `paths` is not changed."""
    first, *others = (await git.line("rev-parse", f"{commit}^@")).split()
    changes = [one for one in await git.changes(first, commit) if one.path in paths]
    # What is removed goes first: a file may come back where a folder was.
    lines = [f"{one.old_mode} {one.old_id}\t{one.path}" for one in sorted(changes, key=lambda one: one.old_mode)]
    with TemporaryDirectory(prefix="council-index-") as folder:
        env = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        await git("read-tree", commit, env=env)
        entries = "".join(f"{line}\0" for line in lines).encode(errors="surrogateescape")
        await git("update-index", "--replace", "-z", "--index-info", env=env, input_=entries)
        tree = await git.line("write-tree", env=env)
    parents = [word for parent in (first, *others) for word in ("-p", parent)]
    return await git.line("commit-tree", tree, *parents, input_=message.encode())
